"""The sampling kernels against float64 truth: super tokens, weights, mass, and the gradient of the pixels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from stvit import super_token_sampling
from stvit.kernels import configs
from stvit.tensors import is_channels_last, memory_format
from tests.support.cases import (
    LISTED,
    PHASES,
    Case,
    assert_within_twice,
    cases,
    each,
    each_dtype,
    far_apart,
    launching,
    nudged,
)
from tests.support.vectorized_cases import VECTORIZED, vectorized_cases


def compute(case: Case, x: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output and gradient of sampling in `dtype`, from the values and in the layout of x."""
    if x.dtype != dtype:
        x = x.to(dtype)
    x = x.detach().requires_grad_()
    device = str(x.device)
    stokens, association = super_token_sampling(x, case.tile, case.n_iter, None, case.full, backend)
    weights, mass = association.weights, association.mass
    results = {"stokens": stokens, "weights": weights, "mass": mass}
    grad_stokens = case.random(device, case.channels, case.grid, case.grad_layout).to(dtype)
    grad_weights = case.random(device, 9, (case.height, case.width), case.grad_layout).to(dtype)
    (results["x through stokens"],) = torch.autograd.grad(stokens, x, grad_stokens, retain_graph=case.full)
    if case.full:
        (results["x through weights"],) = torch.autograd.grad(weights, x, grad_weights, retain_graph=True)
        both = torch.autograd.grad((stokens, weights), x, (grad_stokens, grad_weights))
        (results["x through both"],) = both
    else:
        assert not weights.requires_grad and not mass.requires_grad
    assert stokens.is_contiguous(memory_format=memory_format(is_channels_last(x)))
    return {name: result.detach() for name, result in results.items()}


def check(case: Case, backend: str, device: str) -> None:
    x = case.pixels(device)
    truth, reference = (compute(case, x, "reference", dtype) for dtype in (torch.float64, case.dtype))
    with launching(case, device):
        kernel = compute(case, x, backend, case.dtype)
    assert_within_twice(
        kernel, reference, truth, case.dtype, lambda seed: compute(case, nudged(x, seed), "reference", case.dtype)
    )


@each("case", LISTED)
def test_listed_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


@given(case=cases())
@settings(max_examples=25, phases=PHASES)
def test_drawn_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("case", VECTORIZED, ids=lambda case: case.name)
def test_vectorized_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@given(case=vectorized_cases())
@settings(max_examples=50, phases=PHASES)
def test_drawn_vectorized_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


ROW = Case(2, 3, 3, 9, (2, 2), torch.float64, True)  # a grid of 2 x 5


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("programs", [20, 7, 4, 1])
def test_runs_of_any_length_agree(programs: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has more tiles a program when there are more tiles than programs; only the order of sums depends on it."""
    (gh, gw), x = ROW.grid, ROW.pixels(device)
    assert configs.run_length(ROW.batch, gh, gw) == 1
    single = compute(ROW, x, backend, ROW.dtype)
    monkeypatch.setattr(configs, "PROGRAMS", programs)
    assert configs.run_length(ROW.batch, gh, gw) == {20: 1, 7: 2, 4: 5, 1: 5}[programs]
    for name, value in compute(ROW, x, backend, ROW.dtype).items():
        torch.testing.assert_close(value, single[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
def test_results_repeat_bit_for_bit(full: bool, backend: str, device: str) -> None:
    case = Case(2, 20, 7, 7, (4, 3), torch.float16, full, 2, run=2)
    with launching(case, device):
        first, second = (compute(case, case.pixels(device), backend, case.dtype) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_images_do_not_depend_on_each_other(backend: str, device: str) -> None:
    """Each image of a batch gives the bits that it gives alone, even next to one that is all NaN."""
    case = Case(3, 5, 3, 7, (2, 3), torch.float32, False, 2, run=2)
    x = case.pixels(device)
    x[1] = torch.nan
    with launching(case, device):
        together, association = super_token_sampling(x, case.tile, 2, backend=backend)
        for image in (0, 2):
            alone, own = super_token_sampling(x[image : image + 1], case.tile, 2, backend=backend)
            assert torch.equal(together[image], alone[0])
            assert torch.equal(association.weights[image], own.weights[0])
            assert torch.equal(association.mass[image], own.mass[0])
    assert together[1].isnan().all() and not together[::2].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
@pytest.mark.parametrize("place", [(0, 1, 2, 2), (0, 0, 6, 8)], ids=["inside", "beside padding"])
def test_nan_and_infinity_spread_as_in_the_reference(
    value: float, full: bool, place: tuple[int, int, int, int], backend: str, device: str
) -> None:
    case = Case(1, 3, 7, 13, (2, 3), torch.float32, full, run=3)
    x = case.pixels(device)
    x[place] = value
    with launching(case, device):
        kernel, reference = (compute(case, x, name, case.dtype) for name in (backend, "reference"))
    assert not kernel["stokens"].isfinite().all() and kernel["stokens"].isfinite().any()
    kernel.pop("x through weights", None)  # its missing gradient of the super tokens counts as zeros times their NaN
    for name in kernel:
        torch.testing.assert_close(kernel[name].isnan(), reference[name].isnan(), msg=f"{name}: other entries are NaN")
        torch.testing.assert_close(kernel[name], reference[name], equal_nan=True, rtol=1e-4, atol=1e-5)


@each_dtype
def test_scale_is_the_one_given(dtype: torch.dtype, backend: str, device: str) -> None:
    case = Case(1, 3, 5, 7, (2, 3), dtype)
    x = case.pixels(device)
    for scale in (2.5, 0.0, -0.5):
        kernel, reference, truth = (
            super_token_sampling(value, case.tile, 2, scale, backend=name)
            for name, value in ((backend, x), ("reference", x), ("reference", x.double()))
        )
        found, expected, exact = ({"s": s, "w": a.weights, "m": a.mass} for s, a in (kernel, reference, truth))
        assert_within_twice(found, expected, exact, dtype)
        assert (kernel[1].weights == kernel[1].weights[:, :1]).all() == (scale == 0)


@pytest.mark.parametrize("dimension", range(4), ids=["image", "channel", "row", "column"])
def test_offsets_beyond_two_to_the_31(
    dimension: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three entries 2**30 apart: the last one's offset doesn't fit 32 bits. The memory between is never touched."""
    shape = [1, 2, 2, 2]
    shape[dimension] = 3
    x = far_apart(torch.randn(shape, dtype=torch.float16, device=device), dimension, monkeypatch)
    for full in (False, True):
        results = []
        for value in (x, x.contiguous()):
            value = value.detach().requires_grad_()
            stokens, association = super_token_sampling(value, (1, 2), association_grad=full, backend=backend)
            (grad,) = torch.autograd.grad(stokens.square().sum(), value)
            results.append((stokens, association.weights, association.mass, grad))
        for far, near in zip(*results, strict=True):
            torch.testing.assert_close(far, near, rtol=1e-2, atol=1e-3)
