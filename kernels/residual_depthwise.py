"""Residual depthwise 3x3 with Triton: y = h + depthwise3x3(h) + bias, where h = gelu(x) or x; forward and backward.

A program owns strips of rows, a span of columns and a block of channels, and walks along the columns: each column of
pixels is loaded once, with one row of halo above and below, and what its neighbours need of it stays in registers. GELU
is thus computed (rows + 2) / rows times a pixel in the forward and once in the backward. Only x is saved for the
backward, which computes h again.

Bytes, X being those of x: forward reads 1 X and writes 1 X; backward reads 2 X (x and dy) and writes 1 X, and 10 sums a
channel and program, float32, which are added up in a fixed order: no atomics. The halo comes from the cache. The
identity is folded into the centre tap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import empty_pixels, is_channels_last
from . import configs

ROWS = 4  # of a strip in the forward
ROWS_BACKWARD = 2  # the backward holds three columns of dy and 9 sums: fewer rows fit
SPAN = 64  # columns that a program walks


@triton.jit
def load_column(x, sh, sw, row, column, inside, H, W, COUNT: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """A tuple of COUNT pixels of one column from `row` down, zeros outside the image."""
    pixels = ()
    for i in tl.static_range(COUNT):
        mask = inside & ((row + i >= 0) & (row + i < H))[:, None] & (column >= 0) & (column < W)
        offset = ((row + i).to(tl.int64) * sh)[:, None] + tl.cast(column, tl.int64) * sw
        pixels = pixels + (tl.load(x + offset, mask=mask, other=0.0).to(ACCUMULATOR),)
    return pixels


@triton.jit
def load_taps(weight, c, C, ACCUMULATOR: tl.constexpr):
    """A tuple of the 9 taps of each channel of weight (C, 1, 3, 3), the identity added to the middle one."""
    taps = ()
    for k in tl.static_range(9):
        tap = tl.load(weight + c * 9 + k, mask=c < C, other=0.0).to(ACCUMULATOR)
        taps = taps + ((tap + 1.0 if k == 4 else tap)[None, :],)
    return taps


@triton.jit
def strips_of_program(
    H, W, C, spans, ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr
):
    """(image, first row of each strip, first and last column, channels, part) of this program; programs of one part
    differ in their channels only."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)
    groups = tl.cdiv(H, ROWS * STRIPS)
    part = program // blocks
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    first = part % spans * SPAN
    last = tl.minimum(first + SPAN, W) - 1
    row = (part // spans % groups * STRIPS + tl.arange(0, STRIPS)) * ROWS
    return (part // spans // groups).to(tl.int64), row, first, last, c, part.to(tl.int64)


@triton.jit
def residual_depthwise_kernel(
    x, xb, xc, xh, xw, weight, bias, y, yb, yc, yh, yw, H, W, C, spans,
    GELU: tl.constexpr, BIAS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: STRIPS strips of ROWS rows, SPAN columns, CHANNELS channels of an image."""
    image, row, first, last, c, _ = strips_of_program(H, W, C, spans, ROWS, STRIPS, CHANNELS, SPAN)
    inside = (c < C)[None, :]
    x += image * xb + (c.to(tl.int64) * xc)[None, :]
    y += image * yb + (c.to(tl.int64) * yc)[None, :]
    taps = load_taps(weight, c, C, ACCUMULATOR)
    shift = tl.zeros([STRIPS, CHANNELS], ACCUMULATOR)
    if BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :]
    ending, middle = (), ()  # sums of the columns left of and at the one that is loaded
    for _j in tl.static_range(ROWS):
        ending = ending + (shift,)
        middle = middle + (shift,)
    for column in range(first - 1, last + 2):
        h = load_column(x, xh, xw, row - 1, column, inside, H, W, ROWS + 2, ACCUMULATOR)
        if GELU:
            activated = ()
            for i in tl.static_range(ROWS + 2):
                activated = activated + (h[i] * 0.5 * (1.0 + tl.math.erf(h[i] * 0.7071067811865476)),)
            h = activated
        next_ending, next_middle = (), ()
        for j in tl.static_range(ROWS):
            ended = ending[j] + taps[2] * h[j] + taps[5] * h[j + 1] + taps[8] * h[j + 2]
            written = inside & (row + j < H)[:, None] & (column - 1 >= first)
            at = ((row + j).to(tl.int64) * yh)[:, None] + tl.cast(column - 1, tl.int64) * yw
            tl.store(y + at, ended.to(y.dtype.element_ty), mask=written)
            next_ending = next_ending + (middle[j] + taps[1] * h[j] + taps[4] * h[j + 1] + taps[7] * h[j + 2],)
            next_middle = next_middle + (shift + taps[0] * h[j] + taps[3] * h[j + 1] + taps[6] * h[j + 2],)
        ending, middle = next_ending, next_middle


@triton.jit
def residual_depthwise_backward_kernel(
    x, xb, xc, xh, xw, weight, dy, db, dc, dh, dw, dx, eb, ec, eh, ew, partial, H, W, C, spans,
    GELU: tl.constexpr, ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One program: STRIPS strips of ROWS rows, SPAN columns, CHANNELS channels of an image.

    With D the 3 x 3 neighbourhood of dy, mirrored: dh = sum of taps x D, and the taps' gradients are the sums of h x D.
    Writes dx and this program's 9 sums of the taps and one of the bias to partial (part, 10, C).
    """
    image, row, first, last, c, part = strips_of_program(H, W, C, spans, ROWS, STRIPS, CHANNELS, SPAN)
    inside = (c < C)[None, :]
    x += image * xb + (c.to(tl.int64) * xc)[None, :]
    dy += image * db + (c.to(tl.int64) * dc)[None, :]
    dx += image * eb + (c.to(tl.int64) * ec)[None, :]
    taps = load_taps(weight, c, C, ACCUMULATOR)
    nothing = tl.zeros([STRIPS, CHANNELS], ACCUMULATOR)
    sums = ()
    for _k in tl.static_range(10):
        sums = sums + (nothing,)
    left = load_column(dy, dh, dw, row - 1, first - 1, inside, H, W, ROWS + 2, ACCUMULATOR)
    here = load_column(dy, dh, dw, row - 1, first, inside, H, W, ROWS + 2, ACCUMULATOR)
    for column in range(first, last + 1):
        right = load_column(dy, dh, dw, row - 1, column + 1, inside, H, W, ROWS + 2, ACCUMULATOR)
        u = load_column(x, xh, xw, row, column, inside, H, W, ROWS, ACCUMULATOR)
        for j in tl.static_range(ROWS):
            h = u[j]
            if GELU:
                phi = 0.5 * (1.0 + tl.math.erf(u[j] * 0.7071067811865476))
                h = u[j] * phi
            # Tap 3 ky + kx took h to the output at row + 1 - ky, column + 1 - kx.
            d = (
                right[j + 2], here[j + 2], left[j + 2],
                right[j + 1], here[j + 1], left[j + 1],
                right[j], here[j], left[j],
            )  # fmt: skip
            slope = nothing
            added = ()
            for k in tl.static_range(9):
                slope += taps[k] * d[k]
                added = added + (sums[k] + h * d[k],)
            sums = added + (sums[9] + tl.where((row + j < H)[:, None], d[4], 0.0),)
            if GELU:
                slope *= phi + u[j] * 0.3989422804014327 * tl.exp(-0.5 * u[j] * u[j])
            at = ((row + j).to(tl.int64) * eh)[:, None] + tl.cast(column, tl.int64) * ew
            tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=inside & (row + j < H)[:, None])
        left, here = here, right
    for k in tl.static_range(10):
        tl.store(partial + (part * 10 + k) * C + c, tl.sum(sums[k], axis=0), mask=c < C)


def _grid(x: Tensor, rows: int) -> tuple[int, int, int, int, int]:
    """(parts, programs, spans, strips, channels) for x (B, C, H, W) with strips of so many rows."""
    batch, channels, height, width = x.shape
    block = min(128, max(16, configs.power_of_two(channels)))
    strips = max(1, min(512 // block, configs.power_of_two(triton.cdiv(height, rows))))
    spans = triton.cdiv(width, SPAN)
    parts = batch * triton.cdiv(height, rows * strips) * spans
    return parts, parts * triton.cdiv(channels, block), spans, strips, block


def residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """y (B, C, H, W) in x's format; weight (C, 1, 3, 3) and bias (C,) in any floating dtype."""
    batch, channels, height, width = x.shape
    y = empty_pixels(x, channels, height, width, is_channels_last(x))
    _, programs, spans, strips, block = _grid(x, ROWS)
    if programs:
        with torch.cuda.device_of(x):
            residual_depthwise_kernel[(programs,)](
                x, *x.stride(), weight.contiguous(), weight if bias is None else bias.contiguous(), y, *y.stride(),
                height, width, channels, spans,
                gelu, bias is not None, configs.accumulator(x), ROWS, strips, block, SPAN, num_warps=4,
            )  # fmt: skip
    return y


def residual_depthwise_backward(grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's format, dweight (C, 1, 3, 3), dbias (C,)); sums in float32 or wider, given in weight's dtype."""
    batch, channels, height, width = x.shape
    grad_x = empty_pixels(x, channels, height, width, is_channels_last(x))
    parts, programs, spans, strips, block = _grid(x, ROWS_BACKWARD)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty((parts, 10, channels), dtype=wide)
    if programs:
        with torch.cuda.device_of(x):
            residual_depthwise_backward_kernel[(programs,)](
                x, *x.stride(), weight.contiguous(), grad_y, *grad_y.stride(), grad_x, *grad_x.stride(), partial,
                height, width, channels, spans,
                gelu, configs.accumulator(x), ROWS_BACKWARD, strips, block, SPAN, num_warps=4,
            )  # fmt: skip
    sums = partial.sum(0).to(weight.dtype)
    return grad_x, sums[:9].t().reshape(channels, 1, 3, 3).contiguous(), sums[9].clone()
