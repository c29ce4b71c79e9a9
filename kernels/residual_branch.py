"""The end of a branch with Triton: x + keep * gamma * y, LayerScale and drop-path included; forward and backward.

Bytes, X being those of x: forward reads 2 X, writes 1 X; backward reads 1 X (dout), with gamma 2 X (dout and y), writes
1 X (dy), and with gamma one sum a channel and program, float32, that are added up in a fixed order: no atomics. dx is
dout itself. Eager PyTorch moves 2 X more for drop-path and 2 X more for LayerScale, each way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tensors import accumulator, empty_pixels, is_channels_last
from . import configs
from .channel_layer_norm import PROGRAMS, index, rows_at
from .partial_sums import add_parts

ELEMENTS = 1024  # numbers that a program of 4 warps holds at a time; twice as many spill on compute capability 8.0


@triton.jit
def residual_branch_kernel(
    x, xb, xc, xh, xw, y, yb, yc, yh, yw, gamma, keep, out, ob, oc, oh, ow, pixels, H, W, C,
    GAMMA: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS pixels, CHANNELS channels. ADD: out = x + keep gamma y; otherwise out = keep gamma y, which
    is the backward with dout for y."""
    blocks = tl.cdiv(C, CHANNELS)
    r = (tl.program_id(0) // blocks).to(INDEX) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    seen = (r < pixels)[:, None] & (c < C)[None, :]
    at = rows_at(r, H, W, yb, yh, yw)[:, None] + c.to(tl.int64)[None, :] * yc
    branch = tl.load(y + at, mask=seen, other=0.0).to(ACCUMULATOR)
    if GAMMA:
        branch *= tl.load(gamma + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :]
    if KEEP:
        branch *= tl.load(keep + r // W // H, mask=r < pixels, other=0.0).to(ACCUMULATOR)[:, None]
    if ADD:
        at = rows_at(r, H, W, xb, xh, xw)[:, None] + c.to(tl.int64)[None, :] * xc
        branch += tl.load(x + at, mask=seen, other=0.0).to(ACCUMULATOR)
    at = rows_at(r, H, W, ob, oh, ow)[:, None] + c.to(tl.int64)[None, :] * oc
    tl.store(out + at, branch.to(out.dtype.element_ty), mask=seen)


@triton.jit
def residual_branch_backward_kernel(
    dout, db, dc, dh, dw, y, yb, yc, yh, yw, gamma, keep, dy, eb, ec, eh, ew, partial, pixels, H, W, C, count,
    KEEP: tl.constexpr, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: `count` blocks of ROWS pixels, CHANNELS channels. Writes dy = keep * gamma * dout, and the sum of
    keep * dout * y, the gradient of gamma, to partial (part, C)."""
    blocks = tl.cdiv(C, CHANNELS)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    scale = tl.load(gamma + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :]
    total = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    for i in range(0, count):
        r = (part.to(INDEX) * count + i) * ROWS + tl.arange(0, ROWS)
        seen = (r < pixels)[:, None] & (c < C)[None, :]
        at = rows_at(r, H, W, db, dh, dw)[:, None] + c.to(tl.int64)[None, :] * dc
        slope = tl.load(dout + at, mask=seen, other=0.0).to(ACCUMULATOR)
        if KEEP:
            slope *= tl.load(keep + r // W // H, mask=r < pixels, other=0.0).to(ACCUMULATOR)[:, None]
        at = rows_at(r, H, W, eb, eh, ew)[:, None] + c.to(tl.int64)[None, :] * ec
        tl.store(dy + at, (slope * scale).to(dy.dtype.element_ty), mask=seen)
        at = rows_at(r, H, W, yb, yh, yw)[:, None] + c.to(tl.int64)[None, :] * yc
        total += slope * tl.load(y + at, mask=seen, other=0.0).to(ACCUMULATOR)
    tl.store(partial + part * C + c, tl.sum(total, axis=0), mask=c < C)


def _blocks(channels: int) -> tuple[int, int]:
    """Pixels and channels a block, both powers of two."""
    width = min(256, configs.power_of_two(channels))
    return ELEMENTS // width, width


def _scaled(x: Tensor | None, y: Tensor, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """keep * gamma * y, plus x where there is one, in `dtype` and the format of x, else of y."""
    batch, channels, height, width = y.shape
    like = y if x is None else x
    out = empty_pixels(like, channels, height, width, is_channels_last(like), dtype)
    rows, block = _blocks(channels)
    pixels = batch * height * width
    if pixels:
        with torch.cuda.device_of(y):
            residual_branch_kernel[(triton.cdiv(pixels, rows) * triton.cdiv(channels, block),)](
                like, *like.stride(), y, *y.stride(), y if gamma is None else gamma.contiguous(),
                y if keep is None else keep.contiguous(), out, *out.stride(), pixels, height, width, channels,
                gamma is not None, keep is not None, x is not None,
                configs.accumulator(out), index(pixels), rows, block, num_warps=4,
            )  # fmt: skip
    return out


def residual_branch(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + keep * gamma * y (B, C, H, W) in `dtype` and x's format; gamma (C,) or None, keep (B,) or None."""
    return _scaled(x, y, gamma, keep, dtype)


def residual_branch_backward(
    grad: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(dy in `dtype` and dout's format, dgamma (C,) in gamma's dtype or None); dgamma is summed in float32 or wider."""
    if gamma is None:
        return _scaled(None, grad, None, keep, dtype), None
    assert y is not None, "y is saved where gamma wants a gradient"
    batch, channels, height, width = grad.shape
    grad_y = empty_pixels(grad, channels, height, width, is_channels_last(grad), dtype)
    rows, block = _blocks(channels)
    pixels = batch * height * width
    count = max(1, triton.cdiv(triton.cdiv(pixels, rows), PROGRAMS))
    parts = triton.cdiv(pixels, rows * count)
    partial = grad.new_empty((parts, 1, channels), dtype=accumulator(grad.dtype))
    if parts:
        with torch.cuda.device_of(grad):
            residual_branch_backward_kernel[(parts * triton.cdiv(channels, block),)](
                grad, *grad.stride(), y, *y.stride(), gamma.contiguous(), y if keep is None else keep.contiguous(),
                grad_y, *grad_y.stride(), partial, pixels, height, width, channels, count,
                keep is not None, configs.accumulator(grad), index(pixels), rows, block, num_warps=4,
            )  # fmt: skip
    grad_gamma = torch.empty_like(gamma)
    add_parts(partial, grad_gamma)
    return grad_y, grad_gamma
