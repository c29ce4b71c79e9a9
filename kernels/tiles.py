"""What every kernel does to address pixels, super tokens and weights. All offsets are 64-bit."""

import triton
import triton.language as tl


@triton.jit
def tile_pixels(row, column, p, h: tl.constexpr, w: tl.constexpr, H, W):
    """Image row and column of pixels p of the tile at grid (row, column), and which of them lie in the image."""
    y = (row * h + p // w).to(tl.int64)
    x = (column * w + p % w).to(tl.int64)
    return y, x, (p < h * w) & (y < H) & (x < W)


@triton.jit
def load_tokens(tokens, sc, sh, sw, mass, image, row, column, inside, c, gh, gw, C, NORMALIZE: tl.constexpr):
    """(16, channels): super tokens at 16 grid places of an image, zeros where not `inside`; `tokens` points at the
    image. NORMALIZE divides each by its mass, in the accumulator's precision: D^-1 of the design."""
    offsets = row.to(tl.int64) * sh + column.to(tl.int64) * sw
    block = tl.load(
        tokens + offsets[:, None] + c.to(tl.int64)[None, :] * sc, mask=inside[:, None] & (c < C)[None, :], other=0.0
    )
    if NORMALIZE:
        place = (image * gh + row) * gw + column
        m = tl.load(mass + place, mask=inside, other=1.0)
        block = (block.to(m.dtype) / (m + 1e-12)[:, None]).to(block.dtype)
    return block


@triton.jit
def dot(a, b, ACCUMULATOR: tl.constexpr):
    """a @ b summed in the accumulator's precision; float32 stays float32 (no tf32)."""
    return tl.dot(a, b, out_dtype=ACCUMULATOR, input_precision="ieee")
