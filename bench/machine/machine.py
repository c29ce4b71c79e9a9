"""Executes PTX on the CPU: one numpy entry a thread, one basic block of the program after the other.

The threads that wait at the block of the lowest rank (parse.py) run it together, so that threads that branched apart
meet again. See docs/machine.md for what is checked and where the emulation ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.machine import access, arithmetic, matrix, warp, warpgroup  # noqa: F401  (they fill the instructions' table)
from bench.machine.counters import Counters
from bench.machine.memory import GlobalMemory, Range, SharedMemory
from bench.machine.numbers import Array
from bench.machine.operation import translate
from bench.machine.parse import Fault, Program
from bench.machine.threads import Threads

LONGEST = 2_000_000  # basic blocks that may run before a program counts as endless


class Kernel:
    """A kernel's PTX, ready to run; `shared` is the bytes of shared memory that a launch gives each block."""

    def __init__(self, text: str, shared: int) -> None:
        self.program, self.shared = Program(text), shared
        self.steps = [
            [translate(self.program, instruction) for instruction in block.instructions if not instruction.ends]
            for block in self.program.blocks
        ]

    def run(
        self, grid: int, values: list[Any], ranges: list[Range], *, profile: bool = False, races: bool = False,
        blocks: int | None = None, threads: int = 8192,
    ) -> Counters:  # fmt: skip
        """Executes the first `blocks` blocks of `grid`, about `threads` threads at a time, on the memory of `ranges`.

        values: the parameters in order. profile: count sectors, wavefronts and bytes too. races: look for races.
        """
        program = self.program
        counters, memory = Counters(program), GlobalMemory(ranges, profile)
        parameters = {name: value for (name, _), value in zip(program.parameters, values, strict=True)}
        most = max(1, threads // program.threads)
        last = grid if blocks is None else min(blocks, grid)
        for first in range(0, last, most):
            count = min(most, last - first)
            shared = SharedMemory(self.shared, count, program.threads, races, counters if profile else None)
            state = Threads(program, first, count, grid, parameters, memory, shared, counters, profile)
            try:
                with np.errstate(all="ignore"):
                    self._execute(state)
            except Fault as fault:
                raise Fault(f"{program.name}: {fault}") from None
            counters.races += shared.found
            counters.finish_chunk()
        if profile:
            counters.touched = memory.touched()
        return counters

    def _execute(self, threads: Threads) -> None:
        program = self.program
        waiting = {0: np.ones(threads.count, bool)}
        for _ in range(LONGEST):
            if not waiting:
                return
            number = min(waiting, key=program.order.__getitem__)
            mask = waiting.pop(number)
            threads.counters.executed[number] += _warps(mask)
            everyone = None if mask.all() else mask
            for step in self.steps[number]:
                step(threads, everyone)
            for target, chosen in self._leave(threads, number, mask):
                if chosen.any():
                    waiting[target] = waiting[target] | chosen if target in waiting else chosen
        raise Fault(f"{LONGEST} basic blocks have run: an endless loop")

    def _leave(self, threads: Threads, number: int, mask: Array) -> list[tuple[int, Array]]:
        """Where the threads that ran a block go on."""
        block = self.program.blocks[number]
        if block.end is None:
            return [(number + 1, mask)]
        leaves = mask
        if block.end.guard is not None:
            guard = threads.registers[self.program.index[block.end.guard]]
            leaves = mask & (~guard if block.end.negated else guard)
        stays = mask & ~leaves
        if block.target is None:
            threads.live &= ~leaves
            return [(number + 1, stays)]
        threads.counters.divergent += _warps(leaves) + _warps(stays) - _warps(mask)
        return [(block.target, leaves), (number + 1, stays)]


def _warps(mask: Array) -> int:
    return int(mask.reshape(-1, 32).any(1).sum())
