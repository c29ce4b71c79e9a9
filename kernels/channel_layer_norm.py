"""LayerNorm over the channels of each pixel with Triton, on (B, C, H, W) as it lies in memory; forward and backward.

A row is a pixel's channels, 64 to 640 numbers: a program takes several rows at once, and in the backward several such
blocks one after the other, so that the sums for weight and bias stay on chip.

Bytes, X being those of x: forward reads 1 X, writes 1 X, and two float32 numbers a pixel; backward reads 2 X (x and
dy; 3 X with the gradient of a skip connection, whose addition would take PyTorch 3 X more), writes 1 X, and 2 sums a
channel and program, float32, that are added up in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import accumulator, empty_pixels, is_channels_last
from . import configs
from .partial_sums import add_parts

ELEMENTS = 2560  # numbers that a program of 4 warps holds at a time
WIDEST = 256  # channels of a unit: 8 numbers a thread, so that a row's sum stays within its warp
PROGRAMS = 512  # programs of the backward at the most, each of which writes its sums
FEWEST = 32  # pixels of a program of the backward at the least, for the same reason


@triton.jit
def rows_at(r, H, W, sb, sh, sw):
    """Offsets of the pixels r = (image, row, column) counted through."""
    above = r // W
    image = above // H
    row, column = above - image * H, r - above * W
    return image.to(tl.int64) * sb + row.to(tl.int64) * sh + column.to(tl.int64) * sw


@triton.jit
def load_units(
    at, stride_c, seen, C: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, ACCUMULATOR: tl.constexpr
):  # fmt: skip
    """The channels of the pixels at `at` [ROWS, 1] as UNITS tiles [ROWS, UNIT], zeros where there are none."""
    WHOLE: tl.constexpr = UNIT * UNITS == C
    units = ()
    for k in tl.static_range(UNITS):
        c = k * UNIT + tl.arange(0, UNIT)[None, :]
        units = units + (
            tl.load(at + c.to(tl.int64) * stride_c, mask=seen & ((c < C) | WHOLE), other=0.0).to(ACCUMULATOR),
        )
    return units


@triton.jit
def load_vector(vector, C, UNIT: tl.constexpr, UNITS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """A parameter (C,) as a tuple of UNITS tiles [1, UNIT]."""
    units = ()
    for k in tl.static_range(UNITS):
        c = k * UNIT + tl.arange(0, UNIT)
        units = units + (tl.load(vector + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :],)
    return units


@triton.jit(do_not_specialize=["pixels"])
def channel_layer_norm_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    weight, bias,  # (C,)
    y, y_image, y_channel, y_row, y_column,  # (B, C, H, W)
    mean, rstd,  # (B, H, W)
    pixels, H, W, C: tl.constexpr, eps: tl.constexpr, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS pixels, all their channels."""
    WHOLE: tl.constexpr = UNIT * UNITS == C
    SHARE: tl.constexpr = 1.0 / C
    r = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    seen = (r < pixels)[:, None]
    u = load_units(x + rows_at(r, H, W, x_image, x_row, x_column)[:, None], x_channel, seen, C, UNIT, UNITS,
                   ACCUMULATOR)  # fmt: skip
    total = u[0]
    for k in tl.static_range(1, UNITS):
        total += u[k]
    m = tl.sum(total, axis=1) * SHARE  # (ROWS,)
    centred = ()
    squares = tl.zeros([ROWS, UNIT], ACCUMULATOR)
    for k in tl.static_range(UNITS):
        inside = (k * UNIT + tl.arange(0, UNIT)[None, :] < C) | WHOLE
        centred = centred + (tl.where(inside, u[k] - m[:, None], 0.0),)
        squares += centred[k] * centred[k]
    s = 1.0 / tl.sqrt(tl.sum(squares, axis=1) * SHARE + eps)  # (ROWS,)
    tl.store(mean + r, m, mask=r < pixels)
    tl.store(rstd + r, s, mask=r < pixels)
    w = load_vector(weight, C, UNIT, UNITS, ACCUMULATOR)
    b = load_vector(bias, C, UNIT, UNITS, ACCUMULATOR)
    y += rows_at(r, H, W, y_image, y_row, y_column)[:, None]
    for k in tl.static_range(UNITS):
        c = k * UNIT + tl.arange(0, UNIT)[None, :]
        v = centred[k] * s[:, None] * w[k] + b[k]
        tl.store(y + c.to(tl.int64) * y_channel, v.to(y.dtype.element_ty), mask=seen & ((c < C) | WHOLE))


@triton.jit(do_not_specialize=["pixels", "blocks"])
def channel_layer_norm_backward_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    weight,  # (C,)
    mean, rstd,  # (B, H, W)
    dy, dy_image, dy_channel, dy_row, dy_column,  # (B, C, H, W)
    skip, skip_image, skip_channel, skip_row, skip_column,  # (B, C, H, W)
    dx, dx_image, dx_channel, dx_row, dx_column,  # (B, C, H, W)
    partial,  # (programs, 2, C)
    pixels, blocks, H, W, C: tl.constexpr, SKIP: tl.constexpr, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """One program: `blocks` blocks of ROWS pixels. With n = (x - mean) * rstd and g = dy * weight,
    dx = rstd (g - mean of g - n * mean of g n), plus the gradient `skip` of another use of x; the sums of dy n and of
    dy go to partial."""
    WHOLE: tl.constexpr = UNIT * UNITS == C
    SHARE: tl.constexpr = 1.0 / C
    program = tl.program_id(0).to(tl.int64)
    w = load_vector(weight, C, UNIT, UNITS, ACCUMULATOR)
    nothing = tl.zeros([ROWS, UNIT], ACCUMULATOR)
    sum_w, sum_b = (), ()
    for _k in tl.static_range(UNITS):
        sum_w = sum_w + (nothing,)
        sum_b = sum_b + (nothing,)
    for i in range(0, blocks):
        r = (program.to(INDEX) * blocks + i) * ROWS + tl.arange(0, ROWS)
        seen = (r < pixels)[:, None]
        u = load_units(x + rows_at(r, H, W, x_image, x_row, x_column)[:, None], x_channel, seen, C, UNIT, UNITS,
                       ACCUMULATOR)  # fmt: skip
        d = load_units(dy + rows_at(r, H, W, dy_image, dy_row, dy_column)[:, None], dy_channel, seen, C, UNIT, UNITS,
                       ACCUMULATOR)  # fmt: skip
        m = tl.load(mean + r, mask=r < pixels, other=0.0)
        s = tl.load(rstd + r, mask=r < pixels, other=0.0)  # zero past the end: so is n, and dy is
        n, next_w, next_b = (), (), ()
        sum_g, sum_gn = nothing, nothing
        for k in tl.static_range(UNITS):
            n = n + ((u[k] - m[:, None]) * s[:, None],)
            g = d[k] * w[k]  # zero beyond the channels, whatever n is there
            sum_g += g
            sum_gn += g * n[k]
            next_w = next_w + (sum_w[k] + d[k] * n[k],)
            next_b = next_b + (sum_b[k] + d[k],)
        sum_w, sum_b = next_w, next_b
        mean_g, mean_gn = tl.sum(sum_g, axis=1) * SHARE, tl.sum(sum_gn, axis=1) * SHARE  # (ROWS,)
        skip_at = skip + rows_at(r, H, W, skip_image, skip_row, skip_column)[:, None]
        dx_at = dx + rows_at(r, H, W, dx_image, dx_row, dx_column)[:, None]
        for k in tl.static_range(UNITS):
            c = k * UNIT + tl.arange(0, UNIT)[None, :]
            written = seen & ((c < C) | WHOLE)
            slope = (d[k] * w[k] - mean_g[:, None] - n[k] * mean_gn[:, None]) * s[:, None]
            if SKIP:
                slope += tl.load(skip_at + c.to(tl.int64) * skip_channel, mask=written, other=0.0).to(ACCUMULATOR)
            tl.store(dx_at + c.to(tl.int64) * dx_channel, slope.to(dx.dtype.element_ty), mask=written)
    for k in tl.static_range(UNITS):
        c = k * UNIT + tl.arange(0, UNIT)
        tl.store(partial + program * 2 * C + c, tl.sum(sum_w[k], axis=0), mask=c < C)
        tl.store(partial + (program * 2 + 1) * C + c, tl.sum(sum_b[k], axis=0), mask=c < C)


def index(pixels: int) -> tl.dtype:
    """The dtype that pixels are counted in: 64-bit division is a subroutine of a hundred instructions."""
    return tl.int32 if pixels < 2**30 else tl.int64


class Rows(NamedTuple):
    """How pixels are cut: rows a block, and channels as `units` units of a power of two."""

    rows: int
    unit: int
    units: int

    @property
    def registers(self) -> int:
        """Of a thread in the backward. Left to itself the assembler takes 72 to 96, and spills one or two of them."""
        return 128 if self.units < 5 else 168


def cut(channels: int) -> Rows:
    """Units that leave the fewest lanes without a channel: 3 x 32 for 96, 3 x 64 for 192, 5 x 64 for 320."""
    sizes = {units: max(16, configs.power_of_two(-(-channels // units))) for units in (1, 3, 5, 7)}
    units = min(sizes, key=lambda units: (units * sizes[units], units))
    parts = max(1, sizes[units] // WIDEST)
    unit = sizes[units] // parts
    rows = max(1, ELEMENTS // (units * parts * unit))
    return Rows(1 << (rows.bit_length() - 1), unit, units * parts)


def channel_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype` and x's format, mean, rstd); the last two (B, H, W) in the accumulator's dtype."""
    batch, channels, height, width = x.shape
    y = empty_pixels(x, channels, height, width, is_channels_last(x), dtype)
    mean = x.new_empty((batch, height, width), dtype=accumulator(x.dtype))
    rstd = torch.empty_like(mean)
    rows, unit, units = cut(channels)
    if x.numel():
        with torch.cuda.device_of(x):
            channel_layer_norm_kernel[(-(-mean.numel() // rows),)](
                x, *x.stride(), weight.contiguous(), bias.contiguous(), y, *y.stride(), mean, rstd,
                mean.numel(), height, width, C=channels, eps=eps, ACCUMULATOR=configs.accumulator(x),
                INDEX=index(mean.numel()), ROWS=rows, UNIT=unit, UNITS=units, num_warps=4,
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
    grad_weight, grad_bias = weight.new_empty((channels,)), weight.new_empty((channels,))
    shape = cut(channels)
    rows, unit, units = shape
    blocks = max(-(-mean.numel() // (rows * PROGRAMS)), FEWEST // rows)
    programs = -(-mean.numel() // (rows * max(1, blocks)))
    partial = mean.new_empty((programs, 2, channels))
    if programs:
        with torch.cuda.device_of(x):
            channel_layer_norm_backward_kernel[(programs,)](
                x, *x.stride(), weight.contiguous(), mean, rstd, grad_y, *grad_y.stride(), added, *added.stride(),
                grad_x, *grad_x.stride(), partial, mean.numel(), blocks, height, width,
                C=channels, SKIP=skip is not None, ACCUMULATOR=configs.accumulator(x), INDEX=index(mean.numel()),
                ROWS=rows, UNIT=unit, UNITS=units, num_warps=4, maxnreg=shape.registers,
            )  # fmt: skip
    add_parts(partial, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
