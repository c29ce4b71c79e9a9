"""The end of a branch with Triton: x + keep * gamma * (y + bias): LayerScale, drop-path and the bias of the 1x1
convolution in front included; forward and backward.

Bytes, X being those of x: forward reads 2 X, writes 1 X; backward reads 1 X (dout), with gamma 2 X (dout and y), writes
1 X (dy), and with gamma or bias one sum each a channel and program, float32, that are added up in a fixed order: no
atomics. dx is dout itself, and so is dy without gamma and keep, when only the bias's sum is taken. Eager PyTorch moves
2 X more for drop-path, 2 X more for LayerScale, each way, and for the bias 2 X more forward and 1 X backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import accumulator, empty_pixels, is_channels_last
from . import configs
from .channel_layer_norm import FEWEST, cut, index, rows_at
from .partial_sums import add_parts

ELEMENTS = 1024  # numbers that a program of 4 warps holds at a time; twice as many spill on compute capability 8.0
PROGRAMS = 1024  # that sum over pixels at the most: at the end of each its sums cross its warps, with bank conflicts


@triton.jit
def load_channels(vector, c, C, ACCUMULATOR: tl.constexpr):
    """A parameter (C,) at the channels c as [1, CHANNELS]."""
    return tl.load(vector + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :]


@triton.jit
def load_factors(keep, r, H, W, pixels, ACCUMULATOR: tl.constexpr):
    """The drop-path factors (B,) of the pixels r as [ROWS, 1]."""
    return tl.load(keep + r // W // H, mask=r < pixels, other=0.0).to(ACCUMULATOR)[:, None]


@triton.jit(do_not_specialize=["pixels"])
def residual_branch_kernel(
    x, x_image, x_channel, x_row, x_column,  # (B, C, H, W) and its strides
    y, y_image, y_channel, y_row, y_column,  # (B, C, H, W)
    gamma, bias,  # (C,)
    keep,  # (B,)
    out, out_image, out_channel, out_row, out_column,  # (B, C, H, W)
    pixels, H, W, C, GAMMA: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS pixels, CHANNELS channels. ADD: out = x + keep gamma (y + bias); otherwise without x, which
    is the backward with dout for y."""
    blocks = tl.cdiv(C, CHANNELS)
    r = (tl.program_id(0) // blocks).to(INDEX) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    seen = (r < pixels)[:, None] & (c < C)[None, :]
    at = rows_at(r, H, W, y_image, y_row, y_column)[:, None] + c.to(tl.int64)[None, :] * y_channel
    branch = tl.load(y + at, mask=seen, other=0.0).to(ACCUMULATOR)
    if BIAS:
        branch += load_channels(bias, c, C, ACCUMULATOR)
    if GAMMA:
        branch *= load_channels(gamma, c, C, ACCUMULATOR)
    if KEEP:
        branch *= load_factors(keep, r, H, W, pixels, ACCUMULATOR)
    if ADD:
        at = rows_at(r, H, W, x_image, x_row, x_column)[:, None] + c.to(tl.int64)[None, :] * x_channel
        branch += tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR)
    at = rows_at(r, H, W, out_image, out_row, out_column)[:, None] + c.to(tl.int64)[None, :] * out_channel
    tl.store(out + at, branch.to(out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["pixels", "count"])
def residual_branch_backward_kernel(
    dout, dout_image, dout_channel, dout_row, dout_column,  # (B, C, H, W) and its strides
    y, y_image, y_channel, y_row, y_column,  # (B, C, H, W)
    gamma, bias,  # (C,)
    keep,  # (B,)
    dy, dy_image, dy_channel, dy_row, dy_column,  # (B, C, H, W)
    partial,  # (parts, GAMMA + BIAS, C)
    pixels, H, W, C, count, GAMMA: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, WRITE: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: `count` blocks of ROWS pixels, CHANNELS channels. Writes dy = keep * gamma * dout (WRITE), and
    the sums of keep * dout * (y + bias), the gradient of gamma, and of dy, the gradient of bias."""
    blocks = tl.cdiv(C, CHANNELS)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    sum_gamma = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    sum_slope = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    for i in range(0, count):
        r = (part.to(INDEX) * count + i) * ROWS + tl.arange(0, ROWS)
        seen = (r < pixels)[:, None] & (c < C)[None, :]
        at = rows_at(r, H, W, dout_image, dout_row, dout_column)[:, None] + c.to(tl.int64)[None, :] * dout_channel
        slope = tl.load(dout + at, mask=seen, other=0.0).to(ACCUMULATOR)
        if KEEP:
            slope *= load_factors(keep, r, H, W, pixels, ACCUMULATOR)
        sum_slope += slope
        if GAMMA:
            at = rows_at(r, H, W, y_image, y_row, y_column)[:, None] + c.to(tl.int64)[None, :] * y_channel
            sum_gamma += slope * tl.load(y + at, mask=seen, other=0.0).to(ACCUMULATOR)
            slope *= load_channels(gamma, c, C, ACCUMULATOR)
        if WRITE:
            at = rows_at(r, H, W, dy_image, dy_row, dy_column)[:, None] + c.to(tl.int64)[None, :] * dy_channel
            tl.store(dy + at, slope.to(dy.dtype.element_ty), mask=seen)
    partial += part * (GAMMA + BIAS) * C + c
    slopes, products = tl.sum(sum_slope, axis=0), tl.sum(sum_gamma, axis=0)  # of keep dout, of keep dout y
    if GAMMA:
        if BIAS:
            shift = tl.load(bias + c, mask=c < C, other=0.0).to(ACCUMULATOR)
            products += slopes * shift
            slopes *= tl.load(gamma + c, mask=c < C, other=0.0).to(ACCUMULATOR)
        tl.store(partial, products, mask=c < C)
    if BIAS:
        tl.store(partial + GAMMA * C, slopes, mask=c < C)


def blocks_of(channels: int) -> tuple[int, int]:
    """Pixels and channels a block, both powers of two; few lanes without a channel."""
    width = cut(channels).unit
    return ELEMENTS // width, width


class Split(NamedTuple):
    """How sums over pixels are shared: parts x across programs, each of `count` blocks of rows x channels."""

    rows: int
    channels: int
    count: int
    parts: int
    across: int


def split(x: Tensor) -> Split:
    """Of the pixels x (B, C, H, W): at most PROGRAMS programs, none of fewer than FEWEST pixels."""
    rows, block = blocks_of(x.shape[1])
    pixels, across = x.numel() // x.shape[1], -(-x.shape[1] // block)
    count = max(1, -(-pixels * across // (rows * PROGRAMS)), FEWEST // rows)
    return Split(rows, block, count, -(-pixels // (rows * count)), across)


def residual_branch(
    x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x + keep * gamma * (y + bias) (B, C, H, W) in `dtype` and x's format; gamma, bias (C,), keep (B,), or None."""
    return _scaled(x, y, gamma, keep, bias, dtype)


def _scaled(
    x: Tensor | None,
    y: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """keep * gamma * (y + bias), plus x where there is one, in `dtype` and the format of x, else of y."""
    batch, channels, height, width = y.shape
    like = y if x is None else x
    out = empty_pixels(like, channels, height, width, is_channels_last(like), dtype)
    rows, block = blocks_of(channels)
    pixels = batch * height * width
    if pixels:
        with torch.cuda.device_of(y):
            residual_branch_kernel[(-(-pixels // rows) * -(-channels // block),)](
                like, *like.stride(), y, *y.stride(), y if gamma is None else gamma.contiguous(),
                y if bias is None else bias.contiguous(), y if keep is None else keep.contiguous(), out, *out.stride(),
                pixels, height, width, channels,
                GAMMA=gamma is not None, BIAS=bias is not None, KEEP=keep is not None, ADD=x is not None,
                ACCUMULATOR=configs.accumulator(out), INDEX=index(pixels), ROWS=rows, CHANNELS=block, num_warps=4,
            )  # fmt: skip
    return out


def residual_branch_backward(
    grad: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dy in `dtype` and dout's format, dgamma (C,), dbias (C,)), the last two where there is a gamma or a bias, in the
    dtype of each and summed in float32 or wider. dy is None where it is dout: without gamma and keep."""
    if gamma is None and bias is None:
        return _scaled(None, grad, None, keep, None, dtype), None, None
    assert gamma is None or y is not None, "y is saved where gamma wants a gradient"
    batch, channels, height, width = grad.shape
    write = gamma is not None or keep is not None
    grad_y = empty_pixels(grad, channels, height, width, is_channels_last(grad), dtype) if write else None
    outputs = [None if parameter is None else torch.empty_like(parameter) for parameter in (gamma, bias)]
    rows, block, count, parts, across = split(grad)
    pixels = batch * height * width
    given = [output for output in outputs if output is not None]
    partial = grad.new_empty((parts, len(given), channels), dtype=accumulator(grad.dtype))
    y, dy = grad if y is None else y, grad if grad_y is None else grad_y
    if parts:
        with torch.cuda.device_of(grad):
            residual_branch_backward_kernel[(parts * across,)](
                grad, *grad.stride(), y, *y.stride(), y if gamma is None else gamma.contiguous(),
                y if bias is None else bias.contiguous(), y if keep is None else keep.contiguous(),
                dy, *dy.stride(), partial, pixels, height, width, channels, count,
                GAMMA=gamma is not None, BIAS=bias is not None, KEEP=keep is not None, WRITE=write,
                ACCUMULATOR=configs.accumulator(grad), INDEX=index(pixels), ROWS=rows, CHANNELS=block, num_warps=4,
            )  # fmt: skip
    add_parts(partial, *given)
    return grad_y, outputs[0], outputs[1]
