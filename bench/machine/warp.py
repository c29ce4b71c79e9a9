"""What the threads of a warp do together: shuffles and votes."""

from __future__ import annotations

import numpy as np

from bench.machine.operation import Operation, instruction
from bench.machine.threads import Mask, Step, Threads

LANE = np.arange(32)


@instruction("shfl")
def shuffle(operation: Operation) -> Step:
    """Each thread takes the value of another lane, or keeps its own where that lies outside its segment."""
    mode = operation.parts[2]
    value, by, clamp = operation.source(1), operation.source(2, "u32"), operation.source(3, "u32")
    target = operation.target(operation.arguments[0].split("|")[0])

    def step(threads: Threads, mask: Mask) -> None:
        threads.warps(mask, operation.instruction)
        moved = threads.by_warp(by(threads)).astype(np.int64)
        last, segment = (threads.by_warp(clamp(threads) >> np.uint32(n)).astype(np.int64) & 31 for n in (0, 8))
        bound = (LANE & segment) | (last & ~segment)
        lane = {
            "bfly": LANE ^ moved, "down": LANE + moved, "up": LANE - moved,
            "idx": (LANE & segment) | (moved & 31 & ~segment),
        }[mode]  # fmt: skip
        inside = lane >= bound if mode == "up" else lane <= bound
        found = np.take_along_axis(threads.by_warp(value(threads)), np.where(inside, lane, LANE), 1)
        target(threads, found.reshape(-1), mask)

    return step


def _ballot(votes: np.ndarray) -> np.ndarray:
    """(warps,) of (warps, 32): bit n is lane n's vote."""
    return (votes.astype(np.uint64) << LANE.astype(np.uint64)).sum(1).astype(np.uint32)


@instruction("vote")
def vote(operation: Operation) -> Step:
    mode, voted, target = operation.parts[2], operation.source(1, "pred"), operation.target()

    def step(threads: Threads, mask: Mask) -> None:
        threads.warps(mask, operation.instruction)
        votes = threads.by_warp(voted(threads))
        every, some = votes.all(1), votes.any(1)
        found = {"any": some, "all": every, "uni": every | ~some, "ballot": _ballot(votes)}[mode]
        target(threads, np.repeat(found, 32), mask)

    return step


@instruction("activemask")
def active(operation: Operation) -> Step:
    target = operation.target()

    def step(threads: Threads, mask: Mask) -> None:
        there = np.ones(1, bool) if mask is None else mask
        target(threads, np.repeat(_ballot(threads.by_warp(there)), 32), mask)

    return step
