"""Sorts of work by which bytes (bench.traffic) and time (bench.training --profile) are added up."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

CATEGORIES = (
    "super token ops", "depthwise", "1x1 products", "other convolutions", "attention", "norms", "pointwise", "copies",
    "optimiser", "other",
)  # fmt: skip

# Regular expression over an operator's name without its namespace -> category; the first that matches counts.
OPS = [
    (r"^(up)?sampling|super_token", "super token ops"),
    (r"depthwise", "depthwise"),
    (r"batch_norm|layer_norm", "norms"),
    (r"attention|^_softmax|^b(addb)?mm$", "attention"),
    (r"^(mm|addmm|linear)$", "1x1 products"),
    (r"^(clone|_to_copy|copy_|cat|stack|contiguous|constant_pad_nd|(slice|select)_backward|fill_|zero_)$", "copies"),
]
COMPILED = [(re.compile(pattern), category) for pattern, category in OPS]


def of_module(module: nn.Module) -> str | None:
    """The category that a module, of ours or the authors', gives to operators within it; None where it gives none."""
    if hasattr(module, "qkv"):
        return "attention"
    return "super token ops" if tuple(getattr(module, "stoken_size", (1, 1))) != (1, 1) else None


def is_convolution(op: str) -> bool:
    return "conv" in op


def of_op(op: str, weight: Sequence[int] | None = None) -> str | None:
    """The category of an operator by its name, of a convolution by its weight (out, in / groups, kh, kw) as well; None
    where neither tells."""
    op = op.rpartition("::")[2]
    if is_convolution(op) and weight is not None and len(weight) == 4:
        if weight[1] == 1 < weight[0]:
            return "depthwise"
        return "1x1 products" if max(weight[2:]) == 1 else "other convolutions"
    return next((category for pattern, category in COMPILED if pattern.search(op)), None)
