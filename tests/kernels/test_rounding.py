"""A result that is rounded once, from sums in float32, is the nearest number of its format: entry by entry.

The 2x rule compares largest errors, so it can't tell rounding from truncation: that doubles the error at most.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stvit import functional, token_upsampling
from stvit.geometry import Association
from tests.support.cases import HALF, LAST, Case

CASE = Case(1, 40, 7, 9, (4, 4), HALF, layout=LAST)  # the last tiles are padded


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_rounded_once_is_to_nearest(backend: str, device: str) -> None:
    check(CASE, backend, device)


def check(case: Case, backend: str, device: str) -> None:
    """Upsampling, depthwise, LayerNorm, branch, and their gradients, of pixels and weights in the case's layout."""
    x, y = case.pixels(device), case.random(device, case.channels, (case.height, case.width), case.layout)
    stokens = case.random(device, case.channels, case.grid, case.layout)
    weight, bias = (torch.linspace(low, 1, case.channels).to(device, case.dtype) for low in (-1, -0.5))
    taps = torch.linspace(-1, 1, 9 * case.channels).to(device, case.dtype).view(-1, 1, 3, 3)
    found, truth = (
        _compute(case, name, *(t.to(dtype) for t in (x, y, stokens, case.weights(device), taps, weight, bias)))
        for name, dtype in ((backend, case.dtype), ("reference", torch.float64))
    )
    for name, value in found.items():
        assert_nearest(name, value, truth[name])


def _compute(
    case: Case,
    backend: str,
    x: Tensor,
    y: Tensor,
    stokens: Tensor,
    weights: Tensor,
    taps: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    mass = torch.ones(case.batch, 1, *case.grid, device=x.device)
    results = {"upsampling": token_upsampling(stokens, Association(weights, mass, case.tile, True), backend)}
    for name, result in {
        "depthwise": functional.residual_depthwise(x, taps, bias, False, backend),
        "norm": functional.channel_layer_norm(x, weight, bias, 1e-6, backend),
        "branch": functional.residual_branch(y, x, weight, None, backend),
    }.items():
        results[name] = result.detach()
        (results[f"{name}, gradient"],) = torch.autograd.grad(result, x, y)
    return results


def assert_nearest(name: str, found: Tensor, truth: Tensor) -> None:
    """At most half the distance between numbers of found's format away from the truth, and a little for float32."""
    steps = torch.finfo(found.dtype).eps * truth.abs().clamp(min=2.0**-14).log2().floor().exp2()
    away = (found.double() - truth).abs() - 1e-5 * truth.abs().max()
    worst = (away / steps).max()
    assert worst <= 0.5, f"{name}: an entry exceeds its rounding, it is {worst:.2f} steps from the truth"
