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
from .tiles import EPSILON, dot, load_block, offsets, tile_corner, tile_pixels

# Maps: what happens to the products P = pixel . token of a pixel with its 9 neighbours. The host compares their values.
ASSOCIATE = tl.constexpr(0)  # weights = softmax(scale * P), stored; they are what is summed with
WEIGHTED = tl.constexpr(1)  # no products; the weights given are summed with
PRODUCTS = tl.constexpr(2)  # P is stored; the weights given are summed with
DIFFERENTIATE = tl.constexpr(3)  # dA = grad + P - offset, dlogit = A (dA - sum A dA), stored; dlogit is summed with


@triton.jit
def associate(products, scale: tl.constexpr, DTYPE: tl.constexpr):
    """Softmax over nine slots; rounded once, so that sums, mass and backward all see the weights that are stored."""
    logits = tl.where((tl.arange(0, 16) < 9)[None, :], products * scale, float("-inf"))
    share = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return (share * (1.0 / tl.sum(share, axis=1))[:, None]).to(DTYPE)


@triton.jit
def differentiate(slopes, weights, DTYPE: tl.constexpr):
    """dlogit = A (dA - sum A dA / sum A): rounded, nine weights near 0 and 1 sum to 1 only to a rounding."""
    share = weights.to(slopes.dtype)
    total = tl.sum(share, axis=1)
    mean = tl.sum(share * slopes, axis=1) / tl.where(total == 0.0, 1.0, total)
    return (share * (slopes - mean[:, None])).to(DTYPE)


@triton.jit(do_not_specialize=["run", "segments"])
def walk_kernel(
    pixels, pixels_stride_b, pixels_stride_c, pixels_stride_h, pixels_stride_w,  # (B, C, H, W)
    tokens, tokens_stride_b, tokens_stride_c, tokens_stride_h, tokens_stride_w,  # (B, C, gh, gw)
    mass,  # (B, gh, gw), read by DIFFERENTIATE, which divides the products by it
    offset,  # (B, gh, gw)
    weights,  # (B, H, W, 9), read, except by ASSOCIATE
    grad,  # (B, H, W, 9), read if GRAD
    out,  # (B, H, W, 9), weights, products or dlogit, written, except by WEIGHTED
    partial,  # (B, gh, segments, run + 2, 3, C), written if SUM
    partial_mass,  # (B, gh, segments, run + 2, 3), written by ASSOCIATE
    H, W, gh, gw, run, segments,
    C: tl.constexpr, scale: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    MAP: tl.constexpr, SUM: tl.constexpr, GRAD: tl.constexpr, ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: one run of tiles; when the weights are given, BLOCKS blocks of channels of it."""
    DTYPE: tl.constexpr = pixels.dtype.element_ty
    parts: tl.constexpr = (C + CHANNELS * BLOCKS - 1) // (CHANNELS * BLOCKS) if MAP == WEIGHTED else 1
    program = tl.program_id(0)
    first_channel = program % parts * (CHANNELS * BLOCKS)
    walk = program // parts
    segment = walk % segments
    row = (walk // segments) % gh
    image = (walk // segments // gh).to(tl.int64)
    first = segment * run
    end = tl.minimum(first + run, gw)
    first_part = ((image * gh + row) * segments + segment) * (run + 2) * 3

    slot = tl.arange(0, 16)
    up = slot // 3 - 1
    channels = tl.arange(0, CHANNELS)
    sums = ()
    if SUM:
        for _ in tl.static_range(BLOCKS):
            sums += (tl.zeros([16, CHANNELS], ACCUMULATOR),)
    sums_mass = tl.zeros([16], ACCUMULATOR)

    for column in range(first, end):
        left = (slot % 3 + 4 - column % 3) % 3 - 1  # the column that is slot % 3 modulo 3
        inside = (slot < 9) & (row + up >= 0) & (row + up < gh) & (column + left >= 0) & (column + left < gw)
        k = (up + 1) * 3 + left + 1
        place = (image * gh + row) * gw + column
        corner = pixels + tile_corner(image, row, column, h, w, pixels_stride_b, pixels_stride_h, pixels_stride_w)
        centre = tokens + tile_corner(image, row, column, 1, 1, tokens_stride_b, tokens_stride_h, tokens_stride_w)
        around = offsets(up, left, tokens_stride_h, tokens_stride_w, INDEX)
        first_weight = tile_corner(image, row, column, h, w, tl.cast(H, tl.int64) * W, W, 1) * 9

        for start in range(0, h * w, PIXELS):
            y, x, seen = tile_pixels(row, column, start + tl.arange(0, PIXELS), h, w, H, W)
            places = offsets(y, x, pixels_stride_h, pixels_stride_w, INDEX)
            at = (offsets(y, x, W, 1, INDEX) * 9)[None, :] + k[:, None]
            known = seen[None, :] & (slot < 9)[:, None]
            products = tl.zeros([PIXELS, 16], ACCUMULATOR)
            blocks = ()
            if SUM:
                for i in tl.static_range(BLOCKS):
                    c = first_channel + i * CHANNELS + channels
                    blocks += (load_block(corner, places, seen, c, pixels_stride_c, C),)
                    if MAP != WEIGHTED:
                        near = load_block(centre, around, inside, c, tokens_stride_c, C)
                        products += dot(blocks[i], tl.trans(near), ACCUMULATOR)
            else:
                for channel in range(0, C, CHANNELS):
                    block = load_block(corner, places, seen, channel + channels, pixels_stride_c, C)
                    near = load_block(centre, around, inside, channel + channels, tokens_stride_c, C)
                    products += dot(block, tl.trans(near), ACCUMULATOR)

            if MAP == ASSOCIATE:
                factor = associate(products, scale, DTYPE)
                tl.store(out + first_weight + at, tl.trans(factor), mask=known)
                counted = tl.where((start + tl.arange(0, PIXELS) < h * w)[:, None], factor, 0.0)
                sums_mass += tl.sum(counted.to(ACCUMULATOR), axis=0)
            else:
                factor = tl.trans(tl.load(weights + first_weight + at, mask=known, other=0.0))
            if MAP == PRODUCTS:
                tl.store(out + first_weight + at, tl.trans(products.to(DTYPE)), mask=known)
            if MAP == DIFFERENTIATE:
                m = tl.load(mass + place + up * gw + left, mask=inside, other=1.0) + EPSILON
                slopes = products * (1.0 / m)[None, :]
                slopes -= tl.load(offset + place + up * gw + left, mask=inside, other=0.0)[None, :]
                if GRAD:
                    slopes += tl.trans(tl.load(grad + first_weight + at, mask=known, other=0.0)).to(ACCUMULATOR)
                factor = differentiate(slopes, factor, DTYPE)
                tl.store(out + first_weight + at, tl.trans(factor), mask=known)
            if SUM:
                more = ()
                for i in tl.static_range(BLOCKS):
                    more += (sums[i] + dot(tl.trans(factor), blocks[i], ACCUMULATOR),)
                sums = more

        leaving = left < 0
        done = inside & (leaving | (column + 1 == end))
        part = (column - first + left + 1) * 3 + up + 1
        if SUM:
            kept = ()
            for i in tl.static_range(BLOCKS):
                c = first_channel + i * CHANNELS + channels
                at = partial + first_part * C + (part.to(INDEX) * C)[:, None] + c[None, :]
                tl.store(at, sums[i], mask=done[:, None] & (c < C)[None, :])
                kept += (tl.where(leaving[:, None], 0.0, sums[i]),)
            sums = kept
        if MAP == ASSOCIATE:
            tl.store(partial_mass + first_part + part, sums_mass, mask=done)
            sums_mass = tl.where(leaving, 0.0, sums_mass)


@triton.jit(do_not_specialize=["run", "segments"])
def fold_kernel(
    partial,  # (B, gh, segments, run + 2, 3, C)
    partial_mass,  # (B, gh, segments, run + 2, 3), read if MASS
    stokens, stokens_stride_b, stokens_stride_c, stokens_stride_h, stokens_stride_w,  # (B, C, gh, gw), written
    mass,  # (B, gh, gw), written if MASS
    gh, gw, run, segments, C: tl.constexpr, scale: tl.constexpr, MASS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, INDEX: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: TOKENS super tokens of a row, one block of channels. MASS divides by the mass and stores it."""
    parts: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    part = program % parts
    c = part * CHANNELS + tl.arange(0, CHANNELS)
    across = tl.cdiv(gw, TOKENS)
    column = program // parts % across * TOKENS + tl.arange(0, TOKENS)
    row = program // parts // across % gh
    image = (program // parts // across // gh).to(tl.int64)
    live = column < gw
    total = tl.zeros([TOKENS, CHANNELS], ACCUMULATOR)
    total_mass = tl.zeros([TOKENS], ACCUMULATOR)
    for step in tl.static_range(3):
        segment = column // run + step - 1
        left = column - segment * run + 1
        met = live & (segment >= 0) & (segment < segments) & (left >= 0) & (left < run + 2)
        place = (segment * (run + 2) + left).to(INDEX) * 3
        # The walk of tile row `row + 1 - up` met this super token in its neighbourhood's row `up`.
        for up in tl.static_range(3):
            source = row + 1 - up
            seen = met & (source >= 0) & (source < gh)
            first = (image * gh + source) * segments * (run + 2) * 3 + up
            at = partial + first * C + (place * C)[:, None] + c[None, :]
            total += tl.load(at, mask=seen[:, None] & (c < C)[None, :], other=0.0)
            if MASS:
                total_mass += tl.load(partial_mass + first + place, mask=seen, other=0.0)
    if MASS:
        total = total / (total_mass + EPSILON)[:, None]
        tl.store(mass + (image * gh + row) * gw + column, total_mass, mask=live & (part == 0))
    else:
        total = total * scale
    corner = stokens + image * stokens_stride_b + row.to(tl.int64) * stokens_stride_h
    at = (column.to(tl.int64) * stokens_stride_w)[:, None] + (c.to(tl.int64) * stokens_stride_c)[None, :]
    tl.store(corner + at, total.to(stokens.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


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
    segments = -(-gw // run)
    accumulator = configs.accumulator(pixels)
    wide = torch.float64 if accumulator == tl.float64 else torch.float32
    partial = pixels.new_empty((batch, gh, segments, run + 2, 3, channels), dtype=wide)
    associating = map_.value == ASSOCIATE.value
    partial_mass = partial.new_empty(partial.shape[:-1]) if associating else partial
    near = stokens if tokens is None else tokens
    index = configs.index(configs.extent(pixels, h, w), configs.extent(near, 3, 3), 9 * h * width, 9 * gw * channels)

    def walk(map_: Any, weights: Tensor | None, total: bool) -> None:
        parts = -(-channels // config.held) if map_.value == WEIGHTED.value else 1
        # Pointers that a map doesn't use still need a value.
        unused = (pixels if t is None else t for t in (mass, offset, weights, grad, out))
        walk_kernel[(batch * gh * segments * parts,)](
            pixels, *pixels.stride(), near, *near.stride(), *unused, partial, partial_mass,
            height, width, gh, gw, run, segments,
            C=channels, scale=scale, h=h, w=w, MAP=map_.value, SUM=total, GRAD=grad is not None,
            ACCUMULATOR=accumulator, INDEX=index, PIXELS=config.pixels, CHANNELS=config.channels,
            BLOCKS=config.blocks, num_warps=config.warps,
        )  # fmt: skip

    with torch.cuda.device_of(pixels):
        at_once = config.whole(channels) or map_.value == WEIGHTED.value
        walk(map_, weights, at_once)
        if not at_once:
            walk(WEIGHTED, weights if map_.value == PRODUCTS.value else out, True)
        fold = configs.fold(channels, gw)
        programs = batch * gh * -(-gw // fold.pixels) * -(-channels // fold.channels)
        fold_kernel[(programs,)](
            partial, partial_mass, stokens, *stokens.stride(), mass if associating else partial,
            gh, gw, run, segments, C=channels, scale=scale, MASS=associating, ACCUMULATOR=accumulator, INDEX=index,
            TOKENS=fold.pixels, CHANNELS=fold.channels, num_warps=fold.warps,
        )  # fmt: skip
