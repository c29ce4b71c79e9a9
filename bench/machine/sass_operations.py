"""What instructions of machine code do to the registers of a warp (sass_warp.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from bench.machine.sass_text import ALL, LANES, MASK, NONE, ZERO, Flags, Instruction, Words, signed

if TYPE_CHECKING:
    from bench.machine.sass_warp import Warp


def forget(self: Warp, one: Instruction) -> None:
    """What an operation that is not followed may write is unknown."""
    for operand in one.operands[:3]:
        if re.fullmatch(r"U?P\d", operand):
            self.put(operand, ZERO, ALL if one.name == "FCHK" else NONE)
    if one.operands and (found := re.fullmatch(r"(U?R)(\d+)(\.\w+)*", one.operands[0])):
        count = 1
        if one.name in ("F2F", "F2I", "I2F"):
            count = 1 + (one.parts[0] == "F64" if one.name == "F2F" else bool({"U64", "S64", "F64"} & {*one.parts}))
        elif one.name == "HMMA":
            count = 4
        elif re.match("LD|CS2R", one.name):
            count = max([1, *({"64": 2, "128": 4, "2": 2, "4": 4}.get(part, 1) for part in one.parts)])
        for i in range(2 if one.name[:1] == "D" else count):
            self.put(f"{found[1]}{int(found[2]) + i}", ZERO, NONE)


def integer(compute: Callable[[list[Words]], Words]) -> Callable[[Warp, Instruction], None]:
    """Of 32-bit operands and one result."""

    def execute(self: Warp, one: Instruction) -> None:
        operands = [name for name in one.operands[1:] if not re.fullmatch(r"!?U?P\w", name)]
        read = [self.read(name) for name in operands]
        known = np.logical_and.reduce([k for _, k in read]) if read else ALL
        result = compute([value for value, _ in read])
        self.put(one.operands[0], result & MASK, known)

    return execute


def predicates(self: Warp, one: Instruction) -> tuple[list[str], list[str], list[str]]:
    """Results in predicates, operands that are none, and those that are, in order."""
    rest = list(one.operands[1:])
    out: list[str] = []
    while rest and re.fullmatch(r"U?P\w", rest[0]):
        out.append(rest.pop(0))
    return out, [x for x in rest if not re.fullmatch(r"!?U?P\w", x)], [x for x in rest if re.fullmatch(r"!?U?P\w", x)]


def add(self: Warp, one: Instruction) -> None:
    out, names, carries = predicates(self, one)
    read = [self.read(name) for name in names]
    known = np.logical_and.reduce([k for _, k in read])
    total = sum((value for value, _ in read), ZERO)
    if "X" in one.parts:
        for name in carries:
            value, also = self.flag(name)
            total, known = total + value.astype(np.uint64), known & also
    self.put(one.operands[0], total & MASK, known)
    for i, name in enumerate(out):
        self.put(name, total >> np.uint64(32) > i, known)


def multiply(self: Warp, one: Instruction) -> None:
    out, names, carries = predicates(self, one)
    wide = "WIDE" in one.parts or "HI" in one.parts
    (a, ka), (b, kb) = self.read(names[0]), self.read(names[1])
    c, kc = self.pair(names[2]) if wide else self.read(names[2])
    if "U32" not in one.parts and wide:
        a, b = signed(a).astype(np.uint64), signed(b).astype(np.uint64)
    product = a * b
    total = product + c
    known = ka & kb & kc
    if not wide:
        known = known | (kc & ((ka & (a == 0)) | (kb & (b == 0))))
    if "X" in one.parts:
        value, also = self.flag(carries[0])
        total, known = total + value.astype(np.uint64), known & also
    if "HI" in one.parts:
        self.put(one.operands[0], total >> np.uint64(32), known)
    elif wide:
        self.put_pair(one.operands[0], total, known)
    else:
        self.put(one.operands[0], total & MASK, known)
    for name in out:
        self.put(name, total < product, known)


def compare(self: Warp, one: Instruction) -> None:
    kind, unsigned = one.parts[0], "U32" in one.parts
    names = one.operands[2:4]
    (a, ka), (b, kb) = self.read(names[0]), self.read(names[1])
    x, y = (a, b) if unsigned else (signed(a), signed(b))
    result: Flags = {"GE": x >= y, "GT": x > y, "LT": x < y, "LE": x <= y, "EQ": x == y, "NE": x != y}[kind]
    known = ka & kb
    if "EX" in one.parts:
        low, also = self.flag(one.operands[5])
        strict: Flags = {"GE": x > y, "GT": x > y, "LT": x < y, "LE": x < y, "EQ": x != x, "NE": x != y}[kind]
        result, known = strict | ((x == y) & low), known & also
    other, also = self.flag(one.operands[4])
    combine, decided = (np.logical_and, ~other) if "AND" in one.parts else (np.logical_or, other)
    settled = (also & decided) | (known & (~result if "AND" in one.parts else result))
    self.put(one.operands[0], combine(result, other), (known & also) | settled)
    self.put(one.operands[1], combine(~result, other), known & also)


def table(index: int, a: Words, b: Words, c: Words) -> Words:
    out = np.zeros_like(a)
    for bit in range(8):
        if index >> bit & 1:
            out |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
    return out


def logic(self: Warp, one: Instruction) -> None:
    operands = list(one.operands)
    out = operands.pop(0) if re.fullmatch(r"U?P\w", operands[0]) else None
    a, b, c = (self.read(name) for name in operands[1:4])
    index = int(operands[4], 0)
    known = a[1] & b[1] & c[1]
    for one_known, zero in ((a, 0x0F), (b, 0x33), (c, 0x55)):  # x & 0 is 0 whatever x is
        if index & zero == 0:
            known = known | (one_known[1] & (one_known[0] == 0))
    result = table(index, a[0], b[0], c[0]) & MASK
    self.put(operands[0], result, known)
    if out:
        self.put(out, result != 0, known)


def predicate_logic(self: Warp, one: Instruction) -> None:
    (a, ka), (b, kb), (c, kc) = (self.flag(name) for name in one.operands[2:5])
    for out, index in zip(one.operands[:2], one.operands[5:7], strict=True):
        reads = int(index, 0)
        words = [x.astype(np.uint64) for x in (a, b, c)]
        value = table(reads, *words) & np.uint64(1)
        known = ka & kb & kc
        for flag, sure, zero in ((a, ka, 0x0F), (b, kb, 0x33), (c, kc, 0x55)):
            if reads & zero == 0:
                known = known | (sure & ~flag)
        self.put(out, value, known)


def select(self: Warp, one: Instruction) -> None:
    (a, ka), (b, kb) = self.read(one.operands[1]), self.read(one.operands[2])
    which, known = self.flag(one.operands[3])
    self.put(one.operands[0], np.where(which, a, b), known & np.where(which, ka, kb))


def extreme(self: Warp, one: Instruction) -> None:
    names = [name for name in one.operands[1:] if not re.fullmatch(r"!?U?P\w", name)]
    read = [self.read(name) for name in names]
    known = np.logical_and.reduce([k for _, k in read])
    a, b = read[-2][0], read[-1][0]
    if one.name.endswith("ADDMNMX"):
        a, b = (read[0][0] + read[1][0]) & MASK, read[2][0]
    if "U32" not in one.parts:
        a, b = signed(a), signed(b)  # type: ignore[assignment]
    least, also = self.flag(one.operands[-1])
    result = np.where(least, np.minimum(a, b), np.maximum(a, b))
    self.put(one.operands[0], result.astype(np.uint64) & MASK, known & also)


def scale_add(self: Warp, one: Instruction) -> None:
    out, names, carries = predicates(self, one)
    shift = np.uint64(int(names[-1], 0))
    a, ka = self.read(names[0])
    b, kb = self.read(names[1])
    known = ka & kb
    if "HI" in one.parts:
        if "SX32" in one.parts:
            wide = signed(a).astype(np.uint64)
        else:
            c, kc = self.read(names[2])
            wide, known = a | c << np.uint64(32), known & kc
        shifted = (wide << shift) >> np.uint64(32)
    else:
        shifted = (a << shift) & MASK
    total = shifted + b
    if "X" in one.parts:
        value, also = self.flag(carries[0])
        total, known = total + value.astype(np.uint64), known & also
    self.put(one.operands[0], total & MASK, known)
    for name in out:
        self.put(name, total >> np.uint64(32) > 0, known)


def shift(self: Warp, one: Instruction) -> None:
    low, by, high = (self.read(name) for name in one.operands[1:4])
    known = low[1] & by[1] & high[1]
    wide = low[0] | high[0] << np.uint64(32)
    count = by[0]
    limited = np.minimum(count, np.uint64(63))
    if one.parts[0] == "L":
        full = np.where(count > 63, ZERO, wide << limited)
        if "HI" in one.parts:
            result = full >> np.uint64(32)
        else:
            result = np.where(count > 31, ZERO, low[0] << np.minimum(count, np.uint64(31)))
    elif "HI" in one.parts:
        limited = np.minimum(count, np.uint64(31))
        arithmetic = "S32" in one.parts or "S64" in one.parts
        logical = np.where(count > 31, ZERO, high[0] >> limited)
        result = (signed(high[0]) >> limited.astype(np.int64)).astype(np.uint64) if arithmetic else logical
    else:
        arithmetic = "S64" in one.parts
        result = (wide.view(np.int64) >> limited.astype(np.int64)).astype(np.uint64) if arithmetic else wide >> limited
        if "U32" in one.parts or "S32" in one.parts:
            result = low[0] >> np.minimum(count, np.uint64(31))
    self.put(one.operands[0], result & MASK, known)


def permute(self: Warp, one: Instruction) -> None:
    (a, ka), (sel, ks), (c, kc) = (self.read(name) for name in one.operands[1:4])
    wide, result = a | c << np.uint64(32), np.zeros_like(a)
    halves = np.stack([self.low(one.operands[1]), ka, self.low(one.operands[3]), kc])  # known, of a and c
    known = []
    for i in range(4):
        nibble = sel >> np.uint64(4 * i)
        byte = wide >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(0xFF)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(0x80), np.uint64(0xFF), ZERO), byte)
        result |= byte << np.uint64(8 * i)
        known.append(ks & np.choose((nibble & np.uint64(7)).astype(int) // 2, halves))
    low = known[0] & known[1]
    self.put(one.operands[0], result, low & known[2] & known[3], low)


def move(self: Warp, one: Instruction) -> None:
    name = one.operands[-1] if not one.operands[-1].startswith("0xf") or len(one.operands) == 2 else one.operands[1]
    if any(part.startswith("64") for part in one.parts) or one.name == "CS2R":
        self.put_pair(one.operands[0], *self.pair(name))
    elif "U8" in one.parts or "U16" in one.parts:
        value, known = self.read(name)
        self.put(one.operands[0], value & np.uint64(0xFF if "U8" in one.parts else 0xFFFF), known)
    elif "128" in one.parts:
        found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", name)
        base = int(found[1], 0) if found else 0
        prefix, first = re.match(r"(U?R)(\d+)", one.operands[0]).groups()  # type: ignore[union-attr]
        for i in range(4):
            self.put(
                f"{prefix}{int(first) + i}", *(self.read(f"c[0x0][{hex(base + 4 * i)}]") if found else (ZERO, NONE))
            )
    else:
        self.put(one.operands[0], *self.read(name))


def special(self: Warp, one: Instruction) -> None:
    name = one.operands[1]
    if name in ("SR_TID.X", "SR_LANEID"):
        self.put(one.operands[0], self.thread if name == "SR_TID.X" else self.lanes, ALL)
    elif name in self.special:
        self.put(one.operands[0], np.full(LANES, self.special[name], np.uint64), ALL)
    else:
        self.put(one.operands[0], ZERO, ALL if name in ("SR_TID.Y", "SR_TID.Z") else NONE)


def to_uniform(self: Warp, one: Instruction) -> None:
    value, known = self.read(one.operands[-1])
    lane = int(self.lanes[self.mask][0])
    self.put(one.operands[0], np.full(LANES, value[lane], np.uint64), np.full(LANES, known[lane]))


# Integers are divided by way of float reciprocals; they are corrected afterwards, so the last bit does not matter.
def to_float(self: Warp, one: Instruction) -> None:
    if "F64" in one.parts or "F16" in one.parts:
        return forget(self, one)
    wide = "U64" in one.parts
    value, known = self.pair(one.operands[1]) if wide else self.read(one.operands[1])
    number = (value if wide or "U32" in one.parts else signed(value)).astype(np.float64).astype(np.float32)
    self.put(one.operands[0], number.view(np.uint32).astype(np.uint64), known)


def reciprocal(self: Warp, one: Instruction) -> None:
    value, known = self.read(one.operands[1])
    if one.parts[0] != "RCP":
        return forget(self, one)
    with np.errstate(all="ignore"):
        number = np.float32(1) / value.astype(np.uint32).view(np.float32)
    self.put(one.operands[0], number.view(np.uint32).astype(np.uint64), known)


def to_integer(self: Warp, one: Instruction) -> None:
    if "F64" in one.parts:
        return forget(self, one)
    value, known = self.read(one.operands[1])
    number = np.nan_to_num(value.astype(np.uint32).view(np.float32).astype(np.float64))
    if "U64" in one.parts:
        return self.put_pair(one.operands[0], np.clip(number, 0, 2**63).astype(np.uint64), known)
    self.put(one.operands[0], np.clip(number, 0, 2**32 - 1).astype(np.uint64), known)


def half_constant(self: Warp, one: Instruction) -> None:
    """0 x 0 + a constant, two halves: how compilers set a register where the other units are busy."""
    if not all(name.endswith("RZ") for name in one.operands[1:3]) or len(one.operands) != 5:
        return forget(self, one)
    high, low = (int(np.array(float(number), np.float16).view(np.uint16)) for number in one.operands[3:])
    self.put(one.operands[0], np.full(LANES, high << 16 | low, np.uint64), ALL)


def vote(self: Warp, one: Instruction) -> None:
    flag, known = self.flag(one.operands[-1])
    if not known[self.mask].all():
        if "ANY" not in one.parts:
            return forget(self, one)
        flag = flag & known  # kernels leave for their rare paths where any lane finds what it looks for
    voted = flag[self.mask]
    result = voted.any() if "ANY" in one.parts else voted.all()
    for operand in one.operands[:2]:
        if re.fullmatch(r"U?P\d", operand):
            self.put(operand, np.full(LANES, result), ALL)
        elif re.fullmatch(r"U?R\d+", operand):
            ballot = sum(1 << i for i in range(LANES) if self.mask[i] and flag[i])
            self.put(operand, np.full(LANES, ballot, np.uint64), ALL)
    return None


def pack_predicates(self: Warp, one: Instruction) -> None:
    bits, known = ZERO, ALL
    for i in range(7):
        flag, also = self.flag(f"P{i}")
        chosen = int(one.operands[-1], 0) >> i & 1
        bits = bits | (flag.astype(np.uint64) << np.uint64(i) if chosen else ZERO)
        known = known & (also if chosen else ALL)
    self.put(one.operands[0], bits, known)


def shuffle(self: Warp, one: Instruction) -> None:
    value, known = self.read(one.operands[2])
    by, also = self.read(one.operands[3])
    lanes = self.lanes ^ by if "BFLY" in one.parts else by
    source = (lanes % np.uint64(LANES)).astype(int)
    self.put(one.operands[1], value[source], known[source] & also & (one.parts[0] in ("IDX", "BFLY")))


def spill(self: Warp, one: Instruction) -> None:
    """Local memory by the text of its address."""
    self.put(f"spilled {one.operands[0]}", *self.read(one.operands[1]))


def reload(self: Warp, one: Instruction) -> None:
    name = f"spilled {one.operands[1]}"
    self.put(one.operands[0], self.values.get(name, ZERO), self.known.get(name, ALL))


OPERATIONS: dict[str, Callable[[Warp, Instruction], None]] = {
    "IADD3": add, "VIADD": add, "IADD": add, "IMAD": multiply, "ISETP": compare, "LOP3": logic,
    "PLOP3": predicate_logic, "SEL": select, "VIADDMNMX": extreme, "VIMNMX": extreme, "IMNMX": extreme,
    "LEA": scale_add, "SHF": shift, "PRMT": permute, "MOV": move, "LDC": move, "ULDC": move, "CS2R": move,
    "S2R": special, "S2UR": special, "R2UR": to_uniform, "SHFL": shuffle, "LDL": reload, "STL": spill,
    "I2F": to_float, "I2FP": to_float, "MUFU": reciprocal, "F2I": to_integer, "VOTE": vote, "VOTEU": vote,
    "P2R": pack_predicates, "HFMA2": half_constant,
    "IABS": integer(lambda x: np.abs(signed(x[0])).astype(np.uint64)),
    "POPC": integer(lambda x: np.array([int(v).bit_count() for v in x[0]], np.uint64)),
}  # fmt: skip


def operation(name: str) -> Callable[[Warp, Instruction], None]:
    """Of an instruction; those of uniform registers do the same as others."""
    return OPERATIONS.get(name) or OPERATIONS.get(name.removeprefix("U")) or forget
