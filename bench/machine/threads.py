"""The threads of the blocks that run at a time: registers as arrays with one entry a thread, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.machine.counters import Counters
from bench.machine.memory import GlobalMemory, SharedMemory
from bench.machine.numbers import UNSIGNED, Array
from bench.machine.parse import Fault, Instruction, Program

Mask = Any  # an Array of bool, one a thread: those that execute; None: all
Step = Callable[["Threads", Mask], None]  # an instruction, ready to be executed


class Threads:
    """`count` threads of consecutive blocks. Registers begin as NaN in every format, predicates as false.

    copies: cp.async under way, (threads, their groups, where to in shared memory, bytes), in the order of issue.
    products: wgmma under way, see matrix.py. group and product_group: groups that each thread has committed of both.
    """

    def __init__(
        self, program: Program, first: int, blocks: int, grid: int, parameters: dict[str, Any], memory: GlobalMemory,
        shared: SharedMemory, counters: Counters, profile: bool,
    ) -> None:  # fmt: skip
        self.block_size, self.blocks, self.count = program.threads, blocks, blocks * program.threads
        self.parameters, self.memory, self.shared, self.counters = parameters, memory, shared, counters
        self.profile = profile
        self.all = np.arange(self.count)
        poison = {n: np.full(self.count, np.iinfo(type_).max, type_) for n, type_ in UNSIGNED.items()}
        poison[1] = np.zeros(self.count, bool)
        self.registers: list[Array] = [poison[width] for width in program.width.values()]
        block, thread = self.all // self.block_size, self.all % self.block_size
        zero = np.zeros(self.count, np.uint32)
        special: dict[str, Array] = {
            "%tid.x": thread, "%ntid.x": zero + self.block_size, "%ctaid.x": first + block, "%nctaid.x": zero + grid,
            "%laneid": thread % 32, "%warpid": thread // 32, "%tid.y": zero, "%tid.z": zero, "%ctaid.y": zero,
            "%ctaid.z": zero, "%cluster_ctarank": zero,
        }  # fmt: skip
        self.special = {name: value.astype(np.uint32) for name, value in special.items()}
        self.live = np.ones(self.count, bool)
        self.group, self.product_group = np.zeros(self.count, np.int32), np.zeros(self.count, np.int32)
        self.copies: list[tuple[Array, Array, Array, Array]] = []
        self.products: list[Any] = []

    def active(self, mask: Mask) -> Array:
        """The numbers of the threads that execute."""
        return self.all if mask is None else np.nonzero(mask)[0]

    def by_warp(self, value: Array, size: int = 32) -> Array:
        """(warps, 32), or (warpgroups, 128), of a value of all threads, or of one for all."""
        return np.broadcast_to(value, self.count).reshape(-1, size)

    def warps(self, mask: Mask, instruction: Instruction, size: int = 32) -> Array:
        """The numbers of the warps that execute, or of the warpgroups: all their threads must."""
        if mask is None:
            return np.arange(self.count // size)
        each = mask.reshape(-1, size)
        if (each.any(1) & ~each.all(1)).any():
            raise Fault(f"not all threads of a {'warp' if size == 32 else 'warpgroup'} are at: {instruction.text}")
        return np.nonzero(each[:, 0])[0]
