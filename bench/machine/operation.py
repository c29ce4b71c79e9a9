"""An instruction's operands as functions on threads, and the table of what each instruction does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.machine.numbers import SIGNED, UNSIGNED, Array, bits, dtype
from bench.machine.parse import Fault, Instruction, Program
from bench.machine.threads import Mask, Step, Threads

Value = Callable[[Threads], Array]  # of all threads, or one for all, (1,)
Write = Callable[[Threads, Array, Mask], None]
Translate = Callable[["Operation"], Step]

INSTRUCTIONS: dict[str, Translate] = {}  # by the first part of the name


def instruction(*names: str) -> Callable[[Translate], Translate]:
    """Enters a function that makes an instruction a step into the table."""

    def enter(translate: Translate) -> Translate:
        INSTRUCTIONS.update(dict.fromkeys(names, translate))
        return translate

    return enter


class Operation:
    """An instruction of a program, whose operands are looked up once."""

    def __init__(self, program: Program, instruction: Instruction) -> None:
        self.program, self.instruction = program, instruction
        self.head, self.parts, self.arguments = instruction.parts[0], instruction.parts, instruction.arguments

    @property
    def type(self) -> str:
        """The last part of the name, in most instructions the type of all operands."""
        return self.parts[-1]

    def translate(self) -> Step:
        """The step, executed by those threads alone whose guard holds."""
        if self.head not in INSTRUCTIONS:
            raise self.unknown()
        step = INSTRUCTIONS[self.head](self)
        if self.instruction.guard is None:
            return step
        guard, negated = self.program.index[self.instruction.guard], self.instruction.negated

        def guarded(threads: Threads, mask: Mask) -> None:
            wanted = ~threads.registers[guard] if negated else threads.registers[guard]
            wanted = wanted if mask is None else wanted & mask
            if wanted.any():
                step(threads, None if wanted.all() else wanted)

        return guarded

    def unknown(self) -> Fault:
        return Fault(f"not emulated: {self.instruction.text}")

    def expect(self, known: bool) -> None:
        """Refuses a form of the instruction that isn't emulated."""
        if not known:
            raise self.unknown()

    def source(self, argument: int | str, type_: str | None = None) -> Value:
        """An operand, by its place or as text, as values of a type; the instruction's, where none is given."""
        text, type_ = self._text(argument), type_ or self.type
        wanted = dtype(type_)
        if text.startswith("!"):
            inverted = self.source(text[1:], type_)
            return lambda threads: ~inverted(threads)
        if text in self.program.index:
            register, width = self.program.index[text], self.program.width[text]
            if type_ == "pred" or width == bits(type_):
                return lambda threads: threads.registers[register].view(wanted)
            narrow = UNSIGNED[bits(type_)]
            return lambda threads: threads.registers[register].astype(narrow).view(wanted)
        if text.startswith("%"):
            return lambda threads: self._special(threads, text).view(wanted)
        constant = self._constant(text, type_)
        return lambda threads: constant

    def _text(self, argument: int | str) -> str:
        return self.arguments[argument] if isinstance(argument, int) else argument

    def _special(self, threads: Threads, name: str) -> Array:
        if name not in threads.special:
            raise self.unknown()
        return threads.special[name]

    def _constant(self, text: str, type_: str) -> Array:
        """One entry, of a decimal or hexadecimal integer or of a float's bits: 0f3F800000, 0d3FF0000000000000."""
        if type_ == "pred":
            return np.array([int(text) != 0])
        width, base = bits(type_), {"0f": 16, "0d": 16}.get(text[:2].lower())
        if type_ in ("f32", "f64") and base is None:
            raise self.unknown()
        try:
            number = 0 if text == "global_smem" else int(text[2:] if base else text.rstrip("U"), base or 0)
        except ValueError:
            raise self.unknown() from None
        return np.array([number % (1 << width)], np.uint64).astype(UNSIGNED[width]).view(dtype(type_))

    def vector(self, argument: int | str) -> list[str]:
        """The operands in braces, or the only one."""
        return [part.strip() for part in self._text(argument).strip("{} ").split(",")]

    def sources(self, argument: int, type_: str | None = None) -> list[Value]:
        return [self.source(text, type_) for text in self.vector(argument)]

    def target(self, argument: int | str = 0, type_: str | None = None) -> Write:
        """Writes a register: a number narrower than it is widened by its sign, if it has one."""
        text = self._text(argument)
        if text == "_":
            return lambda threads, value, mask: None
        register, width = self.program.index[text], self.program.width[text]

        def write(threads: Threads, value: Array, mask: Mask) -> None:
            if width > 1:
                if value.dtype.itemsize * 8 != width:
                    value = value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[width])
                value = np.ascontiguousarray(value).view(UNSIGNED[width])
            if mask is not None:
                value = np.where(mask, value, threads.registers[register])
            elif len(value) == 1:
                value = np.repeat(value, threads.count)
            threads.registers[register] = value

        return write

    def targets(self, argument: int = 0) -> list[Write]:
        return [self.target(text) for text in self.vector(argument)]

    def address(self, argument: int) -> Value:
        """`[%rd1 + 16]` as int64, one a thread."""
        found = re.fullmatch(r"\[\s*(%?[\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", self.arguments[argument])
        if found is None:
            raise self.unknown()
        offset = int(found[2] or "0", 0)
        if found[1] not in self.program.index:
            base = self.source(found[1], "u32")
            return lambda threads: np.repeat(base(threads).astype(np.int64) + offset, threads.count)
        register, width = self.program.index[found[1]], self.program.width[found[1]]
        if width == 64:
            return lambda threads: threads.registers[register].view(np.int64) + offset
        return lambda threads: threads.registers[register].astype(np.int64) + offset

    def apply(self, function: Callable[..., Array], type_: str | None = None, result: int = 0) -> Step:
        """target = function(sources), all of one type."""
        sources = [self.source(n, type_) for n in range(result + 1, len(self.arguments))]
        target = self.target(result)
        return lambda threads, mask: target(threads, function(*(source(threads) for source in sources)), mask)


def translate(program: Program, instruction: Instruction) -> Any:
    """The step of an instruction."""
    return Operation(program, instruction).translate()


def together(operation: Operation) -> Step:
    """A step that does nothing but ask that all threads of a warp are at it."""

    def step(threads: Threads, mask: Mask) -> None:
        threads.warps(mask, operation.instruction)

    return step
