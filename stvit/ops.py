"""The ops behind the kernels, registered with torch.library: schemas, fake kernels, autograd and autocast.

Every backend with kernels of its own implements the same ops, told apart by their last argument, so autograd, fake
kernels and tests are written once. The reference needs no op: autograd and torch.compile see through plain PyTorch.

The backward of the detached mode (``association_grad=False``) saves the weights and the mass of the association,
9 numbers a pixel, and not x. An op's backward is an op too, so torch.compile and fake tensors know it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import extension
from .geometry import accumulator, grid_size, is_channels_last, memory_format

SCHEMAS = {
    "sampling": (
        "(Tensor x, int h, int w, int n_iter, float scale, bool association_grad, str backend)"
        " -> (Tensor stokens, Tensor weights, Tensor mass, Tensor pooled)"
    ),
    "sampling_backward": (
        "(Tensor grad_stokens, Tensor weights, Tensor mass, int h, int w, bool channels_last, str backend)"
        " -> Tensor grad_x"
    ),
    "sampling_backward_full": (
        "(Tensor? grad_stokens, Tensor? grad_weights, Tensor x, Tensor stokens, Tensor pooled, Tensor weights,"
        " Tensor mass, int h, int w, int n_iter, float scale, str backend) -> Tensor grad_x"
    ),
    "upsampling": (
        "(Tensor stokens, Tensor weights, Tensor? residual, int h, int w, bool channels_last, str backend) -> Tensor y"
    ),
    "upsampling_backward": (
        "(Tensor grad_y, Tensor weights, int h, int w, bool channels_last, str backend) -> Tensor grad_stokens"
    ),
    "upsampling_backward_full": (
        "(Tensor grad_y, Tensor stokens, Tensor weights, int h, int w, str backend)"
        " -> (Tensor grad_stokens, Tensor grad_weights)"
    ),
}
KERNELS = {"triton": "stvit.kernels"}


@functools.cache
def kernels(backend: str, op: str) -> Any:
    """What holds a backend's kernels for an op and its backward: a module, or torch.ops.stvit_cuda."""
    if backend == "cuda":
        extension.load()
        return torch.ops.stvit_cuda
    return importlib.import_module(f"{KERNELS[backend]}.{op}")


def _refuse_second(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("kernels of stvit have no second derivative: use backend='reference' for a double backward")


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines the op stvit::name for every device; backends are told apart by its last argument.

    The gradient of a backward is an error, not a result that leaves the op out.
    """
    torch.library.define(f"stvit::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"stvit::{name}", "default", implementation)
    torch.library.register_fake(f"stvit::{name}", fake)
    if "backward" in name:
        torch.library.register_autograd(f"stvit::{name}", _refuse_second)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on for x's device, else x's own; float64 stays, as with torch's own ops."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for."""
    return x.to(autocast_dtype(x))


def empty_pixels(
    like: Tensor, channels: int, height: int, width: int, channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised (B, channels, height, width) tensor in the memory format and dtype (of `like`) asked for."""
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last))


def empty_weights(x: Tensor) -> Tensor:
    """Uninitialised weights (B, 9, H, W) for pixels x, with memory (B, H, W, 9)."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[3], 9)).permute(0, 3, 1, 2)


def by_pixel(weights: Tensor) -> Tensor:
    """Weights (B, 9, H, W) with memory (B, H, W, 9), copied only where someone else made them otherwise.

    Hooks of saved tensors do too: torch.autograd.graph.save_on_cpu(pin_memory=True) forgets strides.
    """
    return weights.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _sampling(
    x: Tensor, h: int, w: int, n_iter: int, scale: float, association_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels(backend, "sampling").sampling(x, h, w, n_iter, scale)


def _sampling_fake(
    x: Tensor, h: int, w: int, n_iter: int, scale: float, association_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gh, gw = grid_size(x.shape[2], x.shape[3], (h, w))
    stokens = empty_pixels(x, x.shape[1], gh, gw, is_channels_last(x))
    mass = x.new_empty((x.shape[0], 1, gh, gw), dtype=accumulator(x.dtype))
    return stokens, empty_weights(x), mass, x.new_empty((x.shape[0], gh, gw, x.shape[1]))


def _sampling_backward(
    grad_stokens: Tensor, weights: Tensor, mass: Tensor, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    return kernels(backend, "sampling").sampling_backward(grad_stokens, weights, mass, h, w, channels_last)


def _sampling_backward_fake(
    grad_stokens: Tensor, weights: Tensor, mass: Tensor, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    return empty_pixels(grad_stokens, grad_stokens.shape[1], weights.shape[2], weights.shape[3], channels_last)


def _sampling_backward_full(
    grad_stokens: Tensor | None, grad_weights: Tensor | None, x: Tensor, stokens: Tensor, pooled: Tensor,
    weights: Tensor, mass: Tensor, h: int, w: int, n_iter: int, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    return kernels(backend, "sampling").sampling_backward_full(
        grad_stokens, grad_weights, x, stokens, pooled, weights, mass, h, w, n_iter, scale
    )


def _sampling_backward_full_fake(
    grad_stokens: Tensor | None, grad_weights: Tensor | None, x: Tensor, stokens: Tensor, pooled: Tensor,
    weights: Tensor, mass: Tensor, h: int, w: int, n_iter: int, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    return empty_pixels(x, x.shape[1], x.shape[2], x.shape[3], is_channels_last(x))


def _upsampling(
    stokens: Tensor, weights: Tensor, residual: Tensor | None, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    return kernels(backend, "upsampling").upsampling(stokens, weights, h, w, channels_last, residual)


def _upsampling_fake(
    stokens: Tensor, weights: Tensor, residual: Tensor | None, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    dtype = stokens.dtype if residual is None else torch.promote_types(stokens.dtype, residual.dtype)
    return empty_pixels(stokens, stokens.shape[1], weights.shape[2], weights.shape[3], channels_last, dtype)


def _upsampling_backward(grad_y: Tensor, weights: Tensor, h: int, w: int, channels_last: bool, backend: str) -> Tensor:
    return kernels(backend, "upsampling").upsampling_backward(grad_y, weights, h, w, channels_last)


def _upsampling_backward_fake(
    grad_y: Tensor, weights: Tensor, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    return empty_pixels(grad_y, grad_y.shape[1], *grid_size(grad_y.shape[2], grad_y.shape[3], (h, w)), channels_last)


def _upsampling_backward_full(
    grad_y: Tensor, stokens: Tensor, weights: Tensor, h: int, w: int, backend: str
) -> tuple[Tensor, Tensor]:
    return kernels(backend, "upsampling").upsampling_backward_full(grad_y, stokens, weights, h, w)


def _upsampling_backward_full_fake(
    grad_y: Tensor, stokens: Tensor, weights: Tensor, h: int, w: int, backend: str
) -> tuple[Tensor, Tensor]:
    _, channels, gh, gw = stokens.shape
    return empty_pixels(stokens, channels, gh, gw, is_channels_last(stokens)), empty_weights(grad_y)


def _sampling_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *ctx.geometry, association_grad, ctx.backend = inputs
    stokens, weights, mass, pooled = output
    ctx.channels_last = is_channels_last(x)
    ctx.set_materialize_grads(False)
    if association_grad:
        ctx.mark_non_differentiable(mass, pooled)
        ctx.save_for_backward(weights, mass, x, stokens, pooled)
    else:
        ctx.mark_non_differentiable(weights, mass, pooled)
        ctx.save_for_backward(weights, mass)


def _sampling_autograd(ctx: Any, grad_stokens: Tensor | None, grad_weights: Tensor | None, *_: None) -> Any:
    weights, mass, *full = ctx.saved_tensors
    h, w, n_iter, scale = ctx.geometry
    grad = None
    if full and (grad_stokens is not None or grad_weights is not None):
        grad = torch.ops.stvit.sampling_backward_full(
            grad_stokens, grad_weights, *full, weights, mass, h, w, n_iter, scale, ctx.backend
        )
    elif grad_stokens is not None:
        grad = torch.ops.stvit.sampling_backward(grad_stokens, weights, mass, h, w, ctx.channels_last, ctx.backend)
    return (grad, *[None] * 6)


def _upsampling_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    stokens, weights, residual, ctx.h, ctx.w, _, ctx.backend = inputs
    ctx.channels_last = is_channels_last(stokens)
    ctx.dtype, ctx.residual_dtype = stokens.dtype, None if residual is None else residual.dtype
    ctx.full = ctx.needs_input_grad[1]
    ctx.save_for_backward(*((weights, stokens) if ctx.full else (weights,)))


def _upsampling_autograd(ctx: Any, grad: Tensor) -> Any:
    weights, *full = ctx.saved_tensors
    grad_y, grad_weights = grad.to(ctx.dtype), None
    if full:
        grad_stokens, grad_weights = torch.ops.stvit.upsampling_backward_full(
            grad_y, full[0], weights, ctx.h, ctx.w, ctx.backend
        )
    else:
        grad_stokens = torch.ops.stvit.upsampling_backward(
            grad_y, weights, ctx.h, ctx.w, ctx.channels_last, ctx.backend
        )
    grad_residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return grad_stokens, grad_weights, grad_residual, None, None, None, None


for _name, _schema in SCHEMAS.items():
    register(_name, _schema, globals()[f"_{_name}"], globals()[f"_{_name}_fake"])
torch.library.register_autograd("stvit::sampling", _sampling_autograd, setup_context=_sampling_setup)
torch.library.register_autograd("stvit::upsampling", _upsampling_autograd, setup_context=_upsampling_setup)
