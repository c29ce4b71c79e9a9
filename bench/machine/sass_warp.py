"""Executes machine code (SASS) of a kernel as far as its control flow goes, and counts the instructions that it issues.

Registers hold what follows from the launch: thread and block numbers, kernel arguments, arithmetic on integers. What is
loaded from memory, and all that is computed from it, is unknown; a branch on an unknown value is an error, except where
only rare numbers take it (a division's slow path). Kernels whose control flow depends on shapes alone, as all of ours,
are counted exactly; what a warp waits for is not.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from bench.machine.sass_operations import operation
from bench.machine.sass_text import ALL, LANES, MASK, NONE, ZERO, Flags, Instruction, Program, Words, signed

PARAMETERS = {80: 0x160, 86: 0x160, 90: 0x210}  # where the first argument lies in constant bank 0
# What writes no register. UTMALDG and UBLKCP are bulk copies, SYNCS works on an mbarrier.
SILENT = re.compile(
    r"(NOP|BAR|WARPSYNC|BSSY|BSYNC|BREAK|YIELD|DEPBAR|LDGDEPBAR|LDGSTS|ST|STS|STG|ERRBAR|CCTL|MEMBAR|FENCE|NANOSLEEP"
    r"|UTMA\w+|UBLKCP|SYNCS|RED|ENDCOLLECTIVE|ARRIVES|ACQBULK|UTMACMDFLUSH|UCGABAR_\w+|ELECT|BMOV|R2P)"
)


class Unknown(Exception):
    """A branch on a value that the launch does not determine."""


class Meeting(NamedTuple):
    """Where a warp waits for others: a barrier by its number, or END; and its instructions since it last did."""

    barrier: str
    issued: int


END = ""


def chain(warps: list[list[Meeting]]) -> int:
    """The longest chain of instructions of a block: each warp's one after another, and from barrier to barrier."""
    left = [iter(meetings) for meetings in warps]
    now = [next(meetings) for meetings in left]
    clocks = [meeting.issued for meeting in now]
    members = {
        barrier: {i for i, meetings in enumerate(warps) if any(meeting.barrier == barrier for meeting in meetings)}
        for barrier in {meeting.barrier for meetings in warps for meeting in meetings}
    }
    while {meeting.barrier for meeting in now} != {END}:
        complete = next(b for b, who in members.items() if b != END and all(now[i].barrier == b for i in who))
        met = max(clocks[i] for i in members[complete])
        for i in members[complete]:
            now[i] = next(left[i])
            clocks[i] = met + now[i].issued
    return max(clocks)


class Warp:
    """One warp of one block."""

    def __init__(self, program: Program, constants: bytes, block: int, warp: int, threads: int) -> None:
        self.program, self.constants = program, constants
        self.values: dict[str, Words] = {}
        self.known: dict[str, Flags] = {}
        self.special = {"SR_CTAID.X": block, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_CgaCtaId": 0, "SRZ": 0}
        self.lanes = np.arange(LANES, dtype=np.uint64)
        self.thread = self.lanes + np.uint64(warp * LANES)
        self.alive = self.thread < threads
        self.mask = self.alive.copy()
        self.counts: Counter[Instruction] = Counter()
        self.meetings: list[Meeting] = []

    # --- Operands: values of 32 lanes, and which of them are known ---

    def read(self, name: str) -> tuple[Words, Flags]:
        if name in ("RZ", "URZ", "SRZ"):
            return ZERO, ALL
        if name[0] in "-~|+!":
            value, known = self.read(name.strip("|") if name[0] == "|" else name[1:])
            if name[0] == "-":
                return (~value + np.uint64(1)) & MASK, known
            if name[0] == "~":
                return ~value & MASK, known
            return (np.abs(signed(value)).astype(np.uint64) & MASK if name[0] == "|" else value), known
        if re.fullmatch(r"U?R\d+(\.\w+)*", name):
            name = name.split(".")[0]
            return self.values.get(name, ZERO), self.known.get(name, ALL)
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return np.full(LANES, int(name, 0) & 0xFFFFFFFF, np.uint64), ALL
        if found := re.fullmatch(r"c\[0x0\]\[(?:(U?R\w+)\+?)?(-?0x[0-9a-f]+)?\]", name):
            base, known = self.read(found[1]) if found[1] else (ZERO, ALL)
            at = base.astype(np.int64) + int(found[2] or "0", 0)
            if not known.all():
                return ZERO, NONE
            words = [self.constants[int(i) : int(i) + 4] for i in at]
            return np.array([int.from_bytes(w, "little") for w in words], np.uint64), ALL
        return ZERO, NONE  # floats, and what is not needed

    def pair(self, name: str) -> tuple[Words, Flags]:
        """A 64-bit operand."""
        low, known = self.read(name)
        if found := re.fullmatch(r"(U?R)(\d+)(\.\w+)*", name):
            high, also = self.read(f"{found[1]}{int(found[2]) + 1}")
        elif found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", name):
            high, also = self.read(f"c[0x0][{hex(int(found[1], 0) + 4)}]")
        else:
            high, also = ZERO, ALL
        return low | high << np.uint64(32), known & also

    def flag(self, name: str) -> tuple[Flags, Flags]:
        if name.startswith("!"):
            value, known = self.flag(name[1:])
            return ~value, known
        if name in ("PT", "UPT"):
            return ALL, ALL
        return self.values.get(name, ZERO).astype(bool), self.known.get(name, ALL)

    def low(self, name: str) -> Flags:
        """Whether the low 16 bits of an operand are known."""
        return self.known.get(f"{name.split('.')[0]} low", self.read(name)[1])

    def put(self, name: str, value: Any, known: Flags, low: Flags | None = None) -> None:
        """`low`: whether the low 16 bits are known, where they may be although the others aren't."""
        name = name if name.startswith("spilled") else name.split(".")[0]
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        where = self.guarded if name.startswith("U") else self.now
        if low is not None or f"{name} low" in self.known:
            before = self.known.get(f"{name} low", self.known.get(name, ALL))
            self.known[f"{name} low"] = np.where(where, (known if low is None else low) & self.sure, before)
        self.values[name] = np.where(where, value, self.values.get(name, ZERO)).astype(np.uint64)
        self.known[name] = np.where(where, known & self.sure, self.known.get(name, ALL))

    def put_pair(self, name: str, value: Words, known: Flags) -> None:
        self.put(name, value & MASK, known)
        if found := re.fullmatch(r"(U?R)(\d+)(\.\w+)*", name):
            self.put(f"{found[1]}{int(found[2]) + 1}", value >> np.uint64(32), known)

    # --- Running ---

    def run(self) -> Counter[Instruction]:
        """Lanes that diverge go on from the lowest address, where the others join them."""
        waiting: dict[int, Flags] = {}
        address = min(self.program.instructions)
        while True:
            if address in waiting:
                self.mask = self.mask | waiting.pop(address)
            elif waiting and min(waiting) < address:
                waiting[address] = self.mask
                address = min(waiting)
                self.mask = waiting.pop(address)
            one = self.program.instructions[address]
            self.counts[one] += 1
            taken, target = self.step(one)
            if one.name == "BAR" and self.now.any():
                self.meet(one.operands[0])
            stay = self.mask & ~taken
            if target is not None and taken.any():
                waiting[target] = waiting.get(target, NONE) | taken
            self.mask = stay
            address += 16
            if not self.mask.any():
                if not waiting:
                    self.meet(END)
                    return self.counts
                address = min(waiting)
                self.mask = waiting.pop(address)

    def meet(self, barrier: str) -> None:
        before = sum(meeting.issued for meeting in self.meetings)
        self.meetings.append(Meeting(barrier, self.counts.total() - before))

    def step(self, one: Instruction) -> tuple[Flags, int | None]:
        """Lanes that leave the straight line, and for where; None: they end."""
        guard, sure = self.flag(one.guard) if one.guard else (ALL, ALL)
        self.guarded, self.sure = guard | ~sure, sure
        self.now = self.mask & self.guarded
        if one.name in ("BRA", "EXIT", "RET", "CALL", "BRX"):
            if one.parts[:1] in (("DIV",), ("CONV",)):  # whether the lanes have met, as they have
                return (self.mask if one.parts[0] == "CONV" else NONE), self.target(one)
            condition = guard
            for operand in one.operands[:-1]:
                if re.fullmatch(r"!?U?P\w", operand):
                    value, also = self.flag(operand)
                    condition, sure = condition & value, sure & also
            if not sure[self.mask].all():
                condition = ALL if self.skips_a_call(one) else NONE
            return self.mask & condition, None if one.name == "EXIT" else self.target(one)
        if SILENT.fullmatch(one.name):
            for operand in one.operands[:2]:  # mbarriers that are waited for have completed; one lane is elected
                if re.fullmatch(r"U?P\d", operand) and one.name in ("SYNCS", "ELECT"):
                    first = self.lanes == self.lanes[self.mask][0]
                    self.put(operand, first if one.name == "ELECT" else ALL, ALL)
            return NONE, 0
        operation(one.name)(self, one)
        return NONE, 0

    def skips_a_call(self, one: Instruction) -> bool:
        """Of a branch on data: whether it skips the slow path of a division, or takes it. Else an error."""
        for start, skips in ((one.address + 16, True), (self.target(one), False)):
            for address in range(start, start + 16 * 6, 16):
                name = self.program.instructions[address].name if address in self.program.instructions else "BRA"
                if name == "CALL":
                    return skips
                if name in ("BRA", "EXIT"):
                    break
        raise Unknown(f"{one}: the launch does not determine it")

    def target(self, one: Instruction) -> int:
        if one.name == "RET":
            value, known = self.read(one.operands[0])
            assert known[self.mask].all()
            return int(value[self.mask][0])
        text = one.operands[-1]
        if found := re.search(r"`\((\S+?)\)", text):
            return self.program.labels[found[1]]
        return int(text, 0)
