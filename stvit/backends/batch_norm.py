"""BatchNorm's statistics as an op, and its gradient together with that of the skip connection behind it.

Saved for the backward: x, and two numbers a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import accumulator, empty_like_pixels
from . import registry
from .registry import BLOCK_OPS, ops, register


def _run_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """(mean, rstd), (C,), of pixels x (B, C, H, W); brings the running statistics (C,) up to date."""
    return registry.kernels(backend, "batch_norm").batch_norm_statistics(x, running_mean, running_var, momentum, eps)


def _fake_statistics(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=accumulator(x.dtype))
    return mean, torch.empty_like(mean)


register(
    BLOCK_OPS,
    "batch_norm_statistics",
    _run_statistics,
    _fake_statistics,
    changes=("running_mean", "running_var"),
)


def _run_backward(
    grad_y: Tensor,
    skip: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (B, C, H, W), weight and bias (C,); mean and rstd (C,) are the batch's, `skip` is the gradient
    of another use of x, added to the first. With `sums` (2, C), over pixels of dy x and dy, `grad_y` is rstd weight
    dy."""
    return registry.kernels(backend, "batch_norm").batch_norm_backward(grad_y, skip, x, weight, mean, rstd, sums)


def _fake_backward(
    grad_y: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_pixels(x), torch.empty_like(weight), torch.empty_like(weight)


register(BLOCK_OPS, "batch_norm_backward", _run_backward, _fake_backward)


class BatchNormAndSkip(torch.autograd.Function):
    """(y, x), y being the BatchNorm of x that was computed with this mean and rstd: the gradient of the x that is given
    back is added inside the norm's backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.backend = backend
        return y.view_as(y), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, skip: Tensor) -> Any:  # type: ignore[override]
        grads = ops.batch_norm_backward(grad_y, skip, *ctx.saved_tensors, None, ctx.backend)
        return (*grads, None, None, None, None)
