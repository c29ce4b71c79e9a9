"""The end of a branch as an op: x + keep * gamma * y. Saved for the backward: y, and only where LayerScale wants a
gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import empty_like_pixels
from . import registry
from .registry import BLOCK_OPS, register


def branch_dtype(x: Tensor, y: Tensor, gamma: Tensor | None) -> torch.dtype:
    """The dtype of x + gamma * y by PyTorch's promotion: a float32 LayerScale makes the residual stream float32."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


def _run(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, backend: str) -> Tensor:
    """x + keep * gamma * y (B, C, H, W); gamma (C,), keep (B,)."""
    return registry.kernels(backend, "residual_branch").residual_branch(x, y, gamma, keep, branch_dtype(x, y, gamma))


def _fake(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, backend: str) -> Tensor:
    return empty_like_pixels(x, branch_dtype(x, y, gamma))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, gamma, keep, ctx.backend = inputs
    ctx.dtypes = x.dtype, y.dtype
    ctx.save_for_backward(None if gamma is None else y, gamma, keep)


def _backward(ctx: Any, grad: Tensor) -> Any:
    y, gamma, keep = ctx.saved_tensors
    x_dtype, y_dtype = ctx.dtypes
    grad_y, grad_gamma = torch.ops.stvit.residual_branch_backward(grad, y, gamma, keep, y_dtype, ctx.backend)
    return grad.to(x_dtype), grad_y, None if gamma is None else grad_gamma, None, None


register(BLOCK_OPS, "residual_branch", _run, _fake, _setup, _backward)


def _run_backward(
    grad: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients of y in `dtype`, and of gamma (C,), or an empty tensor without gamma."""
    grads = registry.kernels(backend, "residual_branch").residual_branch_backward(grad, y, gamma, keep, dtype)
    return grads[0], grad.new_empty(0) if grads[1] is None else grads[1]


def _fake_backward(
    grad: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return empty_like_pixels(grad, dtype), grad.new_empty(0) if gamma is None else torch.empty_like(gamma)


register(BLOCK_OPS, "residual_branch_backward", _run_backward, _fake_backward)
