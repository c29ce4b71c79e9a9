"""Launch parameters by shape. A small table instead of autotuning: nothing is timed on a user's first step.

The numbers keep a program's pixels x channels in registers without a spill on sm_80, sm_90 and sm_100, which
tests/host/test_compile.py reads off the compiled kernels. Runs of tiles and warps are to be set by measurement.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

ELEMENTS = 8192  # pixels x channels that a program holds at a time, for 16-bit numbers
WIDEST = 256  # channels that a program holds at a time, for 16-bit numbers; wider tensors are walked in blocks of 64
# 32- and 64-bit numbers: no tensor cores, so that products take far more registers.
EXACT_PIXELS, EXACT_CHANNELS = 64, 16
PROGRAMS = 512  # programs worth having before a run of tiles is made longer; about four for each multiprocessor


class Blocks(NamedTuple):
    """pixels and channels a program holds at a time (powers of two) and its warps."""

    pixels: int
    channels: int
    warps: int

    def whole(self, channels: int) -> bool:
        """Whether one block holds all channels of a pixel."""
        return channels <= self.channels


def accumulator(x: Tensor) -> tl.dtype:
    """The dtype of sums over x: float64 for float64, float32 for everything else."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def blocks(x: Tensor, tile: int) -> Blocks:
    """Blocks for pixels x (B, C, H, W) in tiles of `tile` pixels."""
    wanted = max(16, power_of_two(x.shape[1]))
    if x.element_size() > 2:
        return Blocks(max(16, min(power_of_two(tile), EXACT_PIXELS)), min(wanted, EXACT_CHANNELS), 4)
    channels = wanted if wanted <= WIDEST else 64
    pixels = max(16, min(power_of_two(tile), ELEMENTS // channels, 128))
    return Blocks(pixels, channels, 8 if pixels * channels > 4096 else 4)


def run_length(images: int, gh: int, gw: int) -> int:
    """Tiles of a row that one program walks: long enough to sum across tiles on chip, short enough to fill a GPU."""
    longest = max(1, images * gh * gw // PROGRAMS)
    segments = -(-gw // min(longest, gw))
    return -(-gw // segments)


def fold(channels: int) -> Blocks:
    """Super tokens and channels that a program of the fold takes."""
    width = min(128, max(16, power_of_two(channels)))
    return Blocks(max(1, 512 // width), width, 2)
