"""Fits the coefficients of the normal distribution's tail in kernels/residual_depthwise.py.

Phi(-x) / exp(-x^2 / 2) is a smooth function of t = 1 / (1 + POLE x), which takes all x >= 0 to (0, 1]: a polynomial in
t times t comes near it. Lawson's iteration, least squares whose weights grow where the error is large, finds the one
with the least largest error. Errors are relative; far out, where GELU all but vanishes, they may be 1 / 0.3 times
larger.

Run as a program, ``python tests/support/gelu_fit.py`` tries poles and prints the coefficients of the best.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FARTHEST = 14.0  # beyond it exp(-x^2 / 2) is zero in float32
TAIL = 0.3  # the weight of errors far out; 1 at x = 0


def mills(x: Tensor) -> Tensor:
    """Phi(-x) / exp(-x^2 / 2) in float64."""
    return torch.special.erfcx(x / math.sqrt(2)) / 2


def fit(pole: float, degree: int = 6, points: int = 3000, rounds: int = 150) -> tuple[Tensor, float]:
    """(coefficients of t^0 to t^degree, largest weighted relative error) for t = 1 / (1 + pole x)."""
    t = torch.linspace(1 / (1 + pole * FARTHEST), 1, points, dtype=torch.float64)
    x = (1 / t - 1) / pole
    terms = t[:, None] ** torch.arange(1, degree + 2) / mills(x)[:, None]
    importance = torch.erfc(x / math.sqrt(2)).clamp(min=TAIL)
    weights = torch.full_like(t, 1 / points)
    best, least = terms[0], math.inf
    for _ in range(rounds):
        scale = weights.sqrt() * importance
        coefficients = torch.linalg.lstsq(terms * scale[:, None], scale[:, None]).solution[:, 0]
        errors = ((terms @ coefficients - 1) * importance).abs()
        if errors.max().item() < least:
            best, least = coefficients, errors.max().item()
        weights = weights * errors / (weights * errors).sum()
    return best, least


if __name__ == "__main__":
    pole = min((0.2 + 0.0125 * i for i in range(25)), key=lambda pole: fit(pole)[1])
    coefficients, error = fit(pole)
    print(f"pole {pole:.4f}, largest error {error:.3g}: {', '.join(f'{c:.9g}' for c in coefficients.tolist())}")
