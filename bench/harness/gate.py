"""The correctness gate of every benchmark: no speed is reported for a contender whose numbers are wrong.

Truth is the reference in a wider dtype; the yardstick is the reference in the dtype that is measured. The rule, for
each output and gradient: |got - truth| <= 2 |yardstick - truth| + slack. Norm and slack are the benchmark's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Named = Mapping[str, Tensor]


class Verdict(NamedTuple):
    """passed: the contender may be timed. errors: name -> distance from the truth. worst: the largest share of what the
    rule allows, reached by `worst_name`."""

    passed: bool
    errors: dict[str, float]
    worst: float
    worst_name: str

    def as_row(self) -> dict[str, Any]:
        return {"passed": self.passed, "worst": finite(self.worst), "worst_name": self.worst_name}


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def distance(got: Tensor | None, right: Tensor, norm: float) -> float:
    """|got - right|, Euclidean for norm 2, the largest error for norm inf; infinite for NaN, another shape and None."""
    if got is None or got.shape != right.shape:
        return math.inf
    apart = float(torch.linalg.vector_norm(got.detach().double() - right.detach(), norm))
    return math.inf if math.isnan(apart) else apart


def distances(got: Named, right: Named, norm: float) -> dict[str, float]:
    return {name: distance(got.get(name), value, norm) for name, value in right.items()}


def judge(errors: dict[str, float], yardstick: Mapping[str, float], slack: Mapping[str, float]) -> Verdict:
    """Holds errors by name to the rule."""
    shares = {}
    for name, error in errors.items():
        limit = 2 * yardstick[name] + slack[name]
        shares[name] = error / limit if limit > 0 else 0.0 if error == 0 else math.inf
    worst = max(shares, key=lambda name: shares[name])
    return Verdict(shares[worst] <= 1, errors, shares[worst], worst)
