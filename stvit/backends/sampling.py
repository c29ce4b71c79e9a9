"""Super token sampling as an op, with its backward in both gradient modes.

The backward of the detached mode (``association_grad=False``) saves the weights and the mass of the association,
9 numbers a pixel, and not x.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..geometry import grid_size, product_flops
from ..tensors import accumulator, empty_like_pixels, empty_pixels, empty_weights, is_channels_last
from . import registry
from .registry import SUPER_TOKEN_OPS, ops, register


def _run(
    x: Tensor, h: int, w: int, n_iter: int, scale: float, association_grad: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stokens (B, C, gh, gw), weights (B, 9, H, W), mass (B, 1, gh, gw), pooled (B, gh, gw, C)) of x (B, C, H, W)."""
    return registry.kernels(backend, "sampling").sampling(x, h, w, n_iter, scale)


def _fake(x: Tensor, h: int, w: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gh, gw = grid_size(x.shape[2], x.shape[3], (h, w))
    stokens = empty_pixels(x, x.shape[1], gh, gw, is_channels_last(x))
    mass = x.new_empty((x.shape[0], 1, gh, gw), dtype=accumulator(x.dtype))
    return stokens, empty_weights(x), mass, x.new_empty((x.shape[0], gh, gw, x.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
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


def _backward(ctx: Any, grad_stokens: Tensor | None, grad_weights: Tensor | None, *_: None) -> Any:
    weights, mass, *full = ctx.saved_tensors
    h, w, n_iter, scale = ctx.geometry
    grad = None
    if full and (grad_stokens is not None or grad_weights is not None):
        grad = ops.sampling_backward_full(
            grad_stokens, grad_weights, *full, weights, mass, h, w, n_iter, scale, ctx.backend
        )
    elif grad_stokens is not None:
        grad = ops.sampling_backward(grad_stokens, weights, mass, h, w, ctx.channels_last, ctx.backend)
    return (grad, *[None] * 6)


def _flops(x: Any, h: int, w: int, n_iter: int, *_: Any, **__: Any) -> int:
    """Logits and sums of each round."""
    return 2 * n_iter * product_flops(x[0], x[1], x[2:], (h, w))


register(SUPER_TOKEN_OPS, "sampling", _run, _fake, _setup, _backward, _flops)


def _run_backward(
    grad_stokens: Tensor, weights: Tensor, mass: Tensor, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    """The gradient (B, C, H, W) of x, the association held constant."""
    return registry.kernels(backend, "sampling").sampling_backward(grad_stokens, weights, mass, h, w, channels_last)


def _fake_backward(
    grad_stokens: Tensor, weights: Tensor, mass: Tensor, h: int, w: int, channels_last: bool, backend: str
) -> Tensor:
    return empty_pixels(grad_stokens, grad_stokens.shape[1], weights.shape[2], weights.shape[3], channels_last)


def _flops_backward(grad_stokens: Any, weights: Any, mass: Any, h: int, w: int, *_: Any, **__: Any) -> int:
    return product_flops(weights[0], grad_stokens[1], weights[2:], (h, w))


register(SUPER_TOKEN_OPS, "sampling_backward", _run_backward, _fake_backward, flops=_flops_backward)


def _run_backward_full(
    grad_stokens: Tensor | None, grad_weights: Tensor | None, x: Tensor, stokens: Tensor, pooled: Tensor,
    weights: Tensor, mass: Tensor, h: int, w: int, n_iter: int, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    """The gradient (B, C, H, W) of x through every round of association and sampling, and the pooling."""
    return registry.kernels(backend, "sampling").sampling_backward_full(
        grad_stokens, grad_weights, x, stokens, pooled, weights, mass, h, w, n_iter, scale
    )


def _fake_backward_full(grad_stokens: Tensor | None, grad_weights: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return empty_like_pixels(x)


def _flops_backward_full(
    grad_stokens: Any, grad_weights: Any, x: Any, stokens: Any, pooled: Any, weights: Any, mass: Any,
    h: int, w: int, n_iter: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Two products for each of the forward, but for the last sums where only the association has a gradient."""
    products = 4 * n_iter - (2 if grad_stokens is None else 0)
    return products * product_flops(x[0], x[1], x[2:], (h, w))


register(SUPER_TOKEN_OPS, "sampling_backward_full", _run_backward_full, _fake_backward_full, flops=_flops_backward_full)
