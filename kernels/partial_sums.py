"""The end of a backward that sums over pixels: what its programs summed, added up and written as gradients.

One kernel for the gradients of all parameters, in the dtype and layout that they are wanted in, where adding, casting
and copying would be three to five. Each program adds one of the sums of a block of channels over all parts, in a fixed
order: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS, CHANNELS = 256, 16  # that a program reads at a time: 64 bytes of each part


@triton.jit(do_not_specialize=["parts"])
def partial_sums_kernel(
    partial,  # (parts, SUMS, C)
    first,  # (C, FIRST)
    second,  # (C,), of sum FIRST
    third,  # (C,), of sum FIRST + 1
    parts,
    C,
    FIRST: tl.constexpr,
    SUMS: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: one of the SUMS, CHANNELS channels."""
    which = tl.program_id(0) % SUMS
    c = tl.program_id(0) // SUMS * CHANNELS + tl.arange(0, CHANNELS)
    part = tl.arange(0, PARTS)
    total = tl.zeros([PARTS, CHANNELS], partial.dtype.element_ty)
    for start in range(0, parts, PARTS):
        at = ((start + part).to(tl.int64) * SUMS + which)[:, None] * C + c[None, :]
        total += tl.load(partial + at, mask=(start + part < parts)[:, None] & (c < C)[None, :], other=0.0)
    added = tl.sum(total, axis=0)  # (CHANNELS,)
    tl.store(first + c * FIRST + which, added.to(first.dtype.element_ty), mask=(c < C) & (which < FIRST))
    if SUMS > FIRST:
        tl.store(second + c, added.to(second.dtype.element_ty), mask=(c < C) & (which == FIRST))
    if SUMS > FIRST + 1:
        tl.store(third + c, added.to(third.dtype.element_ty), mask=(c < C) & (which == FIRST + 1))


def add_parts(partial: Tensor, first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> None:
    """Adds partial (parts, sums, C) over the parts and writes the sums of each channel to first (C, n, ...), its n
    entries, then to second and third (C,), in the dtype of each."""
    parts, sums, channels = partial.shape
    with torch.cuda.device_of(partial):
        partial_sums_kernel[(-(-channels // CHANNELS) * sums,)](
            partial, first, first if second is None else second, first if third is None else third, parts, channels,
            FIRST=first.numel() // channels, SUMS=sums, PARTS=PARTS, CHANNELS=CHANNELS, num_warps=8,
        )  # fmt: skip
