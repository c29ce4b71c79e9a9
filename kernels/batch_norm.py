"""The backward of BatchNorm with Triton, together with the gradient of a skip connection; its forward is PyTorch's.

Bytes, X being those of x: the sums read 2 X (dy and x); what follows reads 2 X, or 3 X with the skip's gradient, and
writes 1 X. PyTorch moves 5 X, and 3 X more to add that gradient. The sums of a channel, float32, are added up in a
fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import accumulator, empty_pixels, is_channels_last
from . import configs
from .channel_layer_norm import FEWEST, index, rows_at
from .partial_sums import add_parts
from .residual_branch import blocks_of, load_channels

PROGRAMS = 1024  # of the sums at the most: at the end of each they cross its warps, with bank conflicts


@triton.jit(do_not_specialize=["pixels", "count"])
def batch_norm_sums_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    dy, dy_image, dy_channel, dy_row, dy_column,  # (B, C, H, W)
    mean, rstd,  # (C,)
    partial,  # (parts, 2, C)
    pixels, count, H, W, C, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: `count` blocks of ROWS pixels, CHANNELS channels. Sums dy n and dy, n = (x - mean) rstd."""
    blocks = tl.cdiv(C, CHANNELS)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    m, s = load_channels(mean, c, C, ACCUMULATOR), load_channels(rstd, c, C, ACCUMULATOR)
    sum_w = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    sum_b = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    for i in range(0, count):
        r = (part.to(INDEX) * count + i) * ROWS + tl.arange(0, ROWS)
        seen = (r < pixels)[:, None] & (c < C)[None, :]
        at = rows_at(r, H, W, x_image, x_row, x_column)[:, None] + c.to(tl.int64)[None, :] * x_channel
        u = tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR)
        at = rows_at(r, H, W, dy_image, dy_row, dy_column)[:, None] + c.to(tl.int64)[None, :] * dy_channel
        d = tl.load(dy + at, mask=seen, other=0.0).to(ACCUMULATOR)  # zero past the end, whatever n is there
        sum_w += d * ((u - m) * s)
        sum_b += d
    partial += part * 2 * C + c
    tl.store(partial, tl.sum(sum_w, axis=0), mask=c < C)
    tl.store(partial + C, tl.sum(sum_b, axis=0), mask=c < C)


@triton.jit(do_not_specialize=["pixels"])
def batch_norm_backward_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    dy, dy_image, dy_channel, dy_row, dy_column,  # (B, C, H, W)
    skip, skip_image, skip_channel, skip_row, skip_column,  # (B, C, H, W), read if SKIP
    mean, rstd, weight,  # (C,)
    sums,  # (2, C), of dy n and of dy
    dweight, dbias,  # (C,), written: the sums in the dtype of weight
    dx, dx_image, dx_channel, dx_row, dx_column,  # (B, C, H, W), written
    pixels, H, W, C, SKIP: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS pixels, CHANNELS channels. With n = (x - mean) rstd, N pixels,
    dx = rstd weight (dy - (sum of dy + n * sum of dy n) / N), plus the gradient `skip` of another use of x."""
    blocks = tl.cdiv(C, CHANNELS)
    first = tl.program_id(0) // blocks
    r = first.to(INDEX) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    seen = (r < pixels)[:, None] & (c < C)[None, :]
    m, s = load_channels(mean, c, C, ACCUMULATOR), load_channels(rstd, c, C, ACCUMULATOR)
    w = load_channels(weight, c, C, ACCUMULATOR)
    sum_w, sum_b = load_channels(sums, c, C, ACCUMULATOR), load_channels(sums + C, c, C, ACCUMULATOR)
    if first == 0:
        at = c[None, :]
        tl.store(dweight + at, sum_w.to(dweight.dtype.element_ty), mask=at < C)
        tl.store(dbias + at, sum_b.to(dbias.dtype.element_ty), mask=at < C)
    at = rows_at(r, H, W, x_image, x_row, x_column)[:, None] + c.to(tl.int64)[None, :] * x_channel
    n = (tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR) - m) * s
    at = rows_at(r, H, W, dy_image, dy_row, dy_column)[:, None] + c.to(tl.int64)[None, :] * dy_channel
    d = tl.load(dy + at, mask=seen, other=0.0).to(ACCUMULATOR)
    slope = (d - (sum_b + n * sum_w) * (tl.full([], 1.0, ACCUMULATOR) / pixels)) * (s * w)
    if SKIP:
        at = rows_at(r, H, W, skip_image, skip_row, skip_column)[:, None] + c.to(tl.int64)[None, :] * skip_channel
        slope += tl.load(skip + at, mask=seen, other=0.0).to(ACCUMULATOR)
    at = rows_at(r, H, W, dx_image, dx_row, dx_column)[:, None] + c.to(tl.int64)[None, :] * dx_channel
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=seen)


def batch_norm_backward(
    grad_y: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's format, dweight (C,), dbias (C,)); the last two in weight's dtype, summed in float32 or wider.

    `mean` and `rstd` (C,) are the batch's; `skip` is the gradient (B, C, H, W) of another use of x, added to dx.
    """
    batch, channels, height, width = x.shape
    grad_x = empty_pixels(x, channels, height, width, is_channels_last(x))
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    added = grad_y if skip is None else skip
    rows, block = blocks_of(channels)
    pixels, across = batch * height * width, -(-channels // block)
    count = max(1, -(-pixels * across // (rows * PROGRAMS)), FEWEST // rows)
    parts = -(-pixels // (rows * count))
    partial = x.new_empty((parts, 2, channels), dtype=accumulator(x.dtype))
    sums = partial.new_empty((2, channels))
    shared = {
        "ACCUMULATOR": configs.accumulator(x), "INDEX": index(pixels), "ROWS": rows, "CHANNELS": block, "num_warps": 4,
    }  # fmt: skip
    with torch.cuda.device_of(x):
        batch_norm_sums_kernel[(parts * across,)](
            x, *x.stride(), grad_y, *grad_y.stride(), mean, rstd, partial, pixels, count, height, width, channels,
            **shared,
        )  # fmt: skip
        add_parts(partial, sums[0], sums[1])
        batch_norm_backward_kernel[(-(-pixels // rows) * across,)](
            x, *x.stride(), grad_y, *grad_y.stride(), added, *added.stride(), mean, rstd, weight.contiguous(), sums,
            grad_weight, grad_bias, grad_x, *grad_x.stride(), pixels, height, width, channels, SKIP=skip is not None,
            **shared,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias
