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
from .tiles import dot, load_tokens, tile_pixels


@triton.jit
def tokens_to_pixels_kernel(
    weights, tokens, tb, tc, th, tw, mass, weights2, tokens2, sb, sc, sh, sw, means, pixels, pb, pc, ph, pw,
    H, W, C, gh, gw, scale2: tl.constexpr,
    residual, rb, rc, rh, rw,
    h: tl.constexpr, w: tl.constexpr, NORMALIZE: tl.constexpr, SECOND: tl.constexpr, MEANS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: one tile, one block of channels. SECOND adds scale2 * weights2 x tokens2; MEANS adds the tile's
    entry of `means` (B, gh, gw, C) / (h * w), the backward of pooling; RESIDUAL adds the pixels of `residual`."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)
    tile = program // blocks
    column = tile % gw
    row = (tile // gw) % gh
    image = (tile // gw // gh).to(tl.int64)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    k = tl.arange(0, 16)
    token_row = row + k // 3 - 1
    token_column = column + k % 3 - 1
    inside = (k < 9) & (token_row >= 0) & (token_row < gh) & (token_column >= 0) & (token_column < gw)
    near = load_tokens(
        tokens + image * tb, tc, th, tw, mass, image, token_row, token_column, inside, c, gh, gw, C, NORMALIZE
    )
    if SECOND:
        near2 = load_tokens(
            tokens2 + image * sb, sc, sh, sw, mass, image, token_row, token_column, inside, c, gh, gw, C, False
        )
    for start in range(0, h * w, PIXELS):
        py, px, seen = tile_pixels(row, column, start + tl.arange(0, PIXELS), h, w, H, W)
        at = ((image * H + py) * W + px)[:, None] * 9 + k[None, :]
        known = seen[:, None] & (k < 9)[None, :]
        block = dot(tl.load(weights + at, mask=known, other=0.0), near, ACCUMULATOR)
        if SECOND:
            block += scale2 * dot(tl.load(weights2 + at, mask=known, other=0.0), near2, ACCUMULATOR)
        if MEANS:
            mean = tl.load(means + tile.to(tl.int64) * C + c, mask=c < C, other=0.0).to(ACCUMULATOR) / (h * w)
            block += mean[None, :]
        if RESIDUAL:
            at = image * rb + (py * rh + px * rw)[:, None] + c.to(tl.int64)[None, :] * rc
            block += tl.load(residual + at, mask=seen[:, None] & (c < C)[None, :], other=0.0).to(ACCUMULATOR)
        tl.store(
            pixels + image * pb + (py * ph + px * pw)[:, None] + c.to(tl.int64)[None, :] * pc,
            block.to(pixels.dtype.element_ty), mask=seen[:, None] & (c < C)[None, :],
        )  # fmt: skip


def tokens_to_pixels(
    weights: Tensor,  # (B, 9, H, W) of memory (B, H, W, 9)
    tokens: Tensor,  # (B, C, gh, gw)
    pixels: Tensor,  # (B, C, H, W), written
    h: int, w: int, *,
    mass: Tensor | None = None,  # (B, 1, gh, gw): divide the tokens by it
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
    programs = batch * gh * gw * triton.cdiv(channels, config.channels)
    if programs == 0:
        return
    with torch.cuda.device_of(pixels):
        tokens_to_pixels_kernel[(programs,)](
            weights, tokens, *tokens.stride(), weights if mass is None else mass, weights2, tokens2,
            *tokens2.stride(), weights if means is None else means, pixels, *pixels.stride(),
            height, width, channels, gh, gw, scale2, added, *added.stride(),
            h, w, mass is not None, second is not None, means is not None, residual is not None,
            configs.accumulator(tokens), config.pixels, config.channels, num_warps=config.warps,
        )  # fmt: skip
