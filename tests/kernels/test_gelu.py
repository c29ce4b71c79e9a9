"""GELU as the residual depthwise kernels compute it for 16-bit numbers, at every one of them, against float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from stvit.kernels import residual_depthwise as kernels
from tests.support import gelu_fit

BLOCK = 8192


@triton.jit
def evaluate_kernel(x, h, slope, tail, ERF: tl.constexpr, BLOCK: tl.constexpr):
    """h and slope as the kernels compute them from float32 x (BLOCK,); tail = Phi(-|x|)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(x + at)
    _, steepness = kernels.gelu_and_slope(u, ERF)
    tl.store(h + at, kernels.gelu(u, ERF))
    tl.store(slope + at, steepness)
    tl.store(tail + at, kernels.normal(-tl.abs(u))[0])


class Values(NamedTuple):
    """GELU, its slope and the normal distribution's tail at x, all (N,)."""

    h: Tensor
    slope: Tensor
    tail: Tensor


def truth(x: Tensor) -> Values:
    x = x.double()
    phi, density = torch.erfc(-x / math.sqrt(2)) / 2, (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    return Values(x * phi, phi + x * density, torch.erfc(x.abs() / math.sqrt(2)) / 2)


def evaluate(x: Tensor, erf: bool = False) -> Values:
    results = Values(*(torch.empty_like(x) for _ in range(3)))
    evaluate_kernel[(x.numel() // BLOCK,)](x, *results, ERF=erf, BLOCK=BLOCK)
    return results


def every(dtype: torch.dtype, device: str) -> Tensor:
    """All numbers of a 16-bit dtype as float32 (2^16,), with zero for infinities, NaN and what float32 flushes."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    x = bits.view(dtype).float()
    return torch.where(x.isfinite() & (x.abs() >= 2.0**-125), x, 0.0)


def places(found: Tensor, expected: Tensor, dtype: torch.dtype) -> Tensor:
    """How far `found`, rounded to dtype, is from float64 `expected`, in units of the last place there."""
    info = torch.finfo(dtype)
    unit = expected.abs().clamp(min=info.tiny).log2().floor().exp2() * info.eps
    return (found.to(dtype).double() - expected).abs() / unit


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, for the square of 1e30
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", ["h", "slope"])
def test_rounding_is_no_worse_than_by_the_error_function(what: str, dtype: torch.dtype, device: str) -> None:
    """The largest error in units of the last place, and how many results are not the nearest number."""
    x = every(dtype, device)
    expected = getattr(truth(x), what)
    errors = {erf: places(getattr(evaluate(x, erf), what), expected, dtype) for erf in (False, True)}
    nearest = places(expected, expected, dtype)
    wrong = {erf: int((error > nearest).sum()) for erf, error in errors.items()}
    assert errors[False].max() <= min(0.502, errors[True].max())
    assert wrong[False] <= wrong[True] and wrong[False] < 2**16 / 2000


def test_the_tail_is_within_its_error(device: str) -> None:
    x = torch.cat([torch.linspace(-13, 13, 3 * BLOCK), torch.logspace(-30, 0, BLOCK)]).to(device)
    error = (evaluate(x).tail.double() / truth(x).tail - 1).abs()
    assert error[x.abs() < 1].max() < 7.4e-7 + 6e-7  # the fit's at x = 1, and ten roundings of float32
    assert error.max() < 1.2e-5  # x * x is rounded before it is an exponent: 85 * 2^-24 at x = 13, twice


def test_the_coefficients_are_those_of_the_fit() -> None:
    coefficients, error = gelu_fit.fit(kernels.POLE.value)
    assert error < 2.4e-7
    torch.testing.assert_close(coefficients, torch.tensor(kernels.MILLS.value, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, for inf * 0
def test_what_is_not_finite_stays_as_the_error_function_has_it(device: str) -> None:
    x = torch.zeros(BLOCK, device=device)
    x[:3] = torch.tensor([math.inf, -math.inf, math.nan])
    found, expected = evaluate(x), evaluate(x, erf=True)
    for what in ("h", "slope"):
        torch.testing.assert_close(getattr(found, what), getattr(expected, what), equal_nan=True, rtol=0, atol=1e-6)
