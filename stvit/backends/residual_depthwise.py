"""Residual depthwise convolution as an op, GELU in front or not. Saved for the backward: x, before GELU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import empty_like_pixels
from . import registry
from .registry import BLOCK_OPS, register


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, backend: str) -> Tensor:
    """h + depthwise3x3(h) + bias (B, C, H, W) with h = gelu(x) or x; weight (C, 1, 3, 3), bias (C,)."""
    return registry.kernels(backend, "residual_depthwise").residual_depthwise(x, weight, bias, gelu)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return empty_like_pixels(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.gelu, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    grads = torch.ops.stvit.residual_depthwise_backward(grad_y, x, weight, ctx.gelu, ctx.backend)
    return (grads[0], grads[1], grads[2] if ctx.needs_input_grad[2] else None, None, None)


register(BLOCK_OPS, "residual_depthwise", _run, _fake, _setup, _backward)


def _run_backward(grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of weight (C, 1, 3, 3) and of bias (C,)."""
    return registry.kernels(backend, "residual_depthwise").residual_depthwise_backward(grad_y, x, weight, gelu)


def _fake_backward(grad_y: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_pixels(x), weight.new_empty((x.shape[1], 1, 3, 3)), weight.new_empty((x.shape[1],))


register(BLOCK_OPS, "residual_depthwise_backward", _run_backward, _fake_backward)
