"""Initial super tokens: the mean over each tile. Reads X once, writes X / (h * w)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import load_block, offsets, tile_corner, tile_pixels


@triton.jit
def pooling_kernel(
    x, x_stride_b, x_stride_c, x_stride_h, x_stride_w,  # (B, C, H, W)
    pooled,  # (B, gh, gw, C), written
    H, W, gh, gw,
    C: tl.constexpr, h: tl.constexpr, w: tl.constexpr, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: one tile, one block of channels."""
    parts: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    tile = program // parts
    column = tile % gw
    row = (tile // gw) % gh
    image = (tile // gw // gh).to(tl.int64)
    c = program % parts * CHANNELS + tl.arange(0, CHANNELS)
    corner = x + tile_corner(image, row, column, h, w, x_stride_b, x_stride_h, x_stride_w)
    total = tl.zeros([CHANNELS], ACCUMULATOR)
    for start in range(0, h * w, PIXELS):
        py, px, seen = tile_pixels(row, column, start + tl.arange(0, PIXELS), h, w, H, W)
        block = load_block(corner, offsets(py, px, x_stride_h, x_stride_w, INDEX), seen, c, x_stride_c, C)
        total += tl.sum(block.to(ACCUMULATOR), axis=0)
    mean = total / (h * w)
    tl.store(pooled + tile.to(tl.int64) * C + c, mean.to(pooled.dtype.element_ty), mask=c < C)


def pooling(x: Tensor, h: int, w: int, gh: int, gw: int) -> Tensor:
    """Means of the zero-padded tiles of x (B, C, H, W): (B, gh, gw, C), contiguous, in x's dtype."""
    batch, channels, height, width = x.shape
    pooled = x.new_empty((batch, gh, gw, channels))
    config = configs.pooling(x, h * w)
    programs = batch * gh * gw * -(-channels // config.channels)
    if programs:
        with torch.cuda.device_of(x):
            pooling_kernel[(programs,)](
                x, *x.stride(), pooled, height, width, gh, gw, C=channels, h=h, w=w,
                ACCUMULATOR=configs.accumulator(x), INDEX=configs.index(configs.extent(x, h, w)),
                PIXELS=config.pixels, CHANNELS=config.channels, num_warps=config.warps,
            )  # fmt: skip
    return pooled
