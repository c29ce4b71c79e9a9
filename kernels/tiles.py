"""What every kernel of super tokens does to address pixels, super tokens and weights.

A program takes 64-bit steps from tile to tile, as scalars; the offsets within what a tile needs are of the dtype INDEX
(configs.index), 32 bits wherever those hold them: a 64-bit product takes four times the instructions.
"""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-12)  # added to a super token's mass before dividing by it, as the authors do


@triton.jit
def tile_pixels(row, column, p, h: tl.constexpr, w: tl.constexpr, H, W):
    """Row and column, within the tile at grid (row, column), of its pixels p, and which of them lie in the image."""
    y, x = p // w, p % w
    return y, x, (p < h * w) & (y < H - row * h) & (x < W - column * w)


@triton.jit
def tile_corner(image, row, column, h: tl.constexpr, w: tl.constexpr, stride_b, stride_h, stride_w):
    """Offset of the first pixel of the tile at grid (row, column) of an image."""
    return image * stride_b + tl.cast(row * h, tl.int64) * stride_h + tl.cast(column * w, tl.int64) * stride_w


@triton.jit
def offsets(y, x, stride_h, stride_w, INDEX: tl.constexpr):
    """Offsets of places (y, x) from the one that they are counted from: pixels of a tile, super tokens around one."""
    return y.to(INDEX) * stride_h + x.to(INDEX) * stride_w


@triton.jit
def load_block(first, places, inside, c, stride_c, C: tl.constexpr):
    """(places, channels): what lies at offsets `places` from the pointer `first`, zeros where not `inside`."""
    at = places[:, None] + (c.to(places.dtype) * stride_c)[None, :]
    return tl.load(first + at, mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def store_block(block, first, places, inside, c, stride_c, C: tl.constexpr):
    """Writes (places, channels) to offsets `places` from the pointer `first`, where `inside`."""
    at = places[:, None] + (c.to(places.dtype) * stride_c)[None, :]
    tl.store(first + at, block.to(first.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def dot(a, b, ACCUMULATOR: tl.constexpr):
    """a @ b summed in the accumulator's precision; float32 stays float32 (no tf32)."""
    return tl.dot(a, b, out_dtype=ACCUMULATOR, input_precision="ieee")
