"""Residual depthwise convolution as an op, GELU in front or not. Saved for the backward: x, before GELU."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..tensors import empty_like_pixels
from . import registry
from .registry import BLOCK_OPS, ops, register


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, x_bias: Tensor | None, backend: str) -> Tensor:
    """h + depthwise3x3(h) + bias (B, C, H, W) with h = gelu(x + x_bias) or x + x_bias; weight (C, 1, 3, 3), biases
    (C,)."""
    return registry.kernels(backend, "residual_depthwise").residual_depthwise(x, weight, bias, gelu, x_bias)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return empty_like_pixels(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.gelu, x_bias, ctx.backend = inputs
    ctx.save_for_backward(x, weight, x_bias)


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    x, weight, x_bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_x_bias = ops.residual_depthwise_backward(
        grad_y, x, weight, ctx.gelu, x_bias, ctx.backend
    )
    wanted = ctx.needs_input_grad
    return grad_x, grad_weight, grad_bias if wanted[2] else None, None, grad_x_bias if wanted[4] else None, None


def _flops(x: Any, *_: Any, **__: Any) -> int:
    return 2 * 9 * math.prod(x)


register(BLOCK_OPS, "residual_depthwise", _run, _fake, _setup, _backward, _flops)


def _run_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool, x_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, of weight (C, 1, 3, 3), of bias (C,) and of x_bias (C,), or an empty tensor without it."""
    kernels = registry.kernels(backend, "residual_depthwise")
    *grads, grad_x_bias = kernels.residual_depthwise_backward(grad_y, x, weight, gelu, x_bias)
    return (*grads, weight.new_empty(0) if grad_x_bias is None else grad_x_bias)


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool, x_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    grad_x_bias = weight.new_empty(0) if x_bias is None else torch.empty_like(x_bias)
    return empty_like_pixels(x), weight.new_empty((channels, 1, 3, 3)), weight.new_empty((channels,)), grad_x_bias


def _flops_backward(grad_y: Any, *_: Any, **__: Any) -> int:
    """Of x and of weight; PyTorch's own figure for a depthwise weight is C times too large."""
    return 2 * _flops(grad_y)


register(BLOCK_OPS, "residual_depthwise_backward", _run_backward, _fake_backward, flops=_flops_backward)
