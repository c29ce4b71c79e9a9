"""LayerNorm over the channels of each pixel with Triton, on (B, C, H, W) as it lies in memory; forward and backward.

A row is a pixel's channels, 64 to 640 numbers: a program takes several rows at once, and in the backward several such
blocks one after the other, so that the sums for weight and bias stay on chip.

Bytes, X being those of x: forward reads 1 X, writes 1 X, and two float32 numbers a pixel; backward reads 2 X (x and
dy; 3 X with the gradient of a skip connection, whose addition would take PyTorch 3 X more), writes 1 X, and 2 sums a
channel and program, float32, that are added up in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import accumulator, empty_pixels, is_channels_last
from . import configs

ELEMENTS = 2048  # numbers that a program of 4 warps holds at a time
PROGRAMS = 1024  # programs of the backward at the most, each of which writes its sums


@triton.jit
def rows_at(r, H, W, sb, sh, sw):
    """Offsets of the pixels r = (image, row, column) counted through."""
    above = r // W
    image = above // H
    row, column = above - image * H, r - above * W
    return image.to(tl.int64) * sb + row.to(tl.int64) * sh + column.to(tl.int64) * sw


@triton.jit
def channel_layer_norm_kernel(
    x, xb, xc, xh, xw, weight, bias, y, yb, yc, yh, yw, mean, rstd, pixels, H, W, C, eps: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS pixels, all their channels."""
    r = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, CHANNELS)
    seen = (r < pixels)[:, None] & (c < C)[None, :]
    at = rows_at(r, H, W, xb, xh, xw)[:, None] + c.to(tl.int64)[None, :] * xc
    u = tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR)
    m = tl.sum(u, axis=1) / C
    centred = tl.where(seen, u - m[:, None], 0.0)
    s = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(mean + r, m, mask=r < pixels)
    tl.store(rstd + r, s, mask=r < pixels)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(ACCUMULATOR)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(ACCUMULATOR)
    v = centred * s[:, None] * w[None, :] + b[None, :]
    at = rows_at(r, H, W, yb, yh, yw)[:, None] + c.to(tl.int64)[None, :] * yc
    tl.store(y + at, v.to(y.dtype.element_ty), mask=seen)


@triton.jit
def channel_layer_norm_backward_kernel(
    x, xb, xc, xh, xw, weight, mean, rstd, dy, db, dc, dh, dw, skip, kb, kc, kh, kw, dx, eb, ec, eh, ew, partial,
    pixels, H, W, C, blocks,
    SKIP: tl.constexpr, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: `blocks` blocks of ROWS pixels. With n = (x - mean) * rstd and g = dy * weight,
    dx = rstd (g - mean of g - n * mean of g n), plus the gradient `skip` of another use of x; the sums of dy n and of
    dy go to partial (program, 2, C)."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(ACCUMULATOR)
    sum_w = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    sum_b = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    for i in range(0, blocks):
        r = (program.to(INDEX) * blocks + i) * ROWS + tl.arange(0, ROWS)
        seen = (r < pixels)[:, None] & (c < C)[None, :]
        at = rows_at(r, H, W, xb, xh, xw)[:, None] + c.to(tl.int64)[None, :] * xc
        u = tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR)
        at = rows_at(r, H, W, db, dh, dw)[:, None] + c.to(tl.int64)[None, :] * dc
        d = tl.load(dy + at, mask=seen, other=0.0).to(ACCUMULATOR)
        m = tl.load(mean + r, mask=r < pixels, other=0.0)
        s = tl.load(rstd + r, mask=r < pixels, other=0.0)
        n = tl.where(seen, (u - m[:, None]) * s[:, None], 0.0)
        g = d * w[None, :]
        slope = g - (tl.sum(g, axis=1) / C)[:, None] - n * (tl.sum(g * n, axis=1) / C)[:, None]
        slope *= s[:, None]
        if SKIP:
            at = rows_at(r, H, W, kb, kh, kw)[:, None] + c.to(tl.int64)[None, :] * kc
            slope += tl.load(skip + at, mask=seen, other=0.0).to(ACCUMULATOR)
        at = rows_at(r, H, W, eb, eh, ew)[:, None] + c.to(tl.int64)[None, :] * ec
        tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=seen)
        sum_w += d * n
        sum_b += d
    tl.store(partial + program * 2 * C + c, tl.sum(sum_w, axis=0), mask=c < C)
    tl.store(partial + (program * 2 + 1) * C + c, tl.sum(sum_b, axis=0), mask=c < C)


def index(pixels: int) -> tl.dtype:
    """The dtype that pixels are counted in: 64-bit division is a subroutine of a hundred instructions."""
    return tl.int32 if pixels < 2**30 else tl.int64


def _blocks(channels: int) -> tuple[int, int]:
    """Pixels a block and channels, both powers of two."""
    width = configs.power_of_two(channels)
    return max(1, ELEMENTS // width), width


def channel_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype` and x's format, mean, rstd); the last two (B, H, W) in the accumulator's dtype."""
    batch, channels, height, width = x.shape
    y = empty_pixels(x, channels, height, width, is_channels_last(x), dtype)
    mean = x.new_empty((batch, height, width), dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    rows, block = _blocks(channels)
    if x.numel():
        with torch.cuda.device_of(x):
            channel_layer_norm_kernel[(triton.cdiv(mean.numel(), rows),)](
                x, *x.stride(), weight.contiguous(), bias.contiguous(), y, *y.stride(), mean, rstd,
                mean.numel(), height, width, channels, eps,
                configs.accumulator(x), index(mean.numel()), rows, block, num_warps=4,
            )  # fmt: skip
    return y, mean, rstd


def channel_layer_norm_backward(
    grad_y: Tensor, skip: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's format, dweight (C,), dbias (C,)); the last two in weight's dtype, summed in float32 or wider.

    `skip` is the gradient (B, C, H, W) of another use of x, added to dx.
    """
    added = grad_y if skip is None else skip
    batch, channels, height, width = x.shape
    grad_x = empty_pixels(x, channels, height, width, is_channels_last(x))
    rows, block = _blocks(channels)
    blocks = triton.cdiv(triton.cdiv(mean.numel(), rows), PROGRAMS)
    programs = triton.cdiv(mean.numel(), rows * max(1, blocks))
    partial = mean.new_empty((programs, 2, channels))
    if programs:
        with torch.cuda.device_of(x):
            channel_layer_norm_backward_kernel[(programs,)](
                x, *x.stride(), weight.contiguous(), mean, rstd, grad_y, *grad_y.stride(), added, *added.stride(),
                grad_x, *grad_x.stride(), partial, mean.numel(), height, width, channels, blocks,
                skip is not None, configs.accumulator(x), index(mean.numel()), rows, block, num_warps=4,
            )  # fmt: skip
    sums = partial.sum(0).to(weight.dtype)
    return grad_x, sums[0].clone(), sums[1].clone()
