"""Pixels to super tokens: the products at the 3 x 3 pattern, the map on them, and the sums over pixels.

One kernel walks a run of tiles along a row of the grid. For each tile it holds the pixels on chip and from them takes
the products pixel . token with the 9 neighbours, applies the map of the op, and adds weight^T x pixels to the sums of
the 9 neighbours. Those sums stay on chip as long as the walk touches the super token: 16 slots, slot s holding grid
row s // 3 - 1 of the tile's neighbourhood and the grid column that is s % 3 modulo 3, so that a step to the right frees
just the three slots of the column it leaves. A run of R tiles thus writes (R + 2) x 3 partial sums instead of R x 9; a
second kernel folds the partial sums of neighbouring rows and runs in a fixed order. No atomics: results repeat bit for
bit.

Bytes, X being those of the pixels: read 1 X; partial sums, float32, 3 (R + 2) / R / (h * w) times the pixels' count,
written and read once; the weights, 9 numbers a pixel, read or written once for each of those that the map takes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import dot, load_tokens, tile_pixels

# Maps: what happens to the products P = pixel . token of a pixel with its 9 neighbours. Compared as ints on the host.
ASSOCIATE = tl.constexpr(0)  # weights = softmax(scale * P), stored; they are what is summed with
WEIGHTED = tl.constexpr(1)  # no products; the weights given are summed with
PRODUCTS = tl.constexpr(2)  # P is stored; the weights given are summed with
DIFFERENTIATE = tl.constexpr(3)  # dA = grad + P - offset, dlogit = A (dA - sum A dA), stored; dlogit is summed with


@triton.jit
def walk_kernel(
    pixels, pb, pc, ph, pw, tokens, tb, tc, th, tw, mass, offset, weights, grad, out, partial, partial_mass,
    H, W, C, gh, gw, run, segments, scale: tl.constexpr,
    h: tl.constexpr, w: tl.constexpr, MAP: tl.constexpr, SUM: tl.constexpr, GRAD: tl.constexpr,
    ACCUMULATOR: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: one run of tiles; when the weights are given, one block of channels of it.

    `weights` is read, except by ASSOCIATE; `out` (weights, products or dlogit) is written, except by WEIGHTED.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS) if MAP == WEIGHTED else 1
    first_channel = program % blocks * CHANNELS
    walk = program // blocks
    segment = walk % segments
    row = (walk // segments) % gh
    image = (walk // segments // gh).to(tl.int64)
    first = segment * run
    last = tl.minimum(first + run, gw) - 1

    slot = tl.arange(0, 16)
    up = slot // 3
    token_row = row + up - 1
    c = first_channel + tl.arange(0, CHANNELS)
    sums = tl.zeros([16, CHANNELS], ACCUMULATOR)
    sums_mass = tl.zeros([16], ACCUMULATOR)

    for column in range(first, last + 1):
        left = (slot % 3 + 3 - column % 3) % 3
        token_column = column + left - 1
        inside = (slot < 9) & (token_row >= 0) & (token_row < gh) & (token_column >= 0) & (token_column < gw)
        k = up * 3 + left

        for start in range(0, h * w, PIXELS):
            p = start + tl.arange(0, PIXELS)
            py, px, seen = tile_pixels(row, column, p, h, w, H, W)
            pixel = pixels + image * pb + (py * ph + px * pw)[:, None]
            at = ((image * H + py) * W + px)[:, None] * 9 + k[None, :]
            known = seen[:, None] & (slot < 9)[None, :]
            block = tl.load(pixel + c.to(tl.int64)[None, :] * pc, mask=seen[:, None] & (c < C)[None, :], other=0.0)

            if MAP != WEIGHTED:
                near = load_tokens(
                    tokens + image * tb, tc, th, tw, mass, image, token_row, token_column, inside, c, gh, gw, C,
                    MAP == DIFFERENTIATE,
                )  # fmt: skip
                products = dot(block, tl.trans(near), ACCUMULATOR)
                if not SUM:  # one block doesn't hold all channels
                    for next_channel in range(CHANNELS, C, CHANNELS):
                        d = next_channel + tl.arange(0, CHANNELS)
                        more = tl.load(
                            pixel + d.to(tl.int64)[None, :] * pc, mask=seen[:, None] & (d < C)[None, :], other=0.0
                        )
                        near = load_tokens(
                            tokens + image * tb, tc, th, tw, mass, image, token_row, token_column, inside, d, gh, gw, C,
                            MAP == DIFFERENTIATE,
                        )  # fmt: skip
                        products += dot(more, tl.trans(near), ACCUMULATOR)

            if MAP == ASSOCIATE:
                logits = tl.where((slot < 9)[None, :], products * scale, float("-inf"))
                share = tl.exp(logits - tl.max(logits, axis=1)[:, None])
                # Rounded once, so that sums, mass and backward all see the weights that are stored.
                factor = (share / tl.sum(share, axis=1)[:, None]).to(block.dtype)
                tl.store(out + at, factor, mask=known)
                factor = tl.where((p < h * w)[:, None], factor, 0.0).to(block.dtype)
                sums_mass += tl.sum(factor.to(ACCUMULATOR), axis=0)
            else:
                factor = tl.load(weights + at, mask=known, other=0.0)
            if MAP == PRODUCTS:
                tl.store(out + at, products.to(block.dtype), mask=known)
            if MAP == DIFFERENTIATE:
                place = (image * gh + token_row) * gw + token_column
                slope = products - tl.load(offset + place, mask=inside, other=0.0)[None, :]
                if GRAD:
                    slope += tl.load(grad + at, mask=known, other=0.0).to(ACCUMULATOR)
                share = factor.to(ACCUMULATOR)
                # Divided by their sum: rounded, nine weights near 0 and 1 sum to 1 only to a rounding.
                total = tl.sum(share, axis=1)
                mean = tl.sum(share * slope, axis=1) / tl.where(total == 0.0, 1.0, total)
                slope = share * (slope - mean[:, None])
                factor = slope.to(block.dtype)
                tl.store(out + at, factor, mask=known)
            if SUM:
                sums += dot(tl.trans(factor), block, ACCUMULATOR)

        leaving = left == 0
        done = inside & (leaving | (column == last))
        part = (((image * gh + row) * segments + segment) * (run + 2) + column - first + left) * 3 + up
        if SUM:
            tl.store(partial + part[:, None] * C + c[None, :], sums, mask=done[:, None] & (c < C)[None, :])
            sums = tl.where(leaving[:, None], 0.0, sums)
        if MAP == ASSOCIATE:
            tl.store(partial_mass + part, sums_mass, mask=done)
            sums_mass = tl.where(leaving, 0.0, sums_mass)


@triton.jit
def fold_kernel(
    partial, partial_mass, stokens, sb, sc, sh, sw, mass, tokens, gh, gw, C, run, segments, scale: tl.constexpr,
    MASS: tl.constexpr, ACCUMULATOR: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS super tokens, one block of channels. MASS divides by the mass and stores it."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)
    t = (program // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    column = t % gw
    row = (t // gw) % gh
    image = t // gw // gh
    live = t < tokens
    total = tl.zeros([TOKENS, CHANNELS], ACCUMULATOR)
    total_mass = tl.zeros([TOKENS], ACCUMULATOR)
    # The walk of tile row `row + 1 - up` met this super token in its neighbourhood's row `up`.
    for up in tl.static_range(3):
        for step in tl.static_range(3):
            source = row + 1 - up
            segment = column // run + step - 1
            left = column - segment * run + 1
            met = live & (source >= 0) & (source < gh) & (segment >= 0) & (segment < segments)
            met = met & (left >= 0) & (left < run + 2)
            part = (((image * gh + source) * segments + segment) * (run + 2) + left) * 3 + up
            total += tl.load(partial + part[:, None] * C + c[None, :], mask=met[:, None] & (c < C)[None, :], other=0.0)
            if MASS:
                total_mass += tl.load(partial_mass + part, mask=met, other=0.0)
    if MASS:
        total = total / (total_mass + 1e-12)[:, None]
        tl.store(mass + t, total_mass, mask=live & (program % blocks == 0))
    else:
        total = total * scale
    place = image * sb + row * sh + column * sw
    tl.store(
        stokens + place[:, None] + c.to(tl.int64)[None, :] * sc, total.to(stokens.dtype.element_ty),
        mask=live[:, None] & (c < C)[None, :],
    )  # fmt: skip


def pixels_to_tokens(
    map_: Any,  # one of the maps above
    pixels: Tensor,  # (B, C, H, W)
    tokens: Tensor | None,  # (B, C, gh, gw), not for WEIGHTED
    weights: Tensor | None,  # (B, 9, H, W) of memory (B, H, W, 9), not for ASSOCIATE
    stokens: Tensor,  # (B, C, gh, gw), written
    h: int, w: int, *,
    scale: float = 1.0,
    out: Tensor | None = None,  # (B, 9, H, W) of memory (B, H, W, 9), written, not for WEIGHTED
    mass: Tensor | None = None,  # (B, 1, gh, gw): written by ASSOCIATE, read by DIFFERENTIATE
    offset: Tensor | None = None,  # (B, gh, gw), for DIFFERENTIATE: <dS, S> / mass
    grad: Tensor | None = None,  # (B, 9, H, W) of memory (B, H, W, 9), for DIFFERENTIATE, may be left out
) -> None:  # fmt: skip
    """Runs a map over all pixels and writes the folded sums into `stokens`.

    ASSOCIATE divides the sums by the mass; the other maps multiply them with `scale`. Pixels wider than one block of
    channels are read twice: for the products, and for the sums.
    """
    config = configs.blocks(pixels, h * w)
    batch, channels, height, width = pixels.shape
    gh, gw = stokens.shape[2:]
    if batch == 0:
        return
    run = configs.run_length(batch, gh, gw)
    segments = triton.cdiv(gw, run)
    accumulator = configs.accumulator(pixels)
    wide = torch.float64 if accumulator == tl.float64 else torch.float32
    partial = pixels.new_empty((batch, gh, segments, run + 2, 3, channels), dtype=wide)
    associating = bool(map_ == ASSOCIATE)
    partial_mass = partial.new_empty(partial.shape[:-1]) if associating else None
    # Pointers that a map doesn't use still need a value.
    spare = pixels

    def walk(map_: Any, weights: Tensor | None, total: bool) -> None:
        blocks = triton.cdiv(channels, config.channels) if map_ == WEIGHTED else 1
        near = stokens if tokens is None else tokens
        walk_kernel[(batch * gh * segments * blocks,)](
            pixels, *pixels.stride(), near, *near.stride(),
            *(spare if t is None else t for t in (mass, offset, weights, grad, out, partial, partial_mass)),
            height, width, channels, gh, gw, run, segments, scale,
            h, w, map_, total, grad is not None, accumulator, config.pixels, config.channels,
            num_warps=config.warps,
        )  # fmt: skip

    with torch.cuda.device_of(pixels):
        whole = config.whole(channels)
        walk(map_, weights, whole or map_ == WEIGHTED)
        if not whole and map_ != WEIGHTED:
            walk(WEIGHTED, weights if map_ == PRODUCTS else out, True)
        fold = configs.fold(channels)
        count = batch * gh * gw
        fold_kernel[(triton.cdiv(count, fold.pixels) * triton.cdiv(channels, fold.channels),)](
            partial, partial_mass if associating else spare, stokens, *stokens.stride(),
            mass if associating else spare, count, gh, gw, channels, run, segments, scale,
            associating, accumulator, fold.pixels, fold.channels, num_warps=fold.warps,
        )  # fmt: skip
