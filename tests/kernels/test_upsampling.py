"""The upsampling kernels against float64 truth: pixels, and the gradients of super tokens and weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from stvit import Association, super_token_sampling, token_upsampling
from stvit.tensors import memory_format
from tests.support.cases import (
    LAYOUTS,
    LISTED,
    NUDGES,
    PHASES,
    Case,
    Results,
    assert_within_twice,
    cases,
    each,
    each_dtype,
    far_apart,
    launching,
    nudged,
)
from tests.support.vectorized_cases import VECTORIZED, vectorized_cases


def compute(case: Case, stokens: Tensor, weights: Tensor, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """y and every gradient of upsampling in `dtype`, from the values and in the layout of stokens and weights."""
    stokens, weights = (t if t.dtype == dtype else t.to(dtype) for t in (stokens, weights))
    stokens, weights = stokens.detach().requires_grad_(), weights.detach().requires_grad_(case.full)
    device = str(stokens.device)
    mass = torch.ones(case.batch, 1, *case.grid, device=device)
    as_pixels_were = case.layout != "contiguous"
    y = token_upsampling(stokens, Association(weights, mass, case.tile, as_pixels_were), backend)
    assert y.is_contiguous(memory_format=memory_format(as_pixels_were))
    grad_y = case.random(device, case.channels, (case.height, case.width), case.grad_layout).to(dtype)
    results = {"y": y.detach()}
    if case.full:
        results["stokens"], results["weights"] = torch.autograd.grad(y, (stokens, weights), grad_y)
    else:
        (results["stokens"],) = torch.autograd.grad(y, stokens, grad_y)
    return results


def check(case: Case, backend: str, device: str) -> None:
    stokens, weights = case.random(device, case.channels, case.grid, case.layout), case.weights(device)
    truth, reference = (compute(case, stokens, weights, "reference", dtype) for dtype in (torch.float64, case.dtype))
    with launching(case, device):
        kernel = compute(case, stokens, weights, backend, case.dtype)

    def again(seed: int) -> Results:
        return compute(case, nudged(stokens, seed), nudged(weights, seed + NUDGES), "reference", case.dtype)

    assert_within_twice(kernel, reference, truth, case.dtype, again)


# Rounds are sampling's alone.
@each("case", [case for case in LISTED if case.n_iter == 1 or case.channels == 3])
def test_listed_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


@given(case=cases(rounds=1))
@settings(max_examples=30, phases=PHASES)
def test_drawn_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("case", VECTORIZED, ids=lambda case: case.name)
def test_vectorized_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@given(case=vectorized_cases(rounds=1))
@settings(max_examples=50, phases=PHASES)
def test_drawn_vectorized_cases(case: Case, backend: str, device: str) -> None:
    check(case, backend, device)


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_layout(layout: str, full: bool, backend: str, device: str) -> None:
    """Someone else's association need not lie in memory as sampling's does."""
    case = Case(2, 4, 3, 5, (2, 3), torch.float32, full)
    stokens, weights = case.random(device, 4, case.grid, "contiguous"), LAYOUTS[layout](case.weights(device))
    truth, reference, kernel = (
        compute(case, stokens, weights, name, dtype)
        for name, dtype in (("reference", torch.float64), ("reference", case.dtype), (backend, case.dtype))
    )
    assert_within_twice(kernel, reference, truth, case.dtype)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
@pytest.mark.parametrize("run", [1, 2, 5])
def test_runs_of_any_length_agree(run: int, full: bool, backend: str, device: str) -> None:
    case = Case(2, 3, 3, 9, (2, 2), torch.float64, full)
    stokens, weights = case.random(device, 3, case.grid, "channels_last"), case.weights(device)
    results = []
    for length in (1, run):
        with launching(case._replace(run=length), device):
            results.append(compute(case, stokens, weights, backend, case.dtype))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
def test_results_repeat_bit_for_bit(full: bool, backend: str, device: str) -> None:
    case = Case(2, 20, 7, 7, (4, 3), torch.float16, full, run=2)
    stokens, weights = case.random(device, 20, case.grid, "channels_last"), case.weights(device)
    with launching(case, device):
        first, second = (compute(case, stokens, weights, backend, case.dtype) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["stokens", "weights"])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, where: str, backend: str, device: str) -> None:
    case = Case(1, 3, 7, 13, (2, 3), torch.float32, True, run=3)
    given = {"stokens": case.random(device, 3, case.grid, "contiguous"), "weights": case.weights(device)}
    given[where][0, 1, 2, 2] = value
    with launching(case, device):
        kernel, reference = (compute(case, *given.values(), name, case.dtype) for name in (backend, "reference"))
    assert not kernel["y"].isfinite().all() and kernel["y"].isfinite().any()
    for name in kernel:
        torch.testing.assert_close(kernel[name], reference[name], equal_nan=True, rtol=1e-4, atol=1e-5)


@each_dtype
def test_other_channels_than_were_sampled(dtype: torch.dtype, backend: str, device: str) -> None:
    x = torch.randn(2, 5, 4, 6, dtype=dtype, device=device)
    _, association = super_token_sampling(x, (2, 3), backend="reference")
    stokens = torch.randn(2, 11, 2, 2, dtype=dtype, device=device)
    kernel, reference, truth = (
        {"y": token_upsampling(tokens, association, name)}
        for name, tokens in ((backend, stokens), ("reference", stokens), ("reference", stokens.double()))
    )
    assert kernel["y"].shape == (2, 11, 4, 6)
    assert_within_twice(kernel, reference, truth, dtype)


@pytest.mark.parametrize("full", [False, True], ids=["detached", "full"])
@pytest.mark.parametrize(
    ("dtype", "residual_dtype"),
    [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float16),
     (torch.float64, torch.float64)],
    ids=str,
)  # fmt: skip
def test_a_residual_is_added(
    dtype: torch.dtype, residual_dtype: torch.dtype, full: bool, backend: str, device: str
) -> None:
    """In the dtype that PyTorch promotes both to, which gradients flow in too; each input's comes back in its own."""
    case = Case(2, 20, 5, 7, (2, 3), dtype, full, layout="sliced", grad_layout="channels_last")
    given = (case.random(device, 20, case.grid, case.layout), case.weights(device),
             case._replace(dtype=residual_dtype).random(device, 20, (5, 7), case.layout))  # fmt: skip
    mass = torch.ones(2, 1, *case.grid, device=device)
    results = []
    for name, dtypes in ((backend, None), ("reference", None), ("reference", torch.float64)):
        stokens, weights, residual = (t.to(dtypes or t.dtype).detach().requires_grad_() for t in given)
        association = Association(weights if full else weights.detach(), mass, case.tile, True)
        y = token_upsampling(stokens, association, name, residual=residual)
        assert y.is_contiguous(memory_format=torch.channels_last)
        inputs = (stokens, residual, weights)[: 2 + full]
        grads = torch.autograd.grad(y, inputs, case.random(device, 20, (5, 7), case.grad_layout).to(y.dtype))
        results.append(dict(zip(("y", "stokens", "residual", "weights"), (y.detach(), *grads), strict=False)))
    assert results[0]["y"].dtype == torch.promote_types(dtype, residual_dtype)
    assert_within_twice(*results, dtype)


@pytest.mark.parametrize("dimension", range(4), ids=["image", "channel", "row", "column"])
@pytest.mark.parametrize("far", ["stokens", "grad_y"])
def test_offsets_beyond_two_to_the_31(
    far: str, dimension: int, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = [1, 2, 2, 2]
    if (far, dimension) != ("grad_y", 3):  # its columns are twice as many already
        shape[dimension] = 3
    batch, channels, gh, gw = shape
    weights = torch.rand(batch, 9, gh, 2 * gw, dtype=torch.float16, device=device).requires_grad_()
    association = Association(weights, torch.ones(batch, 1, gh, gw, device=device), (1, 2), False)
    stokens = torch.randn(shape, dtype=torch.float16, device=device)
    grad_y = torch.randn(batch, channels, gh, 2 * gw, dtype=torch.float16, device=device)
    moved = far_apart(stokens if far == "stokens" else grad_y, dimension, monkeypatch)
    results = []
    for tokens, grad in ((stokens, grad_y), (moved, grad_y) if far == "stokens" else (stokens, moved)):
        tokens = tokens.detach().requires_grad_()
        y = token_upsampling(tokens, association, backend)
        results.append((y, *torch.autograd.grad(y, (tokens, weights), grad)))
    for near, distant in zip(*results, strict=True):
        torch.testing.assert_close(distant, near, rtol=1e-2, atol=1e-3)
