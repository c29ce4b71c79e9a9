"""The reference against a loop-by-loop oracle and against finite differences, in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stvit import reference, super_token_sampling, token_upsampling
from tests.support import oracle

EXACT = {"rtol": 1e-12, "atol": 1e-13}  # both sides in float64; only the order of sums differs


class Shape(NamedTuple):
    size: tuple[int, int]
    tile: tuple[int, int]
    channels: int = 3
    batch: int = 2


SHAPES = {
    "square": Shape((9, 12), (3, 4)),
    "padded both ways": Shape((5, 7), (2, 3)),
    "padded below": Shape((7, 6), (4, 2)),
    "padded right": Shape((4, 7), (2, 4)),
    "one super token": Shape((3, 4), (3, 4)),
    "a row of super tokens": Shape((2, 12), (2, 3)),
    "a column of super tokens": Shape((8, 3), (2, 3)),
    "two by two": Shape((4, 6), (2, 3)),
    "smaller than a tile": Shape((2, 3), (4, 5)),
    "lower than a tile": Shape((2, 7), (5, 2)),
    "narrower than a tile": Shape((7, 2), (2, 5)),
    "one pixel": Shape((1, 1), (1, 1)),
    "one pixel in a larger tile": Shape((1, 1), (2, 3)),
    "a tile a pixel": Shape((4, 5), (1, 1)),
    "one channel": Shape((5, 7), (2, 3), channels=1),
    "many channels": Shape((3, 5), (1, 2), channels=20, batch=1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
rounds = pytest.mark.parametrize("n_iter", [1, 2, 3])


def pixels(shape: Shape) -> Tensor:
    """Large enough that the weights of a pixel differ, as do the super tokens of neighbouring tiles."""
    return 1.5 * torch.randn(shape.batch, shape.channels, *shape.size, dtype=torch.float64) + 0.3


def assert_is_the_oracle(x: Tensor, tile: tuple[int, int], n_iter: int, scale: float | None, full: bool) -> None:
    stokens, association = super_token_sampling(x, tile, n_iter, scale, full, backend="reference")
    factor = x.shape[1] ** -0.5 if scale is None else scale
    expected, weights, mass = oracle.sampling(x, tile, n_iter, factor)
    torch.testing.assert_close(association.weights, weights, **EXACT)
    torch.testing.assert_close(association.mass, mass, **EXACT)
    torch.testing.assert_close(stokens, expected, **EXACT)
    refined = torch.randn_like(stokens)
    y = token_upsampling(refined, association, backend="reference")
    torch.testing.assert_close(y, oracle.upsampling(refined, weights, tile), **EXACT)


@shapes
@rounds
@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
def test_forward_is_the_oracle(shape: Shape, n_iter: int, full: bool) -> None:
    assert_is_the_oracle(pixels(shape), shape.tile, n_iter, None, full)


@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    n_iter=st.integers(1, 3),
    scale=st.sampled_from([None, 0.7, -1.0, 0.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=20)
def test_drawn_forward_is_the_oracle(
    size: tuple[int, int], tile: tuple[int, int], channels: int, n_iter: int, scale: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_is_the_oracle(pixels(Shape(size, tile, channels, 1)), tile, n_iter, scale, False)


def test_what_a_neighbour_outside_the_grid_takes_is_dropped() -> None:
    """One tile: eight of nine neighbours are outside, have logits 0, and keep their share."""
    x = torch.tensor([[1.0, 3.0]], dtype=torch.float64).reshape(1, 1, 1, 2)
    stokens, association = super_token_sampling(x, (1, 2), scale=1.0, backend="reference")
    own = torch.tensor([2.0, 6.0], dtype=torch.float64).exp()  # logits: pixel times the mean, 2
    share = own / (own + 8)
    torch.testing.assert_close(association.weights[0, 4, 0], share)
    torch.testing.assert_close(association.mass.flatten(), share.sum().reshape(1))
    torch.testing.assert_close(stokens.flatten(), ((share * x.flatten()).sum() / share.sum()).reshape(1))


def test_padded_pixels_count_in_means_and_mass() -> None:
    """One pixel in a tile of four: the mean is a quarter, each padded pixel gives 1/9."""
    x = torch.full((1, 1, 1, 1), 4.0, dtype=torch.float64)
    stokens, association = super_token_sampling(x, 2, scale=1.0, backend="reference")
    own = torch.tensor(4.0 * 1.0, dtype=torch.float64).exp()
    share = own / (own + 8)
    torch.testing.assert_close(association.mass.flatten(), (share + 3 / 9).reshape(1))
    torch.testing.assert_close(stokens.flatten(), (4 * share / (share + 3 / 9)).reshape(1))


@shapes
@rounds
def test_detached_gradient_is_the_oracle(shape: Shape, n_iter: int) -> None:
    x = pixels(shape).requires_grad_()
    stokens, association = super_token_sampling(x, shape.tile, n_iter, backend="reference")
    assert not association.weights.requires_grad and not association.mass.requires_grad
    refined = stokens.tanh()
    y = token_upsampling(refined, association, backend="reference")
    grad_stokens, grad_y = torch.randn_like(stokens), torch.randn_like(y)
    through_stokens = torch.autograd.grad(stokens, x, grad_stokens, retain_graph=True)[0]
    through_y, grad_refined = torch.autograd.grad(y, (x, refined), grad_y)

    weights, mass = association.weights, association.mass
    expected = oracle.sampling_backward(grad_stokens, weights, mass, shape.tile)
    torch.testing.assert_close(through_stokens, expected, **EXACT)
    expected = oracle.upsampling_backward(grad_y, weights, shape.tile)
    torch.testing.assert_close(grad_refined, expected, **EXACT)
    expected = oracle.sampling_backward(expected * (1 - refined.detach() ** 2), weights, mass, shape.tile)
    torch.testing.assert_close(through_y, expected, **EXACT)


GRADCHECKED = {name: SHAPES[name] for name in ("padded both ways", "two by two", "smaller than a tile", "one channel")}
GRADCHECKED["a tile a pixel"] = Shape((2, 3), (1, 1), channels=2, batch=1)


def gradcheck(function, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, inputs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("shape", GRADCHECKED.values(), ids=GRADCHECKED)
@pytest.mark.parametrize("n_iter", [1, 2])
def test_full_gradient_is_true(shape: Shape, n_iter: int) -> None:
    """Of sampling, a map between super tokens, and upsampling, with respect to all that flows from x."""

    def whole(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stokens, association = super_token_sampling(x, shape.tile, n_iter, association_grad=True, backend="reference")
        return stokens, association.weights, token_upsampling(stokens.tanh(), association, backend="reference")

    gradcheck(whole, pixels(shape._replace(batch=1, channels=min(2, shape.channels))).requires_grad_())


@pytest.mark.parametrize("shape", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradients_with_the_association_given(shape: Shape) -> None:
    """Sampling as a function of x, and upsampling of the super tokens, are linear: their gradients are true."""
    x = pixels(shape._replace(batch=1))
    stokens, association = super_token_sampling(x, shape.tile, backend="reference")
    by_tile = reference.associate(
        reference.pixels_by_tile(x, shape.tile), reference.pool(x, shape.tile), shape.channels**-0.5
    )

    def sample(x: Tensor) -> Tensor:
        return reference.sample(reference.pixels_by_tile(x, shape.tile), by_tile, tuple(stokens.shape[2:]))[0]

    torch.testing.assert_close(sample(x), stokens, **EXACT)
    gradcheck(sample, x.requires_grad_())
    refined = torch.randn_like(stokens).requires_grad_()
    gradcheck(lambda refined: token_upsampling(refined, association, backend="reference"), refined)

    # What the function gives in its detached mode is this gradient.
    grad_stokens = torch.randn_like(stokens)
    expected = torch.autograd.grad(sample(x), x, grad_stokens)[0]
    stokens, _ = super_token_sampling(x, shape.tile, backend="reference")
    torch.testing.assert_close(torch.autograd.grad(stokens, x, grad_stokens)[0], expected, **EXACT)


def test_the_modes_differ_only_in_the_gradient() -> None:
    x = pixels(SHAPES["padded both ways"]).requires_grad_()
    gradients = []
    for full in (False, True):
        stokens, association = super_token_sampling(x, (2, 3), association_grad=full, backend="reference")
        y = token_upsampling(stokens, association, backend="reference")
        gradients.append((y.detach(), torch.autograd.grad(y.square().sum(), x)[0]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
def test_dtypes_and_formats(dtype: torch.dtype, full: bool) -> None:
    """Outputs and gradients keep dtype and format; sums are wide: 4096 weights of 1/9 add up."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 10, 14, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        stokens, association = super_token_sampling(x, (4, 3), association_grad=full, backend="reference")
        y = token_upsampling(stokens, association, backend="reference")
        assert stokens.dtype == association.weights.dtype == y.dtype == dtype
        assert association.mass.dtype == torch.float32
        assert stokens.is_contiguous(memory_format=memory_format)
        assert y.is_contiguous(memory_format=memory_format)
        assert association.weights.stride(1) == 1
        assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype
    x = torch.zeros(1, 1, 64, 64, dtype=dtype)
    _, association = super_token_sampling(x, 64, backend="reference")
    torch.testing.assert_close(association.mass.flatten(), torch.tensor([4096 / 9]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
def test_an_empty_batch(full: bool) -> None:
    x = torch.randn(0, 3, 5, 7, requires_grad=True)
    stokens, association = super_token_sampling(x, (2, 3), 2, association_grad=full, backend="reference")
    y = token_upsampling(stokens, association, backend="reference")
    assert stokens.shape == (0, 3, 3, 3) and y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_half_precision_holds_logits_and_sums_that_pass_its_largest_number() -> None:
    """64 * 33 * 33 = 69696 is no float16, nor is the sum of a tile's pixels of 6000; what comes of them is."""
    for x, tile, scale in (
        (torch.full((1, 64, 4, 4), 33.0), 2, None),
        (torch.full((1, 1, 8, 8), 6000.0), 4, 1e-6),
    ):
        expected, association = super_token_sampling(x.double(), tile, scale=scale, backend="reference")
        stokens, found = super_token_sampling(x.half(), tile, scale=scale, backend="reference")
        torch.testing.assert_close(stokens.double(), expected, rtol=2e-3, atol=0.0)
        torch.testing.assert_close(found.weights.double(), association.weights, rtol=0.0, atol=1e-3)
