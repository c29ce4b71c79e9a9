"""LayerNorm over channels as an op, alone or with the skip connection behind it.

Saved for the backward: x and two numbers a pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import accumulator, empty_like_pixels
from . import registry
from .registry import BLOCK_OPS, ops, register


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (B, C, H, W) in `dtype`, mean (B, H, W), rstd (B, H, W)) of x; weight and bias (C,)."""
    return registry.kernels(backend, "channel_layer_norm").channel_layer_norm(x, weight, bias, eps, dtype)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[2], x.shape[3]), dtype=accumulator(x.dtype))
    return empty_like_pixels(x, dtype), mean, torch.empty_like(mean)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> Any:
    grads = ops.channel_layer_norm_backward(grad_y, None, *ctx.saved_tensors, ctx.backend)
    return (*grads, None, None, None)


register(BLOCK_OPS, "channel_layer_norm", _run, _fake, _setup, _backward)


def _run_backward(
    grad_y: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; `skip` is the gradient of another use of x, added to the first."""
    return registry.kernels(backend, "channel_layer_norm").channel_layer_norm_backward(
        grad_y, skip, x, weight, mean, rstd
    )


def _fake_backward(
    grad_y: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_pixels(x), weight.new_empty((x.shape[1],)), weight.new_empty((x.shape[1],))


register(BLOCK_OPS, "channel_layer_norm_backward", _run_backward, _fake_backward)


class NormAndSkip(torch.autograd.Function):
    """(channel_layer_norm(x), x): the gradient of the x that is given back is added inside the norm's backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = ops.channel_layer_norm(x, weight, bias, eps, dtype, backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.backend = backend
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, skip: Tensor) -> Any:  # type: ignore[override]
        grads = ops.channel_layer_norm_backward(grad_y, skip, *ctx.saved_tensors, ctx.backend)
        return (*grads, None, None, None)
