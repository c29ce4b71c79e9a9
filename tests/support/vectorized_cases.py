"""Cases for the CUDA kernels that take 16 bytes of channels at a time, listed and drawn."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.support.cases import BRAIN, HALF, LAST, SINGLE, Case

VECTORS = "sliced_vectors"
# Limits that make regions of whole images, of several tiles, of one tile; and the shared memory of a small GPU.
ONE, TWO, FEW, MANY, SMALL = (1, 232448), (2, 232448), (8, 232448), (132, 232448), (1, 101376)
# The channels, tiles and regions that the kernels tell apart: test_csrc_emulated.py holds them to that.
VECTORIZED = [
    *(Case(2, channels, 18, 29, (8, 8), dtype, full, 1, LAST, LAST, limits=limits)
      for channels, dtype, full, limits in [
          (64, HALF, False, ONE), (64, BRAIN, True, ONE), (96, BRAIN, False, FEW), (96, HALF, True, FEW),
          (128, HALF, True, MANY), (192, BRAIN, True, SMALL), (8, HALF, True, ONE)]),
    *(Case(1, channels, 19, 22, (4, 4), dtype, True, 2, VECTORS, VECTORS, limits=limits)
      for channels, dtype, limits in [(128, BRAIN, ONE), (192, HALF, FEW), (40, HALF, MANY), (96, BRAIN, SMALL)]),
    Case(1, 64, 46, 15, (4, 4), HALF, True, 1, LAST, LAST, limits=TWO),
    *(Case(1, channels, height, width, (4, 4), dtype, True, 1, LAST, LAST, limits=(1, shared_bytes))
      for channels, height, width, dtype, shared_bytes in [  # with groups across the end of the ring
          (32, 30, 27, BRAIN, 49152), (64, 20, 35, HALF, 49152), (96, 24, 35, BRAIN, 49152),
          (16, 30, 27, SINGLE, 49152), (32, 20, 35, SINGLE, 65536)]),
    Case(3, 24, 9, 20, (3, 5), BRAIN, True, 1, LAST, VECTORS, limits=ONE),
    Case(1, 16, 3, 9, (1, 1), HALF, True, 1, LAST, LAST, limits=FEW),
    Case(1, 8, 40, 67, (32, 32), HALF, True, 1, LAST, LAST, limits=ONE),
    Case(1, 8, 34, 40, (33, 3), HALF, True, 2, VECTORS, LAST, limits=ONE),
    Case(1, 384, 5, 7, (2, 3), BRAIN, True, 1, LAST, LAST, limits=ONE),
    Case(1, 392, 5, 7, (2, 3), HALF, True, 1, LAST, LAST, limits=ONE),  # wider than they take
    Case(2, 64, 3, 5, (4, 6), HALF, True, 1, LAST, LAST, limits=ONE),
    *(Case(2, channels, 18, 29, (8, 8), SINGLE, full, 1, LAST, LAST, limits=limits)
      for channels, full, limits in [(64, False, ONE), (64, True, MANY), (96, True, FEW), (4, True, ONE)]),
    *(Case(1, channels, 19, 22, (4, 4), SINGLE, True, 2, VECTORS, VECTORS, limits=limits)
      for channels, limits in [(128, ONE), (36, FEW), (192, SMALL)]),
    Case(1, 64, 46, 15, (4, 4), SINGLE, True, 1, LAST, LAST, limits=TWO),
    Case(1, 20, 9, 20, (3, 5), SINGLE, True, 1, LAST, VECTORS, limits=ONE),
    Case(1, 8, 3, 9, (1, 1), SINGLE, True, 1, LAST, LAST, limits=FEW),
    Case(1, 4, 40, 67, (32, 32), SINGLE, True, 1, LAST, LAST, limits=ONE),
    Case(1, 384, 5, 7, (2, 3), SINGLE, True, 1, LAST, LAST, limits=ONE),
    Case(1, 192, 3, 11, (1, 2), SINGLE, True, 1, LAST, LAST, limits=(4, 49152), seed=14465),  # weights near 1, no walk
]  # fmt: skip

TILES = [(8, 8), (8, 8), (4, 4), (4, 4), (1, 2), (2, 2), (3, 5), (7, 2), (5, 8), (16, 4), (16, 16)]
PIXELS = 600  # of an image that a drawn case for the vectorized kernels has at most, but for one row of tiles


@st.composite
def vectorized_cases(draw: st.DrawFn, rounds: int = 2) -> Case:
    """What the CUDA kernels take 16 bytes of channels at a time, for GPUs of any size."""
    (h, w), vectors = draw(st.sampled_from(TILES)), draw(st.integers(1, 24) | st.sampled_from([8, 12, 16, 24]))
    dtype = draw(st.sampled_from([HALF, BRAIN, SINGLE]))
    gh, gw = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    gh = min(gh, max(1, PIXELS // (h * w * gw)))
    layout = st.sampled_from([LAST, VECTORS])
    return Case(
        draw(st.integers(1, 3)), vectors * 16 // dtype.itemsize,
        gh * h - draw(st.integers(0, h - 1)), gw * w - draw(st.integers(0, w - 1)),
        (h, w), dtype=dtype, full=draw(st.booleans()),
        n_iter=draw(st.integers(1, rounds)), layout=draw(layout), grad_layout=draw(layout),
        limits=(draw(st.sampled_from([1, 4, 16, 132])), draw(st.sampled_from([232448, 101376, 49152]))),
        seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip
