"""What a launch did: instructions by class, sectors of global memory, wavefronts of shared memory."""

from __future__ import annotations

from collections import Counter as Counts
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from bench.machine.numbers import Array
from bench.machine.parse import Instruction, Program

SECTOR = 32  # bytes that global memory moves at once
BANKS = 32  # of shared memory, 4 bytes wide
FOLDED = ("mov", "param")  # classes that ptxas makes no instructions of
FIRST = {
    "st": "global store", "atom": "global store", "red": "global store",
    "ldmatrix": "shared load", "stmatrix": "shared store", "mma": "mma",
    "ex2": "mufu", "lg2": "mufu", "rcp": "mufu", "sqrt": "mufu", "rsqrt": "mufu", "tanh": "mufu", "sin": "mufu",
    "cos": "mufu", "shfl": "shuffle", "vote": "shuffle", "activemask": "shuffle", "redux": "shuffle",
    "bar": "barrier", "barrier": "barrier", "fence": "barrier", "membar": "barrier",
    "bra": "branch", "ret": "branch", "exit": "branch", "cvt": "conversion", "mov": "mov", "cvta": "mov",
}  # fmt: skip


@cache
def classify(name: str) -> str:
    """The class of an instruction, as `cp.async.cg.shared.global`: "global load"."""
    parts = name.split(".")
    if parts[0] == "ld":
        return {"param": "param", "shared": "shared load"}.get(parts[1].split(":")[0], "global load")
    if parts[0] == "st" and parts[1].startswith("shared"):
        return "shared store"
    if parts[0] == "cp":
        return "global load" if "global" in parts else "other"
    if parts[0] == "wgmma":
        return "mma" if parts[1] == "mma_async" else "other"
    if parts[0] == "div" and parts[-1] in ("f32", "f64"):
        return "mufu"
    if parts[0] in FIRST:
        return FIRST[parts[0]]
    return "float" if parts[-1].startswith(("f", "bf")) and parts[0] != "selp" else "integer"


@dataclass
class Site:
    """One memory instruction: requests of a warp; sectors or wavefronts, found and at best; bytes of its threads."""

    requests: int = 0
    found: int = 0
    best: int = 0
    bytes: int = 0


class Touched(NamedTuple):
    """Bytes of a tensor's memory, each counted once."""

    name: str
    size: int
    read: int
    written: int


class Counters:
    """Of one launch. `executed` counts the warps that ran each basic block, `divergent` the warps that a branch
    parted; the rest is counted only where the launch is profiled."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.executed = [0] * len(program.blocks)
        self.divergent = 0
        self.sites: defaultdict[Instruction, Site] = defaultdict(Site)
        self.first_sectors = 0  # loaded, each counted once a block of threads: what an L1 cache of its own would miss
        self.races: Counts[str] = Counts()
        self.touched: list[Touched] = []  # of global memory
        self._loaded: list[Array] = []

    def by_class(self) -> Counts[str]:
        """Warp instructions of PTX by class."""
        return self._sum(lambda instruction: classify(instruction.name))

    def by_name(self) -> Counts[str]:
        """Warp instructions of PTX by name."""
        return self._sum(lambda instruction: instruction.name)

    def _sum(self, key) -> Counts[str]:  # type: ignore[no-untyped-def]
        found: Counts[str] = Counts()
        for count, block in zip(self.executed, self.program.blocks, strict=True):
            for instruction in block.instructions:
                found[key(instruction)] += count
        return found

    @property
    def warp_instructions(self) -> int:
        """Of PTX, without loads of parameters and moves."""
        return sum(count for kind, count in self.by_class().items() if kind not in FOLDED)

    def memory(self, kind: str) -> Site:
        """The sum over the sites of a class, as "global load"."""
        total = Site()
        for instruction, site in self.sites.items():
            if classify(instruction.name) == kind:
                total.requests += site.requests
                total.found += site.found
                total.best += site.best
                total.bytes += site.bytes
        return total

    @property
    def read(self) -> int:
        """Bytes read of global memory, each counted once."""
        return sum(tensor.read for tensor in self.touched)

    @property
    def written(self) -> int:
        """Bytes written of global memory, each counted once."""
        return sum(tensor.written for tensor in self.touched)

    @property
    def l2_bytes(self) -> int:
        """Asked of L2: sectors stored and copied asynchronously past L1, and those loaded once a block of threads."""
        past = sum(
            site.found for instruction, site in self.sites.items()
            if classify(instruction.name) == "global store" or instruction.parts[0] == "cp"
        )  # fmt: skip
        return SECTOR * (past + self.first_sectors)

    def worst_sites(self, count: int) -> list[tuple[Instruction, Site]]:
        """Those that lose most sectors or wavefronts."""
        return sorted(self.sites.items(), key=lambda item: item[1].best - item[1].found)[:count]

    def global_(self, address: Array, threads: Array, size: int, instruction: Instruction) -> None:
        """Sectors that each warp's access of `size` bytes a thread touches; at best those of its distinct bytes."""
        warp = threads // 32
        order = np.lexsort((address, warp))
        warp, address = warp[order], address[order]
        fresh = np.ones(len(warp), bool)
        fresh[1:] = (warp[1:] != warp[:-1]) | (address[1:] != address[:-1])
        sector = np.ones(len(warp), bool)
        sector[1:] = (warp[1:] != warp[:-1]) | (address[1:] // SECTOR != address[:-1] // SECTOR)
        site = self.sites[instruction]
        distinct = np.bincount(warp[fresh])
        site.requests += int(np.count_nonzero(distinct))
        site.found += int(sector.sum())
        site.best += int((-(-distinct * size // SECTOR)).sum())
        site.bytes += len(threads) * size
        if instruction.parts[0] == "ld":
            block = warp[sector] * 32 // self.program.threads
            self._loaded.append((block.astype(np.int64) << 43) | (address[sector] // SECTOR))

    def shared(self, address: Array, threads: Array, size: int, instruction: Instruction) -> None:
        """Wavefronts: as many as the most distinct words in one bank. Accesses of 8 bytes a thread take half a warp at
        a time, those of 16 (a matrix of ldmatrix too) a quarter."""
        words = max(1, size // 4)
        part = threads // (32 // words)
        place = ((address // 4)[:, None] + np.arange(words)).reshape(-1)
        key = np.unique(np.repeat(part, words) << 32 | place)
        part, bank = key >> 32, key % BANKS
        each = np.bincount((part - part[0]) * BANKS + bank)
        each = np.pad(each, (0, -len(each) % BANKS)).reshape(-1, BANKS)
        site = self.sites[instruction]
        site.requests += len(np.unique(threads // 32))
        site.found += int(each.max(1).sum())
        site.best += int((-(-each.sum(1) // BANKS)).sum())
        site.bytes += len(threads) * size

    def finish_chunk(self) -> None:
        """Blocks that ran together are done: their loads are merged."""
        if self._loaded:
            self.first_sectors += len(np.unique(np.concatenate(self._loaded)))
            self._loaded.clear()
