"""The kernels of BatchNorm's backward against float64 truth, and the norm in a block against nn.BatchNorm2d."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stvit.functional import batch_norm_and_skip
from stvit.kernels import residual_branch
from stvit.modules import SuperTokenBlock
from stvit.tensors import is_channels_last, memory_format
from tests.support.block_cases import Pixels, Results, check, drawn_pixels, ids, leaf, saving
from tests.support.cases import DOUBLE, DTYPES, HALF, LAST, SINGLE, SLICED, SLICED_LAST


class Case(NamedTuple):
    """One call; x has this mean.

    elements: numbers that a program holds at a time; programs: how many the sums have, at most; None: as the kernels
    have it.
    """

    pixels: Pixels
    mean: float = 0.0
    elements: int | None = None
    programs: int | None = None

    def tensors(self, device: str) -> list[Tensor]:
        """x, weight and bias."""
        parameters = [self.pixels.parameter(which, device, self.pixels.channels) for which in range(2)]
        return [self.pixels.pixels(0, device) + self.mean, *parameters]

    def grads(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Of y, and of x through the skip connection, laid out as x is."""
        layouts = (self.pixels.grad_layout, self.pixels.layout)
        return [self.pixels.pixels(1 + which, device, dtype, layout) for which, layout in enumerate(layouts)]


def several(pixels: Pixels) -> bool:
    """Whether a channel has more than one value."""
    return pixels.batch * pixels.height * pixels.width > 1


def statistics(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a new norm."""
    return torch.zeros_like(weight, requires_grad=False), torch.ones_like(weight, requires_grad=False)


def compute(case: Case, device: str, backend: str, dtype: torch.dtype) -> Results:
    """y and every gradient in `dtype`."""
    x, *parameters = leaves = [
        leaf(tensor, DOUBLE if dtype == DOUBLE else tensor.dtype) for tensor in case.tensors(device)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_branch, "ELEMENTS", case.elements or residual_branch.ELEMENTS)
        patch.setattr(residual_branch, "PROGRAMS", case.programs or residual_branch.PROGRAMS)
        y, skip = batch_norm_and_skip(x, *parameters, *statistics(parameters[0]), 0.1, 1e-5, backend)
        assert y.is_contiguous(memory_format=memory_format(is_channels_last(x))) and torch.equal(skip, x)
        grad, grad_skip = case.grads(device, dtype)
        if backend == "reference":
            # PyTorch's own, on a CPU, sums across channels where x (1, C, 1, W) is contiguous and the gradient lies as
            # channels_last would but for strides of dimensions of size 1.
            grad = grad.clone(memory_format=memory_format(is_channels_last(x)))
        grads = torch.autograd.grad((y, skip), leaves, (grad, grad_skip))
    return dict(zip(("y", "x", "weight", "bias"), (y.detach(), *grads), strict=True))


def terms(case: Case, device: str) -> Results:
    """Absolute values of what is summed; centring an x whose mean is n deviations multiplies its rounding by n."""
    x, weight, bias = (tensor.double() for tensor in case.tensors(device))
    grad, skip = case.grads(device, DOUBLE)
    mean = x.mean((0, 2, 3), keepdim=True)
    rstd = ((x - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
    n = (x - mean).abs() * rstd + mean.abs() * rstd
    weight, bias = weight[:, None, None].abs(), bias[:, None, None].abs()
    spread = grad.abs() + grad.abs().mean((0, 2, 3), keepdim=True) + n * (grad.abs() * n).mean((0, 2, 3), keepdim=True)
    return {
        "y": weight * n + bias,
        "x": weight * rstd * spread + skip.abs(),
        "weight": (grad.abs() * n).sum((0, 2, 3)),
        "bias": grad.abs().sum((0, 2, 3)),
    }


def check_case(case: Case, device: str) -> None:
    check(lambda backend, dtype: compute(case, device, backend, dtype), case.pixels.dtype, terms(case, device))


LISTED = [
    Case(Pixels(2, 64, 7, 6, HALF, LAST, LAST)),
    Case(Pixels(2, 96, 5, 4, HALF, LAST, LAST, SINGLE)),  # parameters in float32, as torch trains under autocast
    Case(Pixels(1, 320, 5, 9, SINGLE, LAST, LAST)),
    Case(Pixels(2, 90, 6, 1, SINGLE, SLICED_LAST, LAST)),
    Case(Pixels(1, 40, 9, 7, DOUBLE, LAST, LAST)),
    Case(Pixels(3, 3, 5, 7, SINGLE, SLICED, SLICED)),
    Case(Pixels(2, 3, 4, 6, SINGLE, "expanded", "expanded")),
    Case(Pixels(2, 1, 4, 5, SINGLE, LAST, "transposed")),
    Case(Pixels(1, 3, 1, 2, SINGLE, LAST, LAST)),  # two values a channel
    Case(Pixels(1, 2, 1, 2, HALF, "contiguous", "transposed")),
    Case(Pixels(1, 1, 33, 65, HALF)),  # more pixels than a program holds
    # Several blocks of pixels a program of the sums; the last one has fewer, and the last block is not full.
    *(Case(Pixels(2, 5, 7, 9, dtype, LAST, LAST), elements=32, programs=3) for dtype in DTYPES),
    Case(Pixels(3, 20, 5, 5, SINGLE), elements=64, programs=1),
    Case(Pixels(1, 64, 9, 8, SINGLE, LAST, LAST), mean=100.0),
]
LISTED = [case for case in LISTED if case.pixels.dtype in DTYPES]


@pytest.mark.parametrize("case", LISTED, ids=ids)
def test_listed_cases(case: Case, device: str) -> None:
    check_case(case, device)


@given(
    case=st.builds(
        Case,
        drawn_pixels().filter(several),
        st.just(0.0),
        st.sampled_from([None, 512, 1024]),
        st.none() | st.integers(1, 5),
    )
)
@settings(max_examples=16)
def test_drawn_cases(case: Case, device: str) -> None:
    check_case(case, device)


def test_gradient_is_true(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_branch, "ELEMENTS", 32)  # two pixels
    monkeypatch.setattr(residual_branch, "PROGRAMS", 2)
    shapes = [(2, 3, 3, 2), (3,), (3,)]
    inputs = [torch.randn(shape, dtype=DOUBLE, device=device, requires_grad=True) for shape in shapes]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return batch_norm_and_skip(x, weight, bias, *statistics(weight), 0.1, 1e-3, "triton")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-7, rtol=1e-6)


def test_results_repeat_bit_for_bit(device: str) -> None:
    case = Case(Pixels(2, 300, 5, 6, HALF, LAST, LAST, SINGLE), programs=3)
    first, second = (compute(case, device, "triton", HALF) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_numbers_a_channel_are_saved_beside_x(device: str) -> None:
    x = torch.randn(2, 5, 3, 4, device=device, requires_grad=True)
    weight, bias = (torch.randn(5, device=device, requires_grad=True) for _ in range(2))
    with saving() as saved:
        batch_norm_and_skip(x, weight, bias, *statistics(weight), backend="triton")
    others = [tensor for tensor in saved if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [tuple(tensor.shape) for tensor in others] == [(5,), (5,)]


@pytest.mark.parametrize("momentum", [0.1, 0.0])
def test_running_statistics_are_those_of_pytorch(momentum: float, device: str) -> None:
    """Over two steps and an evaluation; the count of batches too, which schedulers of momentum read."""
    block = SuperTokenBlock(8, 2, num_heads=2, backend="triton").to(device, DOUBLE)
    block.norm2.momentum = momentum
    plain = copy.deepcopy(block)
    plain.norm2.register_forward_hook(lambda *_: None)  # it is called then
    for _ in range(2):
        x = torch.randn(2, 8, 3, 2, device=device, dtype=DOUBLE)
        outputs = [each(x) for each in (block, plain)]
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.square().sum().backward()
    found, expected = (dict(each.norm2.named_buffers()) for each in (block, plain))
    assert found.keys() == expected.keys() and found["num_batches_tracked"] == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    for one, other in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(block.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False),
        nn.SyncBatchNorm(4),
        nn.Identity(),
    ],
    ids=["momentum None", "no statistics", "no weight", "synchronised", "another module"],
)
def test_any_other_norm_is_called(norm: nn.Module, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = SuperTokenBlock(4, 2, backend="triton").to(device)
    block.norm2 = norm.to(device)
    called = []
    monkeypatch.setattr(type(norm), "forward", lambda self, x: called.append(self) or x)
    block(torch.randn(2, 4, 4, 4, device=device))
    assert called == [norm]


def test_one_value_a_channel_is_the_error_of_pytorch(device: str) -> None:
    weight = torch.ones(3, device=device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_and_skip(torch.randn(1, 3, 1, 1, device=device), weight, weight, *statistics(weight))


@pytest.mark.parametrize("argument", ["weight", "bias", "running_mean", "running_var"])
def test_a_vector_of_another_length_is_named(argument: str, device: str) -> None:
    """PyTorch's native_batch_norm reads beyond a weight that is too short."""
    given = {name: torch.ones(3, device=device) for name in ("weight", "bias", "running_mean", "running_var")}
    given[argument] = torch.ones(2, device=device)
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*\(3,\)"):
        batch_norm_and_skip(torch.randn(2, 3, 2, 2, device=device), **given)
