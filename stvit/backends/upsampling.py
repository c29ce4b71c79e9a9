"""Token upsampling as an op, with its backward in both gradient modes.

The backward saves the weights of the association, and the super tokens only where the weights want a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import grid_size, product_flops
from ..tensors import empty_like_pixels, empty_pixels, empty_weights, is_channels_last
from . import registry
from .registry import SUPER_TOKEN_OPS, ops, register


def _run(
    stokens: Tensor, weights: Tensor, residual: Tensor | None, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    """Pixels (B, C, H, W) from stokens (B, C, gh, gw) and weights (B, 9, H, W), plus the residual (B, C, H, W)."""
    return registry.kernels(backend, "upsampling").upsampling(stokens, weights, h, w, channels_last, residual)


def _fake(
    stokens: Tensor, weights: Tensor, residual: Tensor | None, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    dtype = stokens.dtype if residual is None else torch.promote_types(stokens.dtype, residual.dtype)
    return empty_pixels(stokens, stokens.shape[1], weights.shape[2], weights.shape[3], channels_last, dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    stokens, weights, residual, ctx.h, ctx.w, _, ctx.backend = inputs
    ctx.channels_last = is_channels_last(stokens)
    ctx.dtype, ctx.residual_dtype = stokens.dtype, None if residual is None else residual.dtype
    ctx.full = ctx.needs_input_grad[1]
    ctx.save_for_backward(*((weights, stokens) if ctx.full else (weights,)))


def _backward(ctx: Any, grad: Tensor) -> Any:
    weights, *full = ctx.saved_tensors
    grad_y, grad_weights = grad.to(ctx.dtype), None
    if full:
        grad_stokens, grad_weights = ops.upsampling_backward_full(grad_y, full[0], weights, ctx.h, ctx.w, ctx.backend)
    else:
        grad_stokens = ops.upsampling_backward(grad_y, weights, ctx.h, ctx.w, ctx.channels_last, ctx.backend)
    grad_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return grad_stokens, grad_weights, grad_residual, None, None, None, None


def _flops(stokens: Any, weights: Any, residual: Any, h: int, w: int, *_: Any, **__: Any) -> int:
    return product_flops(weights[0], stokens[1], weights[2:], (h, w))


register(SUPER_TOKEN_OPS, "upsampling", _run, _fake, _setup, _backward, _flops)


def _run_backward(grad_y: Tensor, weights: Tensor, h: int, w: int, channels_last: bool, backend: str) -> Tensor:
    """The gradient (B, C, gh, gw) of the super tokens."""
    return registry.kernels(backend, "upsampling").upsampling_backward(grad_y, weights, h, w, channels_last)


def _fake_backward(grad_y: Tensor, weights: Tensor, h: int, w: int, channels_last: bool, backend: str) -> Tensor:
    return empty_pixels(grad_y, grad_y.shape[1], *grid_size(grad_y.shape[2], grad_y.shape[3], (h, w)), channels_last)


def _flops_backward(grad_y: Any, weights: Any, h: int, w: int, *_: Any, **__: Any) -> int:
    return product_flops(weights[0], grad_y[1], weights[2:], (h, w))


register(SUPER_TOKEN_OPS, "upsampling_backward", _run_backward, _fake_backward, flops=_flops_backward)


def _run_backward_full(
    grad_y: Tensor, stokens: Tensor, weights: Tensor, h: int, w: int, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients (B, C, gh, gw) of the super tokens and (B, 9, H, W) of the weights."""
    return registry.kernels(backend, "upsampling").upsampling_backward_full(grad_y, stokens, weights, h, w)


def _fake_backward_full(grad_y: Tensor, stokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_like_pixels(stokens), empty_weights(grad_y)


def _flops_backward_full(grad_y: Any, stokens: Any, weights: Any, h: int, w: int, *_: Any, **__: Any) -> int:
    return 2 * product_flops(weights[0], grad_y[1], weights[2:], (h, w))


register(
    SUPER_TOKEN_OPS, "upsampling_backward_full", _run_backward_full, _fake_backward_full, flops=_flops_backward_full
)
