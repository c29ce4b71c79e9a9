"""Super tokens to pixels: every pixel the weighted sum of its 9 neighbouring super tokens, and what is added to it.

Bytes, X being those of the pixels written: the weights, 9 numbers a pixel, read once; 1 X written, and 1 X read where a
residual is added. The super tokens, X / (h * w), come from the cache after the first of nine reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import EPSILON, dot, load_block, offsets, store_block, tile_corner, tile_pixels


@triton.jit
def tokens_to_pixels_kernel(
    weights,  # (B, H, W, 9)
    tokens, tokens_stride_b, tokens_stride_c, tokens_stride_h, tokens_stride_w,  # (B, C, gh, gw)
    mass,  # (B, gh, gw), read if NORMALIZE
    weights2,  # (B, H, W, 9), read if SECOND
    tokens2, tokens2_stride_b, tokens2_stride_c, tokens2_stride_h, tokens2_stride_w,  # (B, C, gh, gw), read if SECOND
    means,  # (B, gh, gw, C), read if MEANS
    residual, residual_stride_b, residual_stride_c, residual_stride_h, residual_stride_w,  # (B, C, H, W), if RESIDUAL
    pixels, pixels_stride_b, pixels_stride_c, pixels_stride_h, pixels_stride_w,  # (B, C, H, W), written
    H, W, gh, gw,
    C: tl.constexpr, scale2: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    NORMALIZE: tl.constexpr, SECOND: tl.constexpr, MEANS: tl.constexpr, RESIDUAL: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: one tile. NORMALIZE divides the weights by the mass of the tokens; SECOND adds scale2 * weights2 x
    tokens2; MEANS adds the tile's entry of `means` / (h * w), the backward of pooling; RESIDUAL adds `residual`."""
    tile = tl.program_id(0)
    column = tile % gw
    row = (tile // gw) % gh
    image = (tile // gw // gh).to(tl.int64)
    k = tl.arange(0, 16)
    up, left = k // 3 - 1, k % 3 - 1
    inside = (k < 9) & (row + up >= 0) & (row + up < gh) & (column + left >= 0) & (column + left < gw)
    place = (image * gh + row) * gw + column
    centre = tokens + tile_corner(image, row, column, 1, 1, tokens_stride_b, tokens_stride_h, tokens_stride_w)
    around = offsets(up, left, tokens_stride_h, tokens_stride_w, INDEX)
    centre2 = tokens2 + tile_corner(image, row, column, 1, 1, tokens2_stride_b, tokens2_stride_h, tokens2_stride_w)
    around2 = offsets(up, left, tokens2_stride_h, tokens2_stride_w, INDEX)
    corner = pixels + tile_corner(image, row, column, h, w, pixels_stride_b, pixels_stride_h, pixels_stride_w)
    corner_residual = residual + tile_corner(
        image, row, column, h, w, residual_stride_b, residual_stride_h, residual_stride_w
    )
    first_weight = tile_corner(image, row, column, h, w, tl.cast(H, tl.int64) * W, W, 1) * 9
    if NORMALIZE:
        m = tl.load(mass + place + up * gw + left, mask=inside, other=1.0) + EPSILON
    for start in range(0, h * w, PIXELS):
        y, x, seen = tile_pixels(row, column, start + tl.arange(0, PIXELS), h, w, H, W)
        places = offsets(y, x, pixels_stride_h, pixels_stride_w, INDEX)
        at = first_weight + (offsets(y, x, W, 1, INDEX) * 9)[:, None] + k[None, :]
        known = seen[:, None] & (k < 9)[None, :]
        share = tl.load(weights + at, mask=known, other=0.0)
        if NORMALIZE:  # at most 1, where a token divided by its mass may overflow
            share = (share.to(ACCUMULATOR) * (1.0 / m)[None, :]).to(share.dtype)
        if SECOND:
            share2 = tl.load(weights2 + at, mask=known, other=0.0)
        for channel in tl.static_range(0, C, CHANNELS):
            c = channel + tl.arange(0, CHANNELS)
            near = load_block(centre, around, inside, c, tokens_stride_c, C)
            block = dot(share, near, ACCUMULATOR)
            if SECOND:
                near2 = load_block(centre2, around2, inside, c, tokens2_stride_c, C)
                block += scale2 * dot(share2, near2, ACCUMULATOR)
            if MEANS:
                mean = tl.load(means + place * C + c, mask=c < C, other=0.0).to(ACCUMULATOR) / (h * w)
                block += mean[None, :]
            if RESIDUAL:
                rows = offsets(y, x, residual_stride_h, residual_stride_w, INDEX)
                block += load_block(corner_residual, rows, seen, c, residual_stride_c, C).to(ACCUMULATOR)
            store_block(block, corner, places, seen, c, pixels_stride_c, C)


def tokens_to_pixels(
    weights: Tensor,  # (B, 9, H, W) of memory (B, H, W, 9)
    tokens: Tensor,  # (B, C, gh, gw)
    pixels: Tensor,  # (B, C, H, W), written
    h: int, w: int, *,
    mass: Tensor | None = None,  # (B, 1, gh, gw): divide by it
    second: tuple[Tensor, Tensor, float] | None = None,  # weights, tokens and scale of a second sum
    means: Tensor | None = None,  # (B, gh, gw, C): add means / (h * w) of the tile
    residual: Tensor | None = None,  # (B, C, H, W): add it
) -> None:  # fmt: skip
    """Writes into `pixels` the sum over k of weights[k] * tokens[neighbour k]."""
    batch, channels, height, width = pixels.shape
    gh, gw = tokens.shape[2:]
    config = configs.blocks(tokens, h * w)
    added = pixels if residual is None else residual
    weights2, tokens2, scale2 = second or (weights, tokens, 0.0)
    programs = batch * gh * gw
    if programs == 0:
        return
    # Half the walk's warps, where one sum of 16-bit numbers leaves the registers for it.
    warps = config.warps if second or tokens.element_size() > 2 else max(1, config.warps // 2)
    index = configs.index(
        configs.extent(tokens, 3, 3), configs.extent(tokens2, 3, 3), configs.extent(pixels, h, w),
        configs.extent(added, h, w), 9 * h * width,
    )  # fmt: skip
    with torch.cuda.device_of(pixels):
        tokens_to_pixels_kernel[(programs,)](
            weights, tokens, *tokens.stride(), weights if mass is None else mass,
            weights2, tokens2, *tokens2.stride(), weights if means is None else means,
            added, *added.stride(), pixels, *pixels.stride(),
            height, width, gh, gw, C=channels, scale2=scale2, h=h, w=w,
            NORMALIZE=mass is not None, SECOND=second is not None, MEANS=means is not None,
            RESIDUAL=residual is not None, ACCUMULATOR=configs.accumulator(tokens), INDEX=index,
            PIXELS=config.pixels, CHANNELS=config.channels, num_warps=warps,
        )  # fmt: skip
