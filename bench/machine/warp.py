"""What the threads of a warp exchange."""

from __future__ import annotations

import numpy as np

from bench.machine.operation import Operation, instruction
from bench.machine.threads import Mask, Step, Threads

LANE = np.arange(32)


@instruction("shfl")
def shuffle(operation: Operation) -> Step:
    """Each thread takes the value of another lane, or keeps its own where that lies outside its segment."""
    mode = operation.parts[2]
    operation.expect(mode in ("bfly", "idx"))
    value, by, clamp = operation.source(1), operation.source(2, "u32"), operation.source(3, "u32")
    target = operation.target(operation.arguments[0].split("|")[0])

    def step(threads: Threads, mask: Mask) -> None:
        threads.warps(mask, operation.instruction)
        moved = threads.by_warp(by(threads)).astype(np.int64)
        last, segment = (threads.by_warp(clamp(threads) >> np.uint32(n)).astype(np.int64) & 31 for n in (0, 8))
        bound = (LANE & segment) | (last & ~segment)
        lane = LANE ^ moved if mode == "bfly" else (LANE & segment) | (moved & 31 & ~segment)
        inside = lane <= bound
        found = np.take_along_axis(threads.by_warp(value(threads)), np.where(inside, lane, LANE), 1)
        target(threads, found.reshape(-1), mask)

    return step
