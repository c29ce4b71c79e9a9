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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import empty_pixels, is_channels_last
from . import configs
from .partial_sums import add_parts

ROWS = 7, 6, 4, 2, 1  # of a strip, as the height divides: 56, 28, 14 and 7 by 7; 12 and 24 by 6
CHANNELS = 256  # of a program at the most, two a thread
SPAN = 64  # columns that a program walks at the most
SHORTEST = 14  # columns below which a walk is not split for the sake of more programs
WARPS = 2048  # worth having before walks get long: four a scheduler of the largest GPUs

# Phi(-x) = exp(-x^2 / 2) t (MILLS[0] + MILLS[1] t + ... + MILLS[6] t^6) for x >= 0 and t = 1 / (1 + POLE x), Phi being
# the normal distribution: relative error at most 2.4e-7 about 0 and 8e-7 in the tail; by tests/support/gelu_fit.py.
POLE = tl.constexpr(0.2625)
MILLS = tl.constexpr((0.104557533, 0.107505625, 0.078193363, 0.154225618, -0.0860489995, 0.212012265, -0.0704454881))


@triton.jit
def normal(x):
    """(Phi(x), exp(-x^2 / 2)) for float32 x: no branch, and one exponential for the distribution and its density."""
    w = 1.0 + POLE * tl.abs(x)
    t = tl.rsqrt(w * w)  # 1 / w, which as a division costs twice the instructions
    e = tl.exp2(x * x * -0.7213475204444817)
    mills = MILLS[6]
    for k in tl.static_range(5, -1, -1):
        mills = MILLS[k] + mills * t
    tail = mills * (t * e)
    return tl.where(x >= 0.0, 1.0 - tail, tail), e


@triton.jit
def gelu(x, ERF: tl.constexpr):
    """x Phi(x)."""
    if ERF:
        return x * 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return x * normal(x)[0]


@triton.jit
def gelu_and_slope(x, ERF: tl.constexpr):
    """x Phi(x) and its derivative, Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)."""
    if ERF:
        phi = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return x * phi, phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    phi, e = normal(x)
    return x * phi, phi + x * 0.3989422804014327 * e


@triton.jit
def load_column(at, stride_h, row, seen, H, EVEN: tl.constexpr, COUNT: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """A tuple of COUNT pixels of one column from `row` down, [STRIPS, CHANNELS] each, zeros outside the image.

    EVEN: only the first and the last of them can lie outside."""
    pixels = ()
    for i in tl.static_range(COUNT):
        mask = seen
        if i == 0 or not EVEN:
            mask = mask & (row + i >= 0)[:, None]
        if i == COUNT - 1 or not EVEN:
            mask = mask & (row + i < H)[:, None]
        pixels = pixels + (tl.load(at + tl.cast(stride_h, tl.int64) * i, mask=mask, other=0.0).to(ACCUMULATOR),)
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
def strips_of_program(H, W, C, span, ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr):
    """(image, first row of each strip, first and last column, channels, part) of this program; programs of one part
    differ in their channels only."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)
    spans = tl.cdiv(W, span)
    groups = tl.cdiv(H, ROWS * STRIPS)
    part = program // blocks
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    first = part % spans * span
    last = tl.minimum(first + span, W) - 1
    row = (part // spans % groups * STRIPS + tl.arange(0, STRIPS)) * ROWS
    return (part // spans // groups).to(tl.int64), row, first, last, c, part.to(tl.int64)


@triton.jit
def pixels_at(x, image, c, row, column, stride_b, stride_c, stride_h, stride_w):
    """Pointers [STRIPS, CHANNELS] to the pixels of a column at the rows `row` [STRIPS]."""
    x += image * stride_b + tl.cast(column, tl.int64) * stride_w
    return x + (row.to(tl.int64) * stride_h)[:, None] + (c.to(tl.int64) * stride_c)[None, :]


@triton.jit(do_not_specialize=["span"])
def residual_depthwise_kernel(
    x, xb, xc, xh, xw, weight, bias, y, yb, yc, yh, yw, H, W, C, span,
    GELU: tl.constexpr, ERF: tl.constexpr, BIAS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: STRIPS strips of ROWS rows, `span` columns, CHANNELS channels of an image."""
    image, row, first, last, c, _ = strips_of_program(H, W, C, span, ROWS, STRIPS, CHANNELS)
    inside = ((c < C) | WHOLE)[None, :]
    taps = load_taps(weight, c, C, ACCUMULATOR)
    shift = tl.zeros([STRIPS, CHANNELS], ACCUMULATOR)
    if BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :]
    ending, middle = (), ()  # sums of the columns left of and at the one that is loaded
    for _j in tl.static_range(ROWS):
        ending = ending + (shift,)
        middle = middle + (shift,)
    # A column outside the image adds nothing.
    start = tl.maximum(first - 1, 0)
    x = pixels_at(x, image, c, row - 1, start, xb, xc, xh, xw)
    y = pixels_at(y, image, c, row, start - 1, yb, yc, yh, yw)
    for column in range(start, tl.minimum(last + 2, W)):
        h = load_column(x, xh, row - 1, inside, H, EVEN, ROWS + 2, ACCUMULATOR)
        if GELU:
            activated = ()
            for i in tl.static_range(ROWS + 2):
                activated = activated + (gelu(h[i], ERF),)
            h = activated
        next_ending, next_middle = (), ()
        for j in tl.static_range(ROWS):
            ended = ending[j] + taps[2] * h[j] + taps[5] * h[j + 1] + taps[8] * h[j + 2]
            written = inside & ((row + j < H) | EVEN)[:, None] & (column > first)
            tl.store(y + tl.cast(yh, tl.int64) * j, ended.to(y.dtype.element_ty), mask=written)
            next_ending = next_ending + (middle[j] + taps[1] * h[j] + taps[4] * h[j + 1] + taps[7] * h[j + 2],)
            next_middle = next_middle + (shift + taps[0] * h[j] + taps[3] * h[j + 1] + taps[6] * h[j + 2],)
        ending, middle = next_ending, next_middle
        x += xw
        y += yw
    for j in tl.static_range(ROWS):
        written = inside & ((row + j < H) | EVEN)[:, None] & (last + 1 == W)
        tl.store(y + tl.cast(yh, tl.int64) * j, ending[j].to(y.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["span"])
def residual_depthwise_backward_kernel(
    x, xb, xc, xh, xw, weight, dy, db, dc, dh, dw, dx, eb, ec, eh, ew, partial, H, W, C, span,
    GELU: tl.constexpr, ERF: tl.constexpr, ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: STRIPS strips of ROWS rows, `span` columns, CHANNELS channels of an image.

    With D the 3 x 3 neighbourhood of dy, mirrored: dh = sum of taps x D, and the taps' gradients are the sums of h x D.
    Writes dx and this program's 9 sums of the taps and one of the bias to partial (part, 10, C).
    """
    image, row, first, last, c, part = strips_of_program(H, W, C, span, ROWS, STRIPS, CHANNELS)
    inside = ((c < C) | WHOLE)[None, :]
    taps = load_taps(weight, c, C, ACCUMULATOR)
    nothing = tl.zeros([STRIPS, CHANNELS], ACCUMULATOR)
    sums = ()
    for _k in tl.static_range(10):
        sums = sums + (nothing,)
    x = pixels_at(x, image, c, row, first, xb, xc, xh, xw)
    dx = pixels_at(dx, image, c, row, first, eb, ec, eh, ew)
    dy = pixels_at(dy, image, c, row - 1, first, db, dc, dh, dw)
    left = load_column(dy - dw, dh, row - 1, inside & (first > 0), H, EVEN, ROWS + 2, ACCUMULATOR)
    here = load_column(dy, dh, row - 1, inside, H, EVEN, ROWS + 2, ACCUMULATOR)
    for column in range(first, last + 1):
        dy += dw
        right = load_column(dy, dh, row - 1, inside & (column + 1 < W), H, EVEN, ROWS + 2, ACCUMULATOR)
        for j in tl.static_range(ROWS):
            seen = inside & ((row + j < H) | EVEN)[:, None]
            h = tl.load(x + tl.cast(xh, tl.int64) * j, mask=seen, other=0.0).to(ACCUMULATOR)
            if GELU:
                h, steepness = gelu_and_slope(h, ERF)
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
            sums = added + (sums[9] + tl.where((row + j < H)[:, None] | EVEN, d[4], 0.0),)
            if GELU:
                slope *= steepness
            tl.store(dx + tl.cast(eh, tl.int64) * j, slope.to(dx.dtype.element_ty), mask=seen)
        left, here = here, right
        x += xw
        dx += ew
    for k in tl.static_range(10):
        tl.store(partial + (part * 10 + k) * C + c, tl.sum(sums[k], axis=0), mask=c < C)


class Plan(NamedTuple):
    """How a tensor is cut into programs."""

    parts: int  # strips and spans of all images
    programs: int  # parts times blocks of channels
    span: int  # columns that a program walks
    rows: int
    strips: int
    channels: int
    even: bool  # strips divide the height
    whole: bool  # blocks divide the channels
    warps: int


def plan(x: Tensor) -> Plan:
    """The programs of either direction for x (B, C, H, W): 64 pixels of a column a warp, two a thread."""
    batch, channels, height, width = x.shape
    sizes = ROWS if x.element_size() < 8 else ROWS[2:]  # float64 takes twice the registers
    rows = min(sizes, key=lambda rows: triton.cdiv(height, rows) * (rows + 2))
    block = min(CHANNELS, max(16, configs.power_of_two(channels)))
    strips = max(1, min(64 // block, configs.power_of_two(triton.cdiv(height, rows))))
    warps = max(1, block * strips // 64)
    walks = batch * triton.cdiv(height, rows * strips) * triton.cdiv(channels, block)
    spans = max(triton.cdiv(width, SPAN), min(width // SHORTEST, WARPS // max(1, walks * warps)))
    span = triton.cdiv(width, max(1, spans))
    parts = batch * triton.cdiv(height, rows * strips) * triton.cdiv(width, span)
    return Plan(
        parts, parts * triton.cdiv(channels, block), span, rows, strips, block,
        height % (rows * strips) == 0, channels % block == 0, warps,
    )  # fmt: skip


def residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """y (B, C, H, W) in x's format; weight (C, 1, 3, 3) and bias (C,) in any floating dtype."""
    batch, channels, height, width = x.shape
    y = empty_pixels(x, channels, height, width, is_channels_last(x))
    cut = plan(x)
    if cut.programs:
        with torch.cuda.device_of(x):
            residual_depthwise_kernel[(cut.programs,)](
                x, *x.stride(), weight.contiguous(), weight if bias is None else bias.contiguous(), y, *y.stride(),
                height, width, channels, cut.span,
                GELU=gelu, ERF=x.element_size() > 2, BIAS=bias is not None, ACCUMULATOR=configs.accumulator(x),
                EVEN=cut.even, WHOLE=cut.whole,
                ROWS=cut.rows, STRIPS=cut.strips, CHANNELS=cut.channels, num_warps=cut.warps,
            )  # fmt: skip
    return y


def residual_depthwise_backward(grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's format, dweight (C, 1, 3, 3), dbias (C,)); sums in float32 or wider, given in weight's dtype."""
    batch, channels, height, width = x.shape
    grad_x = empty_pixels(x, channels, height, width, is_channels_last(x))
    cut = plan(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = x.new_empty((cut.parts, 10, channels), dtype=wide)
    if cut.programs:
        with torch.cuda.device_of(x):
            residual_depthwise_backward_kernel[(cut.programs,)](
                x, *x.stride(), weight.contiguous(), grad_y, *grad_y.stride(), grad_x, *grad_x.stride(), partial,
                height, width, channels, cut.span,
                GELU=gelu, ERF=x.element_size() > 2, ACCUMULATOR=configs.accumulator(x),
                EVEN=cut.even, WHOLE=cut.whole,
                ROWS=cut.rows, STRIPS=cut.strips, CHANNELS=cut.channels, num_warps=cut.warps,
            )  # fmt: skip
    grad_weight, grad_bias = weight.new_empty((channels, 1, 3, 3)), weight.new_empty((channels,))
    add_parts(partial, grad_weight, grad_bias)
    return grad_x, grad_weight, grad_bias
