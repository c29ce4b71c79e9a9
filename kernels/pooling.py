"""Initial super tokens: the mean over each tile. Reads X once, writes X / (h * w)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import tile_pixels


@triton.jit
def pooling_kernel(
    x, sb, sc, sh, sw, pooled, H, W, C, gh, gw,
    h: tl.constexpr, w: tl.constexpr, ACCUMULATOR: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: one tile, one block of channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)
    tile = program // blocks
    column = tile % gw
    row = (tile // gw) % gh
    image = (tile // gw // gh).to(tl.int64)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], ACCUMULATOR)
    for start in range(0, h * w, PIXELS):
        py, px, seen = tile_pixels(row, column, start + tl.arange(0, PIXELS), h, w, H, W)
        block = tl.load(
            x + image * sb + (py * sh + px * sw)[:, None] + c.to(tl.int64)[None, :] * sc,
            mask=seen[:, None] & (c < C)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.sum(block.to(ACCUMULATOR), axis=0)
    mean = total / (h * w)
    tl.store(pooled + tile.to(tl.int64) * C + c, mean.to(pooled.dtype.element_ty), mask=c < C)


def pooling(x: Tensor, h: int, w: int, gh: int, gw: int) -> Tensor:
    """Means of the zero-padded tiles of x (B, C, H, W): (B, gh, gw, C), contiguous, in x's dtype."""
    batch, channels, height, width = x.shape
    pooled = x.new_empty((batch, gh, gw, channels))
    config = configs.blocks(x, h * w)
    programs = batch * gh * gw * triton.cdiv(channels, config.channels)
    if programs:
        with torch.cuda.device_of(x):
            pooling_kernel[(programs,)](
                x, *x.stride(), pooled, height, width, channels, gh, gw, h, w,
                configs.accumulator(x), config.pixels, config.channels, num_warps=config.warps,
            )  # fmt: skip
    return pooled
