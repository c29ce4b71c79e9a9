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
    """pixels and channels of a block (powers of two), the warps of a program and the blocks of channels it holds."""

    pixels: int
    channels: int
    warps: int
    blocks: int = 1

    @property
    def held(self) -> int:
        """Channels that a program holds at a time."""
        return self.channels * self.blocks

    def whole(self, channels: int) -> bool:
        """Whether a program holds all channels of a pixel."""
        return channels <= self.held


def accumulator(x: Tensor) -> tl.dtype:
    """The dtype of sums over x: float64 for float64, float32 for everything else."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def channel_block(channels: int) -> int:
    """The widest block of channels that leaves few lanes idle: 32 at 96 channels, 64 at 192."""
    for width in (256, 128, 64, 32):
        if -(-channels // width) * width * 8 <= channels * 9:
            return width
    return 16


def blocks(x: Tensor, tile: int) -> Blocks:
    """Blocks for pixels x (B, C, H, W) in tiles of `tile` pixels."""
    channels = x.shape[1]
    if x.element_size() > 2:
        width = min(max(16, power_of_two(channels)), EXACT_CHANNELS)
        return Blocks(max(16, min(power_of_two(tile), EXACT_PIXELS)), width, 4)
    width = channel_block(channels) if channels <= WIDEST else 64
    held = -(-channels // width) if channels <= WIDEST else 1
    pixels = max(16, min(power_of_two(tile), ELEMENTS // power_of_two(width * held), 128))
    warps = max(1, min(pixels // 16, 4), power_of_two(pixels * width * held) // 2048)
    if x.stride(1) != 1 or channels % 8:  # nobody can load channels 16 bytes at a time, which takes more registers
        warps = max(warps, min(2 * warps, 4))
    return Blocks(pixels, width, warps, held)


def pooling(x: Tensor, tile: int) -> Blocks:
    """Blocks of the pooling: one warp, so that no sum over pixels crosses warps through shared memory."""
    width = min(128, channel_block(x.shape[1]))
    return Blocks(max(1, min(power_of_two(tile), 8192 // width // x.element_size())), width, 1)


def extent(x: Tensor, height: int, width: int) -> int:
    """The largest offset within a window of x (B, C, H, W) that is so high and wide."""
    return (height - 1) * x.stride(2) + (width - 1) * x.stride(3) + (x.shape[1] - 1) * x.stride(1)


def index(*extents: int) -> tl.dtype:
    """The dtype of offsets up to these: a 64-bit product takes four times the instructions of a 32-bit one."""
    return tl.int32 if max(extents) < 2**31 else tl.int64


def run_length(images: int, gh: int, gw: int) -> int:
    """Tiles of a row that one program walks: long enough to sum across tiles on chip, short enough to fill a GPU."""
    longest = max(1, images * gh * gw // PROGRAMS)
    segments = -(-gw // min(longest, gw))
    return -(-gw // segments)


def fold(channels: int, gw: int) -> Blocks:
    """Super tokens of a row, and channels, that a program of the fold takes."""
    width = min(128, channel_block(channels))
    return Blocks(min(512 // width, power_of_two(gw)), width, 2)
