"""The machine code of a launch: registers, and how often its instructions ran.

Machine code isn't executed. ptxas gives each of its instructions the source line that the PTX instruction had, and the
emulator knows how often the PTX of each line ran: a basic block of machine code ran as often as most of what its lines
hold. `matched` says how well that went: loads, stores, shuffles and products are the same in both, so their count by
machine code over their count in PTX should be 1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench.machine.counters import FOLDED, Counters, classify

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
ENDS = ("BRA", "EXIT", "RET", "CALL", "BRX")
# What both kinds of code hold the same number of.
ANCHORS = {"LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "SHFL", "HMMA", "HGMMA", "DMMA"}
ANCHOR_CLASSES = {"global load", "global store", "shared load", "shared store", "shuffle", "mma"}

Place = tuple[str, int]  # a file's name and a line


class Code(NamedTuple):
    """Registers a thread, bytes of stack (spills), instructions as written, warp instructions executed by opcode,
    and how well these were matched."""

    registers: int
    stack: int
    written: int
    executed: Counts[str]
    matched: float


def machine_code(compiled: Any, counters: Counters) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-g", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    ran = _runs_by_line(counters)
    executed: Counts[str] = Counts()
    written, before = 0, 0.0
    for block in _blocks(listing):
        written += len(block)
        votes: defaultdict[float, float] = defaultdict(float)
        for _, place in block:
            for count, share in ran.get(place, {}).items():
                votes[count] += share
        before = max(votes, key=votes.__getitem__) if votes else before
        for name, _ in block:
            executed[name] += int(before)
    ptx = sum(count for kind, count in counters.by_class().items() if kind in ANCHOR_CLASSES)
    anchors = sum(count for name, count in executed.items() if name in ANCHORS)
    return Code(int(found[1]), int(found[2]), written, executed, anchors / ptx if ptx else 1.0)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _runs_by_line(counters: Counters) -> dict[Place, dict[float, float]]:
    """For each source line: how often its PTX ran, and which part of its instructions did so."""
    text = counters.program.text
    files = {int(n): Path(path).name for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)}
    found: defaultdict[Place, Counts[float]] = defaultdict(Counts)
    for count, block in zip(counters.executed, counters.program.blocks, strict=True):
        for instruction in block.instructions:
            if instruction.source and classify(instruction.name) not in FOLDED:
                found[files.get(instruction.source[0], ""), instruction.source[1]][count] += 1
    return {place: {count: n / sum(counts.values()) for count, n in counts.items()} for place, counts in found.items()}


def _blocks(listing: str) -> Iterator[list[tuple[str, Place]]]:
    """The kernel's basic blocks of (opcode, line); subroutines that follow it are left out."""
    block: list[tuple[str, Place]] = []
    place: Place = "", 0
    for line in listing.splitlines():
        if at := LINE.search(line):
            place = Path(at[1]).name, int(at[2])
        elif re.match(r"\s*\$[\w$]+:", line):
            break
        elif re.match(r"\s*\.L_x_\d+:", line):
            if block:
                yield block
            block = []
        elif (found := INSTRUCTION.search(line)) and found[1] != "NOP":
            block.append((found[1], place))
            if found[1] in ENDS:
                yield block
                block = []
    if block:
        yield block
