"""The ops of the rest of the block: residual depthwise, LayerNorm over channels, the end of a branch.

Registered as the super token ops are (ops.py). Saved for the backward: residual depthwise x (before GELU); LayerNorm x
and two numbers a pixel; the branch end y, and only where LayerScale wants a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .geometry import accumulator, is_channels_last
from .ops import empty_pixels, kernels, register

SCHEMAS = {
    "residual_depthwise": "(Tensor x, Tensor weight, Tensor? bias, bool gelu, str backend) -> Tensor y",
    "residual_depthwise_backward": (
        "(Tensor grad_y, Tensor x, Tensor weight, bool gelu, str backend)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
    "channel_layer_norm": (
        "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype, str backend)"
        " -> (Tensor y, Tensor mean, Tensor rstd)"
    ),
    "channel_layer_norm_backward": (
        "(Tensor grad_y, Tensor? skip, Tensor x, Tensor weight, Tensor mean, Tensor rstd, str backend)"
        " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
    ),
    "residual_branch": "(Tensor x, Tensor y, Tensor? gamma, Tensor? keep, str backend) -> Tensor out",
    "residual_branch_backward": (
        "(Tensor grad, Tensor? y, Tensor? gamma, Tensor? keep, ScalarType dtype, str backend)"
        " -> (Tensor grad_y, Tensor grad_gamma)"
    ),
}


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return empty_pixels(x, x.shape[1], x.shape[2], x.shape[3], is_channels_last(x), dtype)


def branch_dtype(x: Tensor, y: Tensor, gamma: Tensor | None) -> torch.dtype:
    """The dtype of x + gamma * y by PyTorch's promotion: a float32 LayerScale makes the residual stream float32."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


def _residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, backend: str) -> Tensor:
    return kernels(backend, "residual_depthwise").residual_depthwise(x, weight, bias, gelu)


def _residual_depthwise_fake(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, backend: str) -> Tensor:
    return _like(x)


def _residual_depthwise_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(backend, "residual_depthwise").residual_depthwise_backward(grad_y, x, weight, gelu)


def _residual_depthwise_backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), weight.new_empty((x.shape[1], 1, 3, 3)), weight.new_empty((x.shape[1],))


def _residual_depthwise_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.gelu, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _residual_depthwise_autograd(ctx: Any, grad_y: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    grads = torch.ops.stvit.residual_depthwise_backward(grad_y, x, weight, ctx.gelu, ctx.backend)
    return (grads[0], grads[1], grads[2] if ctx.needs_input_grad[2] else None, None, None)


def _channel_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(backend, "channel_layer_norm").channel_layer_norm(x, weight, bias, eps, dtype)


def _channel_layer_norm_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], x.shape[2], x.shape[3]), dtype=accumulator(x.dtype))
    return _like(x, dtype), mean, torch.empty_like(mean)


def _channel_layer_norm_backward(
    grad_y: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels(backend, "channel_layer_norm").channel_layer_norm_backward(grad_y, skip, x, weight, mean, rstd)


def _channel_layer_norm_backward_fake(
    grad_y: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), weight.new_empty((x.shape[1],)), weight.new_empty((x.shape[1],))


def _channel_layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _channel_layer_norm_autograd(ctx: Any, grad_y: Tensor, *_: Tensor) -> Any:
    grads = torch.ops.stvit.channel_layer_norm_backward(grad_y, None, *ctx.saved_tensors, ctx.backend)
    return (*grads, None, None, None)


class NormAndSkip(torch.autograd.Function):
    """(channel_layer_norm(x), x): the gradient of the x that is given back is added inside the norm's backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, Tensor]:
        y, mean, rstd = torch.ops.stvit.channel_layer_norm(x, weight, bias, eps, dtype, backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.backend = backend
        return y, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, skip: Tensor) -> Any:  # type: ignore[override]
        grads = torch.ops.stvit.channel_layer_norm_backward(grad_y, skip, *ctx.saved_tensors, ctx.backend)
        return (*grads, None, None, None)


def _residual_branch(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, backend: str) -> Tensor:
    return kernels(backend, "residual_branch").residual_branch(x, y, gamma, keep, branch_dtype(x, y, gamma))


def _residual_branch_fake(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, backend: str) -> Tensor:
    return _like(x, branch_dtype(x, y, gamma))


def _residual_branch_backward(
    grad: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    grads = kernels(backend, "residual_branch").residual_branch_backward(grad, y, gamma, keep, dtype)
    return grads[0], grad.new_empty(0) if grads[1] is None else grads[1]


def _residual_branch_backward_fake(
    grad: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return _like(grad, dtype), grad.new_empty(0) if gamma is None else torch.empty_like(gamma)


def _residual_branch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, gamma, keep, ctx.backend = inputs
    ctx.dtypes = x.dtype, y.dtype
    ctx.save_for_backward(None if gamma is None else y, gamma, keep)


def _residual_branch_autograd(ctx: Any, grad: Tensor) -> Any:
    y, gamma, keep = ctx.saved_tensors
    x_dtype, y_dtype = ctx.dtypes
    grad_y, grad_gamma = torch.ops.stvit.residual_branch_backward(grad, y, gamma, keep, y_dtype, ctx.backend)
    return grad.to(x_dtype), grad_y, None if gamma is None else grad_gamma, None, None


for _name, _schema in SCHEMAS.items():
    register(_name, _schema, globals()[f"_{_name}"], globals()[f"_{_name}_fake"])
for _name in ("residual_depthwise", "channel_layer_norm", "residual_branch"):
    torch.library.register_autograd(
        f"stvit::{_name}", globals()[f"_{_name}_autograd"], setup_context=globals()[f"_{_name}_setup"]
    )
