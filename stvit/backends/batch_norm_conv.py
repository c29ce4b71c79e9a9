"""BatchNorm folded, for every batch, into the 1x1 convolution behind it: the norm's output is never written.

The product takes x itself and a weight that kernels scale (kernels/batch_norm_conv.py); both gradients of products are
PyTorch's, that of the weight in float32, whose share of the mean has to cancel. Saved for the backward: x, the scaled
weight, and two numbers a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors import is_channels_last, laid_out
from . import registry
from .registry import BLOCK_OPS, ops, register


def _run(
    conv: Tensor,
    conv_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(W' (K, C) and b' (K,) in `dtype`, what rounding left of b' (K,)) for a convolution's weight (K, C) and bias (K,)
    behind a norm with weight, bias, mean and rstd (C,)."""
    kernels = registry.kernels(backend, "batch_norm_conv")
    return kernels.batch_norm_conv(conv, conv_bias, weight, bias, mean, rstd, dtype)


def _fake(
    conv: Tensor,
    conv_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = conv.shape[0]
    folded, near = conv.new_empty(conv.shape, dtype=dtype), conv.new_empty(outputs, dtype=dtype)
    return folded, near, mean.new_empty(outputs)


register(BLOCK_OPS, "batch_norm_conv", _run, _fake)


def _run_backward(
    grad_folded: Tensor,
    grad_shift: Tensor,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dW (K, C), sums (2, C) over pixels of dy x and dy), of the gradients of W' (K, C) and b' (K,); dy is that of the
    norm's output."""
    kernels = registry.kernels(backend, "batch_norm_conv")
    return kernels.batch_norm_conv_backward(grad_folded, grad_shift, conv, weight, bias, mean, rstd)


def _fake_backward(
    grad_folded: Tensor, grad_shift: Tensor, conv: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return conv.new_empty(conv.shape), mean.new_empty((2, *mean.shape))


register(BLOCK_OPS, "batch_norm_conv_backward", _run_backward, _fake_backward)


def _rows(x: Tensor) -> Tensor:
    """Pixels (B, C, H, W) in channels_last as a matrix (B H W, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _pixels(rows: Tensor, like: Tensor) -> Tensor:
    """A matrix (B H W, K) as pixels (B, K, H, W) in channels_last, a view."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and answered in float32; PyTorch has that for CUDA alone."""
    if a.device.type == "cuda" and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


class BatchNormConvAndSkip(torch.autograd.Function):
    """(y, rest, x): y (B, K, H, W) is the convolution of the norm of x (B, C, H, W), but for `rest` (K,), which the
    reader of y adds. The gradient of `rest` stands for that of the whole bias; that of the x given back is added to the
    norm's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        conv: Tensor,
        conv_bias: Tensor,
        mean: Tensor,
        rstd: Tensor,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = conv.flatten(1)
        folded, near, rest = ops.batch_norm_conv(matrix, conv_bias, weight, bias, mean, rstd, x.dtype, backend)
        ctx.save_for_backward(x, weight, bias, conv, folded, mean, rstd)
        ctx.bias_dtype, ctx.backend = conv_bias.dtype, backend
        return _pixels(torch.addmm(near, _rows(x), folded.t()), x), rest, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_shift: Tensor, skip: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, conv, folded, mean, rstd = ctx.saved_tensors
        grad = _rows(laid_out(grad_y, is_channels_last(x)))
        grad_folded = _product_in_float32(grad.t(), _rows(x))
        grad_conv, sums = ops.batch_norm_conv_backward(
            grad_folded, grad_shift, conv.flatten(1), weight, bias, mean, rstd, ctx.backend
        )
        grad_x, grad_weight, grad_bias = ops.batch_norm_backward(
            _pixels(grad @ folded, x), skip, x, weight, mean, rstd, sums, ctx.backend
        )
        grads = grad_x, grad_weight, grad_bias, grad_conv.view_as(conv), grad_shift.to(ctx.bias_dtype)
        return (*grads, None, None, None)
