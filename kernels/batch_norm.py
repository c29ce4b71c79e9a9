"""The statistics of BatchNorm with Triton, and its backward together with the gradient of a skip connection.

Bytes, X being those of x: the statistics read 1 X; the backward's sums read 2 X (dy and x), and what follows reads 2 X,
or 3 X with the skip's gradient, and writes 1 X. PyTorch moves 5 X backward, and 3 X more to add that gradient. A norm
that is folded into a convolution (batch_norm_conv.py) has the sums from there. What programs summed of a channel,
float32, is added up in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import accumulator, empty_pixels, is_channels_last
from . import configs, partial_sums
from .channel_layer_norm import index, rows_at
from .residual_branch import Split, load_channels, split


@triton.jit(do_not_specialize=["pixels", "count"])
def batch_norm_moments_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    partial,  # (parts, 2, C), written
    pixels, count, H, W, C, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: `count` blocks of ROWS pixels, CHANNELS channels. Their mean, and their squared distances from it
    summed: taken from the first pixel, lest squares cancel where the mean is large."""
    blocks = tl.cdiv(C, CHANNELS)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    begin = part.to(INDEX) * count * ROWS
    first = rows_at(begin, H, W, x_image, x_row, x_column) + c.to(tl.int64) * x_channel
    origin = tl.load(x + first, mask=c < C, other=0.0).to(ACCUMULATOR)  # (CHANNELS,)
    sums = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    squares = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    for i in range(0, count):
        r = begin + i * ROWS + tl.arange(0, ROWS)
        seen = (r < pixels)[:, None] & (c < C)[None, :]
        at = rows_at(r, H, W, x_image, x_row, x_column)[:, None] + c.to(tl.int64)[None, :] * x_channel
        off = tl.where(seen, tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR) - origin[None, :], 0.0)
        sums += off
        squares += off * off
    seen = tl.minimum(pixels - begin, count * ROWS).to(ACCUMULATOR)
    off = tl.sum(sums, axis=0) / seen
    partial += part * 2 * C + c
    tl.store(partial, origin + off, mask=c < C)
    tl.store(partial + C, tl.sum(squares, axis=0) - off * off * seen, mask=c < C)


@triton.jit(do_not_specialize=["pixels", "each", "parts"])
def batch_norm_statistics_kernel(
    partial,  # (parts, 2, C): of `each` pixels a part, the last one of the rest, their mean and squared distances
    running_mean, running_var,  # (C,), brought up to date
    mean, rstd,  # (C,), written
    pixels, each, parts, C, momentum, eps,
    ACCUMULATOR: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: CHANNELS channels. The variance is divided by N in rstd, by N - 1 in the running one."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    number = tl.full([], 1.0, ACCUMULATOR) * pixels
    sums = tl.zeros([PARTS, CHANNELS], ACCUMULATOR)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = part.to(tl.int64)[:, None] * 2 * C + c[None, :]
        weight = tl.minimum(pixels - part.to(tl.int64) * each, each).to(ACCUMULATOR)[:, None]
        sums += weight * tl.load(partial + at, mask=(part < parts)[:, None] & (c < C)[None, :], other=0.0)
    m = tl.sum(sums, axis=0) / number
    sums = tl.zeros([PARTS, CHANNELS], ACCUMULATOR)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        seen = (part < parts)[:, None] & (c < C)[None, :]
        at = part.to(tl.int64)[:, None] * 2 * C + c[None, :]
        weight = tl.minimum(pixels - part.to(tl.int64) * each, each).to(ACCUMULATOR)[:, None]
        off = tl.load(partial + at, mask=seen, other=0.0) - m[None, :]
        sums += tl.where(seen, tl.load(partial + at + C, mask=seen, other=0.0) + weight * off * off, 0.0)
    distances = tl.sum(sums, axis=0)
    tl.store(mean + c, m, mask=c < C)
    tl.store(rstd + c, 1.0 / tl.sqrt(distances / number + eps), mask=c < C)
    old = tl.load(running_mean + c, mask=c < C, other=0.0).to(ACCUMULATOR)
    tl.store(running_mean + c, (old + momentum * (m - old)).to(running_mean.dtype.element_ty), mask=c < C)
    old = tl.load(running_var + c, mask=c < C, other=0.0).to(ACCUMULATOR)
    new = old + momentum * (distances / (number - 1.0) - old)
    tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=c < C)


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
    sums,  # (2, C), of dy n and of dy; FOLDED: of dy x and of dy
    dweight, dbias,  # (C,), written: the sums in the dtype of weight
    dx, dx_image, dx_channel, dx_row, dx_column,  # (B, C, H, W), written
    pixels, H, W, C, SKIP: tl.constexpr, FOLDED: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS pixels, CHANNELS channels. With n = (x - mean) rstd, N pixels,
    dx = rstd weight (dy - (sum of dy + n * sum of dy n) / N), plus the gradient `skip` of another use of x. FOLDED:
    rstd weight dy is given for dy."""
    blocks = tl.cdiv(C, CHANNELS)
    first = tl.program_id(0) // blocks
    r = first.to(INDEX) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    seen = (r < pixels)[:, None] & (c < C)[None, :]
    m, s = load_channels(mean, c, C, ACCUMULATOR), load_channels(rstd, c, C, ACCUMULATOR)
    w = load_channels(weight, c, C, ACCUMULATOR)
    sum_w, sum_b = load_channels(sums, c, C, ACCUMULATOR), load_channels(sums + C, c, C, ACCUMULATOR)
    if FOLDED:
        sum_w = (sum_w - m * sum_b) * s
    if first == 0:
        at = c[None, :]
        tl.store(dweight + at, sum_w.to(dweight.dtype.element_ty), mask=at < C)
        tl.store(dbias + at, sum_b.to(dbias.dtype.element_ty), mask=at < C)
    at = rows_at(r, H, W, x_image, x_row, x_column)[:, None] + c.to(tl.int64)[None, :] * x_channel
    n = (tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR) - m) * s
    at = rows_at(r, H, W, dy_image, dy_row, dy_column)[:, None] + c.to(tl.int64)[None, :] * dy_channel
    d = tl.load(dy + at, mask=seen, other=0.0).to(ACCUMULATOR)
    common = (sum_b + n * sum_w) * (tl.full([], 1.0, ACCUMULATOR) / pixels)
    slope = d - common * (s * w) if FOLDED else (d - common) * (s * w)
    if SKIP:
        at = rows_at(r, H, W, skip_image, skip_row, skip_column)[:, None] + c.to(tl.int64)[None, :] * skip_channel
        slope += tl.load(skip + at, mask=seen, other=0.0).to(ACCUMULATOR)
    at = rows_at(r, H, W, dx_image, dx_row, dx_column)[:, None] + c.to(tl.int64)[None, :] * dx_channel
    tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=seen)


def _shared(x: Tensor, shared: Split) -> dict[str, Any]:
    """The constants that all kernels over pixels take."""
    return {
        "ACCUMULATOR": configs.accumulator(x), "INDEX": index(x.numel() // x.shape[1]), "ROWS": shared.rows,
        "CHANNELS": shared.channels, "num_warps": 4,
    }  # fmt: skip


def batch_norm_statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """(mean, rstd), (C,) in float32 or wider, of pixels x (B, C, H, W), at least two a channel; brings the running
    statistics (C,) up to date, as PyTorch does."""
    batch, channels, height, width = x.shape
    pixels, shared = batch * height * width, split(x)
    partial = x.new_empty((shared.parts, 2, channels), dtype=accumulator(x.dtype))
    mean, rstd = partial.new_empty(channels), partial.new_empty(channels)
    with torch.cuda.device_of(x):
        batch_norm_moments_kernel[(shared.parts * shared.across,)](
            x, *x.stride(), partial, pixels, shared.count, height, width, channels, **_shared(x, shared)
        )
        batch_norm_statistics_kernel[(-(-channels // partial_sums.CHANNELS),)](
            partial, running_mean, running_var, mean, rstd, pixels, shared.rows * shared.count, shared.parts, channels,
            momentum, eps, ACCUMULATOR=configs.accumulator(x), PARTS=partial_sums.PARTS,
            CHANNELS=partial_sums.CHANNELS, num_warps=8,
        )  # fmt: skip
    return mean, rstd


def _sums(grad_y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The sums (2, C) over pixels of dy n and of dy."""
    batch, channels, height, width = x.shape
    shared = split(x)
    partial = x.new_empty((shared.parts, 2, channels), dtype=accumulator(x.dtype))
    sums = partial.new_empty((2, channels))
    batch_norm_sums_kernel[(shared.parts * shared.across,)](
        x, *x.stride(), grad_y, *grad_y.stride(), mean, rstd, partial, batch * height * width, shared.count,
        height, width, channels, **_shared(x, shared),
    )  # fmt: skip
    partial_sums.add_parts(partial, sums[0], sums[1])
    return sums


def batch_norm_backward(
    grad_y: Tensor,
    skip: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's format, dweight (C,), dbias (C,)); the last two in weight's dtype, summed in float32 or wider.

    `mean` and `rstd` (C,) are the batch's; `skip` is the gradient (B, C, H, W) of another use of x, added to dx. With
    `sums` (2, C), over pixels of dy x and of dy, the norm is folded: `grad_y` is rstd * weight * dy.
    """
    batch, channels, height, width = x.shape
    grad_x = empty_pixels(x, channels, height, width, is_channels_last(x))
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    added = grad_y if skip is None else skip
    shared, pixels = split(x), batch * height * width
    with torch.cuda.device_of(x):
        known = _sums(grad_y, x, mean, rstd) if sums is None else sums
        batch_norm_backward_kernel[(-(-pixels // shared.rows) * shared.across,)](
            x, *x.stride(), grad_y, *grad_y.stride(), added, *added.stride(), mean, rstd, weight.contiguous(), known,
            grad_weight, grad_bias, grad_x, *grad_x.stride(), pixels, height, width, channels, SKIP=skip is not None,
            FOLDED=sums is not None, **_shared(x, shared),
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias
