"""Global memory, which is that of the CPU tensors of a launch, and the shared memory of blocks."""

from __future__ import annotations

import ctypes
from collections import Counter as Counts
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bench.machine.counters import Counters, Touched
from bench.machine.numbers import UNSIGNED, Array
from bench.machine.parse import Fault, Instruction


class Range(NamedTuple):
    """Bytes that a launch may touch: the storage of a tensor."""

    start: int
    size: int
    name: str


def aligned(address: Array, size: int, instruction: Instruction) -> None:
    if (address & (size - 1)).any():
        raise Fault(f"misaligned access of {size} bytes: {instruction.text}")


class GlobalMemory:
    """The ranges of a launch. With `profile` each range also notes which of its bytes were read and written."""

    def __init__(self, ranges: list[Range], profile: bool) -> None:
        unique = {(r.start, r.size): r for r in ranges if r.size}
        self.ranges = [unique[key] for key in sorted(unique)]
        self.start = np.array([r.start for r in self.ranges], np.int64)
        self.end = np.array([r.start + r.size for r in self.ranges], np.int64)
        self.bytes = [np.ctypeslib.as_array((ctypes.c_uint8 * r.size).from_address(r.start)) for r in self.ranges]
        self.profile = profile
        marks = [r.size // 8 * 8 + 8 if profile else 0 for r in self.ranges]
        self.read, self.written = ([np.zeros(n, np.uint8) for n in marks] for _ in range(2))

    def load(self, address: Array, size: int, unit: int, instruction: Instruction) -> Array:
        """(n, size / unit) numbers of `unit` bytes at n addresses."""
        found = np.empty((len(address), size // unit), UNSIGNED[8 * unit])
        for k, chosen, at in self._places(address, size, unit, instruction):
            found[chosen] = _numbers(self.bytes[k], unit)[at]
            if self.profile:
                _numbers(self.read[k], unit)[at] = UNSIGNED[8 * unit](0x0101010101010101 >> 64 - 8 * unit)
        return found

    def store(self, address: Array, values: Array, instruction: Instruction) -> None:
        """Writes values (n, m) at n addresses."""
        unit = values.dtype.itemsize
        for k, chosen, at in self._places(address, unit * values.shape[1], unit, instruction):
            _numbers(self.bytes[k], unit)[at] = values[chosen]
            if self.profile:
                _numbers(self.written[k], unit)[at] = UNSIGNED[8 * unit](0x0101010101010101 >> 64 - 8 * unit)

    def touched(self) -> list[Touched]:
        """What was read and written of each range."""
        counts = zip(self.ranges, map(np.count_nonzero, self.read), map(np.count_nonzero, self.written), strict=True)
        return [Touched(r.name, r.size, int(read), int(written)) for r, read, written in counts]

    def _places(
        self, address: Array, size: int, unit: int, instruction: Instruction
    ) -> Iterator[tuple[int, Array | slice, Array]]:
        """(range, which of the addresses lie in it, the indices (n, size / unit) of their numbers)."""
        aligned(address, size, instruction)
        ranges = np.searchsorted(self.start, address, "right") - 1
        outside = (ranges < 0) | (address + size > self.end[np.maximum(ranges, 0)])
        if outside.any():
            first = int(address[outside][0])
            away = ", ".join(f"{first - r.start} of {r.name}'s {r.size}" for r in self.ranges)
            raise Fault(f"out of bounds: {int(outside.sum())} threads, first at byte {away}: {instruction.text}")
        for k in np.unique(ranges):
            chosen = ranges == k
            place: Array | slice = slice(None) if chosen.all() else chosen
            at = (address[place] - self.start[k]) // unit
            yield int(k), place, at[:, None] + np.arange(size // unit)


def _numbers(bytes_: Array, unit: int) -> Array:
    return bytes_[: len(bytes_) // unit * unit].view(UNSIGNED[8 * unit])


class SharedMemory:
    """Of all blocks that run at a time, each begun as NaN.

    With `races` every access is compared with those of the block's other warps since its last barrier, in units of two
    bytes: `found` counts by instruction where both touched one place and one of them wrote.
    """

    def __init__(self, size: int, blocks: int, threads: int, races: bool, counters: Counters | None) -> None:
        self.size, self.threads, self.counters, self.races = size, threads, counters, races
        self.room = (size + 15) // 16 * 16 + 16
        self.bytes = np.full(blocks * self.room, 0xFF, np.uint8)
        self.base = np.repeat(np.arange(blocks, dtype=np.int64) * self.room, threads)  # of each thread
        self.found: Counts[str] = Counts()
        self.epoch = np.ones(blocks, np.int32)  # one more after each barrier
        places = (blocks * self.room // 2, threads // 32) if races else (0, 0)
        self.reads, self.writes = np.zeros(places, np.int32), np.zeros(places, np.int32)  # the last epoch of each warp

    def place(self, address: Array, threads: Array, size: int, instruction: Instruction) -> Array:
        """Indices into `bytes` of these threads' addresses."""
        at = address.astype(np.int64)
        aligned(at, size, instruction)
        if ((at < 0) | (at + size > self.size)).any():
            last = f"byte {int(at.max())} + {size} of {self.size}"
            raise Fault(f"out of bounds of shared memory: {last}: {instruction.text}")
        return at + self.base[threads]

    def load(self, address: Array, threads: Array, size: int, unit: int, instruction: Instruction) -> Array:
        """(n, size / unit) numbers of `unit` bytes at the addresses of n threads."""
        at = self.place(address, threads, size, instruction)
        if self.counters:
            self.counters.shared(at - self.base[threads], threads, size, instruction)
        self.note(at, threads, size, False, instruction)
        return self.bytes.view(UNSIGNED[8 * unit])[(at // unit)[:, None] + np.arange(size // unit)]

    def store(self, address: Array, threads: Array, values: Array, instruction: Instruction) -> None:
        """Writes values (n, m) at the addresses of n threads."""
        unit, size = values.dtype.itemsize, values.dtype.itemsize * values.shape[1]
        at = self.place(address, threads, size, instruction)
        if self.counters:
            self.counters.shared(at - self.base[threads], threads, size, instruction)
        self.note(at, threads, size, True, instruction)
        self.bytes.view(UNSIGNED[8 * unit])[(at // unit)[:, None] + np.arange(values.shape[1])] = values

    def barrier(self, blocks: Array | slice) -> None:
        self.epoch[blocks] += 1

    def note(self, at: Array, threads: Array, size: int, writes: bool, instruction: Instruction) -> None:
        """Looks for races of an access by these threads at these indices."""
        if not self.races:
            return
        places = (at // 2)[:, None] + np.arange(max(1, size // 2))
        warp = (threads % self.threads // 32)[:, None]
        epoch = self.epoch[threads // self.threads][:, None, None]
        others = np.arange(self.threads // 32) != warp[:, :, None]
        if ((self.writes[places] == epoch) & others).any():
            self.found[f"{'written' if writes else 'read'} after another warp's write: {instruction.text}"] += 1
        if writes and ((self.reads[places] == epoch) & others).any():
            self.found[f"written after another warp's read: {instruction.text}"] += 1
        (self.writes if writes else self.reads)[places, np.broadcast_to(warp, places.shape)] = epoch[:, :, 0]
