"""PTX as text to a program: instructions, registers, basic blocks, and the order in which blocks run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from bench.machine.numbers import bits

TOKEN = re.compile(r"\s*(//[^\n]*|\{|\}|\$?[\w$]+:(?!:)|\.loc[^\n]*|\.pragma[^;]*;|[^;]*?;)", re.S)
ENDS = ("bra", "ret", "exit")  # of a basic block


class Fault(Exception):
    """What a program must not do, or what the emulator doesn't know."""


@dataclass(eq=False)
class Instruction:
    """`@!%p1 add.s32 %r1, %r2, 1;`: name add.s32, arguments, guard %p1, negated."""

    text: str
    line: int
    source: tuple[int, int] | None  # file and line of the kernel's Python, by the last .loc
    name: str = field(init=False)
    parts: list[str] = field(init=False)
    arguments: list[str] = field(init=False)
    guard: str | None = None
    negated: bool = False

    def __post_init__(self) -> None:
        rest = self.text
        if guarded := re.match(r"@(!?)(%?\w+)\s+(.*)", rest):
            self.negated, self.guard, rest = guarded[1] == "!", guarded[2], guarded[3]
        self.name, _, arguments = rest.partition(" ")
        self.parts = self.name.split(".")
        self.arguments = split(arguments)

    @property
    def ends(self) -> bool:
        return self.parts[0] in ENDS


@dataclass
class Block:
    """Instructions that run from the first to the last; `end` is a branch or a return, None where it falls through."""

    instructions: list[Instruction]
    end: Instruction | None
    target: int | None = None  # the block that `end` branches to


def split(text: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    found, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [argument.strip() for argument in found if argument.strip()]


class Program:
    """One kernel: its name, parameters as (name, type), threads a block, registers' widths in bits, and blocks.

    `order` ranks the blocks by reverse postorder, a loop's before what follows it: where the waiting block of the
    lowest rank always runs next, threads that branched apart meet again. Blocks don't always lie so in the text.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        body = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", body, re.S)
        if entry is None:
            raise Fault("no .entry in the text")
        self.name = entry[1]
        found = (re.fullmatch(r"\.param\s+\.(\w+).*?(\w+)", p.strip(), re.S) for p in entry[2].split(",") if p.strip())
        self.parameters = [(parameter[2], parameter[1]) for parameter in found if parameter]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
        if threads is None:
            raise Fault(f"{self.name}: threads of a block aren't stated")
        self.threads = int(threads[1])
        self.width: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        self._read(body, entry.end())
        self.index = {name: number for number, name in enumerate(self.width)}
        self.blocks = self._blocks()
        self.order = self._order()

    def _read(self, body: str, at: int) -> None:
        depth, seen, line, source = 1, 0, 1, None
        while depth:
            token = TOKEN.match(body, at)
            if token is None:
                raise Fault(f"{self.name}: cannot parse {body[at : at + 80]!r}")
            line += body.count("\n", seen, token.start(1))
            seen, at, text = token.start(1), token.end(), token[1]
            if text in "{}":
                depth += 1 if text == "{" else -1
            elif text.startswith(".loc"):
                file, row = text.split()[1:3]
                source = int(file), int(row)
            elif text.endswith(":"):
                self._labels[text[:-1]] = len(self.instructions)
            elif text.startswith(".reg"):
                self._declare(text)
            elif text.startswith(".local"):
                raise Fault(f"{self.name}: local memory is not emulated: {text}")
            elif not text.startswith((".", "//")):
                self.instructions.append(Instruction(" ".join(text[:-1].split()), line, source))

    def _declare(self, text: str) -> None:
        declared = re.match(r"\.reg\s+\.(\w+)\s+(.*);", text, re.S)
        assert declared, text
        for name in re.split(r"\s*,\s*", declared[2].strip()):
            many = re.fullmatch(r"([%\w]+)<(\d+)>", name)
            for register in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                if self.width.setdefault(register, bits(declared[1])) != bits(declared[1]):
                    raise Fault(f"{self.name}: {register} is declared twice, with different widths")

    def _blocks(self) -> list[Block]:
        starts = {0, *self._labels.values()}
        starts |= {n + 1 for n, instruction in enumerate(self.instructions) if instruction.ends}
        bounds = [*sorted(n for n in starts if n < len(self.instructions)), len(self.instructions)]
        number = {start: b for b, start in enumerate(bounds)}
        blocks = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            inside = self.instructions[start:end]
            last = inside[-1] if inside[-1].ends else None
            branches = last is not None and last.parts[0] == "bra"
            target = number[self._labels[inside[-1].arguments[0]]] if branches else None
            blocks.append(Block(inside, last, target))
        return blocks

    def following(self, number: int) -> list[int]:
        """The blocks that may run after this one."""
        block = self.blocks[number]
        falls = block.end is None or block.end.guard is not None
        found = [number + 1] * falls + [block.target] * (block.target is not None)
        return [following for following in found if following is not None and following < len(self.blocks)]

    def _order(self) -> list[int]:
        after = [self.following(b) for b in range(len(self.blocks))]
        reach = [self._reachable(after, b) for b in range(len(after))]

        def branches(b: int) -> list[int]:  # visited first, hence ranked last: what leads out of b's loop
            return sorted(after[b], key=lambda following: b in reach[following])

        done: list[int] = []
        seen, stack = {0}, [(0, branches(0))]
        while stack:
            b, left = stack[-1]
            if not left:
                done.append(stack.pop()[0])
            elif (following := left.pop(0)) not in seen:
                seen.add(following)
                stack.append((following, branches(following)))
        rank = {b: i for i, b in enumerate(reversed(done))}
        return [rank.get(b, len(rank)) for b in range(len(after))]

    @staticmethod
    def _reachable(after: list[list[int]], start: int) -> set[int]:
        found: set[int] = set()
        waiting = list(after[start])
        while waiting:
            if (b := waiting.pop()) not in found:
                found.add(b)
                waiting += after[b]
        return found
