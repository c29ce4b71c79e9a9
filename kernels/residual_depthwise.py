"""Residual depthwise 3x3 with Triton: y = h + depthwise3x3(h) + bias, where h = gelu(x + x_bias); forward, backward.

A program owns strips of rows, a span of columns and a block of channels, and walks along the columns: each column of
pixels is loaded once, with one row of halo above and below, and what its neighbours need of it stays in registers. GELU
is thus computed (rows + 2) / rows times a pixel in the forward and once in the backward. Only x is saved for the
backward, which computes h again.

Bytes, X being those of x: forward reads 1 X and writes 1 X; backward reads 2 X (x and dy) and writes 1 X, and 10 sums a
channel and program (11 with x_bias, that of a 1x1 convolution in front), float32, which are added up in a fixed order:
no atomics. The halo comes from the cache. The identity is folded into the centre tap.
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

ROWS = 7, 6, 4, 2, 1  # of a strip, as the height divides: 56, 28, 14 and 7 by 7; 12 and 24 by 6
CHANNELS = 256  # of a program at the most, two a thread
SPAN = 64  # columns that a program walks at the most
SHORTEST = 14  # columns below which a walk is not split for the sake of more programs
WARPS = 1024  # worth having before walks get long: two a scheduler of the largest GPUs

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
def load_column(at, stride_row, row, seen, H, EVEN: tl.constexpr, COUNT: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """A tuple of COUNT pixels of one column from `row` down, [STRIPS, CHANNELS] each, zeros outside the image.

    EVEN: only the first and the last of them can lie outside."""
    pixels = ()
    for i in tl.static_range(COUNT):
        mask = seen
        if i == 0 or not EVEN:
            mask = mask & (row + i >= 0)[:, None]
        if i == COUNT - 1 or not EVEN:
            mask = mask & (row + i < H)[:, None]
        pixels = pixels + (tl.load(at + tl.cast(stride_row, tl.int64) * i, mask=mask, other=0.0).to(ACCUMULATOR),)
    return pixels


@triton.jit
def shift_column(pixels, shift, row, H, EVEN: tl.constexpr, COUNT: tl.constexpr):
    """The pixels of `load_column` plus shift [1, CHANNELS], those outside the image still zero."""
    shifted = ()
    for i in tl.static_range(COUNT):
        pixel = pixels[i] + shift
        if i == 0 or not EVEN:
            pixel = tl.where((row + i >= 0)[:, None], pixel, 0.0)
        if i == COUNT - 1 or not EVEN:
            pixel = tl.where((row + i < H)[:, None], pixel, 0.0)
        shifted = shifted + (pixel,)
    return shifted


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
def pixels_at(x, image, c, row, column, stride_image, stride_channel, stride_row, stride_column):
    """Pointers [STRIPS, CHANNELS] to the pixels of a column at the rows `row` [STRIPS]."""
    x += image * stride_image + tl.cast(column, tl.int64) * stride_column
    return x + (row.to(tl.int64) * stride_row)[:, None] + (c.to(tl.int64) * stride_channel)[None, :]


@triton.jit
def load_channels(vector, c, C, ACCUMULATOR: tl.constexpr):
    """A parameter (C,) at the channels c as [1, CHANNELS]."""
    return tl.load(vector + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :]


@triton.jit(do_not_specialize=["span"])
def residual_depthwise_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    weight,  # (C, 1, 3, 3)
    bias,  # (C,)
    x_bias,  # (C,)
    y, y_image, y_channel, y_row, y_column,  # (B, C, H, W)
    H, W, C, span, GELU: tl.constexpr, ERF: tl.constexpr, BIAS: tl.constexpr, X_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: STRIPS strips of ROWS rows, `span` columns, CHANNELS channels of an image."""
    image, row, first, last, c, _ = strips_of_program(H, W, C, span, ROWS, STRIPS, CHANNELS)
    inside = ((c < C) | WHOLE)[None, :]
    taps = load_taps(weight, c, C, ACCUMULATOR)
    start = tl.zeros([STRIPS, CHANNELS], ACCUMULATOR)
    if BIAS:
        start += load_channels(bias, c, C, ACCUMULATOR)
    if X_BIAS:
        shift = load_channels(x_bias, c, C, ACCUMULATOR)
    ending, middle = (), ()  # sums of the columns left of and at the one that is loaded
    for _j in tl.static_range(ROWS):
        ending = ending + (start,)
        middle = middle + (start,)
    # A column outside the image adds nothing.
    leftmost = tl.maximum(first - 1, 0)
    x = pixels_at(x, image, c, row - 1, leftmost, x_image, x_channel, x_row, x_column)
    y = pixels_at(y, image, c, row, leftmost - 1, y_image, y_channel, y_row, y_column)
    for column in range(leftmost, tl.minimum(last + 2, W)):
        h = load_column(x, x_row, row - 1, inside, H, EVEN, ROWS + 2, ACCUMULATOR)
        if X_BIAS:
            h = shift_column(h, shift, row - 1, H, EVEN, ROWS + 2)
        if GELU:
            activated = ()
            for i in tl.static_range(ROWS + 2):
                activated = activated + (gelu(h[i], ERF),)
            h = activated
        next_ending, next_middle = (), ()
        for j in tl.static_range(ROWS):
            ended = ending[j] + taps[2] * h[j] + taps[5] * h[j + 1] + taps[8] * h[j + 2]
            written = inside & ((row + j < H) | EVEN)[:, None] & (column > first)
            tl.store(y + tl.cast(y_row, tl.int64) * j, ended.to(y.dtype.element_ty), mask=written)
            next_ending = next_ending + (middle[j] + taps[1] * h[j] + taps[4] * h[j + 1] + taps[7] * h[j + 2],)
            next_middle = next_middle + (start + taps[0] * h[j] + taps[3] * h[j + 1] + taps[6] * h[j + 2],)
        ending, middle = next_ending, next_middle
        x += x_column
        y += y_column
    for j in tl.static_range(ROWS):
        written = inside & ((row + j < H) | EVEN)[:, None] & (last + 1 == W)
        tl.store(y + tl.cast(y_row, tl.int64) * j, ending[j].to(y.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["span"])
def residual_depthwise_backward_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    weight,  # (C, 1, 3, 3)
    x_bias,  # (C,)
    dy, dy_image, dy_channel, dy_row, dy_column,  # (B, C, H, W)
    dx, dx_image, dx_channel, dx_row, dx_column,  # (B, C, H, W)
    partial,  # (parts, 10 + X_BIAS, C)
    H, W, C, span, GELU: tl.constexpr, ERF: tl.constexpr, X_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: STRIPS strips of ROWS rows, `span` columns, CHANNELS channels of an image.

    With D the 3 x 3 neighbourhood of dy, mirrored: the gradient of h is the sum of taps x D, and the taps' gradients
    are the sums of h x D. Writes dx and this program's sums: 9 of the taps, one of the bias, one of x_bias.
    """
    image, row, first, last, c, part = strips_of_program(H, W, C, span, ROWS, STRIPS, CHANNELS)
    inside = ((c < C) | WHOLE)[None, :]
    taps = load_taps(weight, c, C, ACCUMULATOR)
    if X_BIAS:
        shift = load_channels(x_bias, c, C, ACCUMULATOR)
    nothing = tl.zeros([STRIPS, CHANNELS], ACCUMULATOR)
    sums = ()
    for _k in tl.static_range(10):
        sums = sums + (nothing,)
    sum_x = nothing
    x = pixels_at(x, image, c, row, first, x_image, x_channel, x_row, x_column)
    dx = pixels_at(dx, image, c, row, first, dx_image, dx_channel, dx_row, dx_column)
    dy = pixels_at(dy, image, c, row - 1, first, dy_image, dy_channel, dy_row, dy_column)
    left = load_column(dy - dy_column, dy_row, row - 1, inside & (first > 0), H, EVEN, ROWS + 2, ACCUMULATOR)
    here = load_column(dy, dy_row, row - 1, inside, H, EVEN, ROWS + 2, ACCUMULATOR)
    for column in range(first, last + 1):
        dy += dy_column
        right = load_column(dy, dy_row, row - 1, inside & (column + 1 < W), H, EVEN, ROWS + 2, ACCUMULATOR)
        for j in tl.static_range(ROWS):
            in_image = ((row + j < H) | EVEN)[:, None]
            seen = inside & in_image
            h = tl.load(x + tl.cast(x_row, tl.int64) * j, mask=seen, other=0.0).to(ACCUMULATOR)
            if X_BIAS:
                h = tl.where(in_image, h + shift, 0.0)
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
            sums = added + (sums[9] + tl.where(in_image, d[4], 0.0),)
            if GELU:
                slope *= steepness
            rounded = slope.to(dx.dtype.element_ty)
            if X_BIAS:  # of what is written, so that a product of it can cancel the sum (batch_norm_conv.py)
                sum_x += tl.where(in_image, rounded.to(ACCUMULATOR), 0.0)
            tl.store(dx + tl.cast(dx_row, tl.int64) * j, rounded, mask=seen)
        left, here = here, right
        x += x_column
        dx += dx_column
    partial += part * (10 + X_BIAS) * C + c
    for k in tl.static_range(10):
        tl.store(partial + k * C, tl.sum(sums[k], axis=0), mask=c < C)
    if X_BIAS:
        tl.store(partial + 10 * C, tl.sum(sum_x, axis=0), mask=c < C)


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
    sizes = ROWS if x.element_size() == 2 else ROWS[2:]  # erf takes more registers, float64 twice as many
    rows = min(sizes, key=lambda rows: -(-height // rows) * (rows + 2))
    block = min(CHANNELS, max(16, configs.power_of_two(channels)))
    strips = max(1, min(64 // block, configs.power_of_two(-(-height // rows))))
    warps = max(1, block * strips // 64)
    walks = batch * -(-height // (rows * strips)) * -(-channels // block)
    spans = max(-(-width // SPAN), min(width // SHORTEST, WARPS // max(1, walks * warps)))
    span = -(-width // max(1, spans))
    parts = batch * -(-height // (rows * strips)) * -(-width // span)
    return Plan(
        parts, parts * -(-channels // block), span, rows, strips, block,
        height % (rows * strips) == 0, channels % block == 0, warps,
    )  # fmt: skip


def residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, x_bias: Tensor | None) -> Tensor:
    """y (B, C, H, W) in x's format; weight (C, 1, 3, 3), bias and x_bias (C,) in any floating dtype."""
    batch, channels, height, width = x.shape
    y = empty_pixels(x, channels, height, width, is_channels_last(x))
    cut = plan(x)
    if cut.programs:
        with torch.cuda.device_of(x):
            residual_depthwise_kernel[(cut.programs,)](
                x, *x.stride(), weight.contiguous(), weight if bias is None else bias.contiguous(),
                weight if x_bias is None else x_bias.contiguous(), y, *y.stride(), height, width, channels, cut.span,
                GELU=gelu, ERF=x.element_size() > 2, BIAS=bias is not None, X_BIAS=x_bias is not None,
                ACCUMULATOR=configs.accumulator(x), EVEN=cut.even, WHOLE=cut.whole,
                ROWS=cut.rows, STRIPS=cut.strips, CHANNELS=cut.channels, num_warps=cut.warps,
            )  # fmt: skip
    return y


def residual_depthwise_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, gelu: bool, x_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dx in x's format, dweight (C, 1, 3, 3), dbias (C,), dx_bias (C,) where there is one).

    Sums are taken in float32 or wider and given in weight's dtype, that of x_bias in its own.
    """
    batch, channels, height, width = x.shape
    grad_x = empty_pixels(x, channels, height, width, is_channels_last(x))
    grad_weight, grad_bias = weight.new_empty((channels, 1, 3, 3)), weight.new_empty((channels,))
    grad_x_bias = None if x_bias is None else torch.empty_like(x_bias)
    cut = plan(x)
    partial = x.new_empty((cut.parts, 10 + (x_bias is not None), channels), dtype=accumulator(x.dtype))
    if cut.programs:
        with torch.cuda.device_of(x):
            residual_depthwise_backward_kernel[(cut.programs,)](
                x, *x.stride(), weight.contiguous(), weight if x_bias is None else x_bias.contiguous(),
                grad_y, *grad_y.stride(), grad_x, *grad_x.stride(), partial, height, width, channels, cut.span,
                GELU=gelu, ERF=x.element_size() > 2, X_BIAS=x_bias is not None,
                ACCUMULATOR=configs.accumulator(x), EVEN=cut.even, WHOLE=cut.whole,
                ROWS=cut.rows, STRIPS=cut.strips, CHANNELS=cut.channels, num_warps=cut.warps,
            )  # fmt: skip
    add_parts(partial, grad_weight, grad_bias, grad_x_bias)
    return grad_x, grad_weight, grad_bias, grad_x_bias
