"""The end of a branch as an op: x + keep * gamma * (y + bias). Saved for the backward: y, and only where LayerScale
wants a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import empty_like_pixels
from . import registry
from .registry import BLOCK_OPS, ops, register


def branch_dtype(x: Tensor, y: Tensor, gamma: Tensor | None) -> torch.dtype:
    """The dtype of x + gamma * y by PyTorch's promotion: a float32 LayerScale makes the residual stream float32."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


def _run(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, bias: Tensor | None, backend: str) -> Tensor:
    """x + keep * gamma * (y + bias) (B, C, H, W); gamma and bias (C,), keep (B,)."""
    kernels = registry.kernels(backend, "residual_branch")
    return kernels.residual_branch(x, y, gamma, keep, bias, branch_dtype(x, y, gamma))


def _fake(x: Tensor, y: Tensor, gamma: Tensor | None, *_: Any) -> Tensor:
    return empty_like_pixels(x, branch_dtype(x, y, gamma))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, gamma, keep, bias, ctx.backend = inputs
    ctx.dtypes = x.dtype, y.dtype
    ctx.save_for_backward(None if gamma is None else y, gamma, keep, bias)


def _backward(ctx: Any, grad: Tensor) -> Any:
    y, gamma, keep, bias = ctx.saved_tensors
    x_dtype, y_dtype = ctx.dtypes
    grad_y, grad_gamma, grad_bias = ops.residual_branch_backward(grad, y, gamma, keep, bias, y_dtype, ctx.backend)
    if gamma is None and keep is None:
        grad_y = grad.to(y_dtype)
    grads = None if gamma is None else grad_gamma, None, None if bias is None else grad_bias
    return grad.to(x_dtype), grad_y, *grads, None


register(BLOCK_OPS, "residual_branch", _run, _fake, _setup, _backward)


def _run_backward(
    grad: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y in `dtype`, of gamma (C,) and of bias (C,). Empty tensors stand for those of what isn't there,
    and without gamma and keep for that of y, which is `grad` itself."""
    kernels = registry.kernels(backend, "residual_branch")
    grads = kernels.residual_branch_backward(grad, y, gamma, keep, bias, dtype)
    grad_y, grad_gamma, grad_bias = (grad.new_empty(0) if each is None else each for each in grads)
    return grad_y, grad_gamma, grad_bias


def _fake_backward(
    grad: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    same = gamma is None and keep is None and bias is not None
    grad_y = grad.new_empty(0) if same else empty_like_pixels(grad, dtype)
    parameters = (grad.new_empty(0) if each is None else torch.empty_like(each) for each in (gamma, bias))
    return grad_y, *parameters  # type: ignore[return-value]


register(BLOCK_OPS, "residual_branch_backward", _run_backward, _fake_backward)
