"""Machine code (SASS) as nvdisasm prints it, in parts; and numbers of 32 lanes."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]
LANES = 32
MASK = np.uint64(0xFFFFFFFF)
ALL = np.ones(LANES, bool)
NONE = np.zeros(LANES, bool)
ZERO = np.zeros(LANES, np.uint64)


class Instruction(NamedTuple):
    address: int
    guard: str  # "", "P0", "!P0", "UP0"
    name: str
    parts: tuple[str, ...]  # of the name, after its first dot
    operands: tuple[str, ...]
    place: tuple[str, ...]  # source lines as path:number, from the kernel inwards


class Program(NamedTuple):
    instructions: dict[int, Instruction]
    labels: dict[str, int]


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*?)\s*;")


def programs(text: str) -> dict[str, Program]:
    """Kernels by symbol, out of what ``nvdisasm -gi -c`` prints."""
    found: dict[str, Program] = {}
    program = Program({}, {})
    chain: list[str] = []
    fresh = True
    for line in text.splitlines():
        if name := re.match(r"\.text\.(\S+):", line):
            program = found[name[1]] = Program({}, {})
        elif label := re.match(r"(\S+):$", line):
            program.labels[label[1]] = -1  # of the next instruction
        elif source := re.match(r'\s+//## File "([^"]*)", line (\d+)', line):
            place = f"{source[1]}:{source[2]}"
            chain = [place] if fresh else [place, *chain]
            fresh = False
        elif one := LINE.match(line):
            address = int(one[1], 16)
            for label_name, at in program.labels.items():
                if at < 0:
                    program.labels[label_name] = address
            operands = tuple(part.strip().replace(".reuse", "") for part in split(one[5]))
            parts = tuple(one[4].split(".")[1:])
            program.instructions[address] = Instruction(address, one[2] or "", one[3], parts, operands, tuple(chain))
            fresh = True
    return found


def split(text: str) -> list[str]:
    """Operands at the commas outside brackets."""
    out, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            out.append(part)
            part = ""
        else:
            part += letter
    return [*out, part] if part.strip() else out


def signed(x: Words) -> NDArray[np.int64]:
    return x.astype(np.uint32).view(np.int32).astype(np.int64)
