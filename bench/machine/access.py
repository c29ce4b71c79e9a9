"""Loads and stores, copies that run on while the program goes on, and barriers."""

from __future__ import annotations

import re

import numpy as np

from bench.machine.numbers import UNSIGNED, bits, dtype
from bench.machine.operation import Operation, instruction, together
from bench.machine.parse import Fault
from bench.machine.threads import Mask, Step, Threads


def _space(operation: Operation) -> str:
    space = operation.parts[1].split(":")[0]
    operation.expect(space in ("global", "shared"))
    return space


@instruction("ld")
def load(operation: Operation) -> Step:
    if operation.parts[1] == "param":
        return _parameter(operation)
    space, type_ = _space(operation), operation.type
    targets, address, unit = operation.targets(0), operation.address(1), bits(type_) // 8
    size, instruction = unit * len(targets), operation.instruction

    def step(threads: Threads, mask: Mask) -> None:
        active = threads.active(mask)
        at = address(threads)[active]
        if space == "shared":
            found = threads.shared.load(at, active, size, unit, instruction)
        else:
            if threads.profile:
                threads.counters.global_(at, active, size, instruction)
            found = threads.memory.load(at, size, unit, instruction)
        for n, target in enumerate(targets):
            value = np.zeros(threads.count, found.dtype)
            value[active] = found[:, n]
            target(threads, value.view(dtype(type_)), mask)

    return step


def _parameter(operation: Operation) -> Step:
    found = re.fullmatch(r"\[\s*(\w+)\s*\]", operation.arguments[1])
    if found is None:
        raise operation.unknown()
    name, target, type_ = found[1], operation.target(), operation.type

    def step(threads: Threads, mask: Mask) -> None:
        value = threads.parameters[name]
        if isinstance(value, float):
            number = np.array([value], np.float64 if bits(type_) == 64 else np.float32)
        else:
            number = np.array([value % (1 << bits(type_))], UNSIGNED[bits(type_)]).view(dtype(type_))
        target(threads, number, mask)

    return step


@instruction("st")
def store(operation: Operation) -> Step:
    space, type_ = _space(operation), f"b{bits(operation.type)}"
    values, address = operation.sources(1, type_), operation.address(0)
    size, instruction = bits(type_) // 8 * len(values), operation.instruction

    def step(threads: Threads, mask: Mask) -> None:
        active = threads.active(mask)
        at = address(threads)[active]
        stored = np.stack([np.broadcast_to(value(threads), threads.count)[active] for value in values], 1)
        if space == "shared":
            threads.shared.store(at, active, stored, instruction)
        else:
            if threads.profile:
                threads.counters.global_(at, active, size, instruction)
            threads.memory.store(at, stored, instruction)

    return step


@instruction("cp")
def copy(operation: Operation) -> Step:
    """cp.async: to shared memory, past the registers. It is visible at the wait; till then its place holds NaN."""
    if "commit_group" in operation.parts:
        return _commit
    if "wait_group" in operation.parts:
        return _wait(operation)
    operation.expect(operation.parts[1] == "async" and operation.parts[3:5] == ["shared", "global"])
    to, of, size = operation.address(0), operation.address(1), int(operation.arguments[2], 0)
    given = operation.source(3, "u32") if len(operation.arguments) > 3 else None
    instruction = operation.instruction

    def step(threads: Threads, mask: Mask) -> None:
        active = threads.active(mask)
        place = threads.shared.place(to(threads)[active], active, size, instruction)
        count = np.broadcast_to(given(threads), threads.count)[active] if given else np.full(len(active), size)
        if ((count != 0) & (count != size)).any():
            raise Fault(f"a copy of a part is not emulated: {instruction.text}")
        copied = np.zeros((len(active), size), np.uint8)  # zeros where nothing is given
        given_by = count > 0
        if given_by.any():
            at = of(threads)[active][given_by]
            if threads.profile:
                threads.counters.global_(at, active[given_by], size, instruction)
            found = threads.memory.load(at, size, 4, instruction)
            copied[given_by] = found.view(np.uint8).reshape(-1, size)
        threads.shared.note(place, active, size, True, instruction)
        threads.shared.bytes[place[:, None] + np.arange(size)] = 0xFF
        threads.copies.append((active, threads.group[active], place, copied))

    return step


def _commit(threads: Threads, mask: Mask) -> None:
    threads.group += 1 if mask is None else mask


def _wait(operation: Operation) -> Step:
    """For all but the last n groups of a thread: cp.async.wait_group n."""
    latest = int(operation.arguments[0])

    def step(threads: Threads, mask: Mask) -> None:
        left = []
        for active, groups, place, copied in threads.copies:
            done = groups < threads.group[active] - latest
            done = done if mask is None else done & mask[active]
            if done.any():
                threads.shared.note(place[done], active[done], copied.shape[1], True, operation.instruction)
                threads.shared.bytes[place[done][:, None] + np.arange(copied.shape[1])] = copied[done]
            if not done.all():
                left.append((active[~done], groups[~done], place[~done], copied[~done]))
        threads.copies = left

    return step


@instruction("bar", "barrier")
def barrier(operation: Operation) -> Step:
    """bar.sync 0: all live threads of a block have to be there. bar.warp.sync: all of a warp."""
    instruction = operation.instruction
    if operation.parts[1] == "warp":
        return together(operation)
    operation.expect(operation.parts[1] == "sync" and operation.arguments == ["0"])

    def step(threads: Threads, mask: Mask) -> None:
        if mask is None:
            threads.shared.barrier(slice(None))
            return
        there, live = mask.reshape(threads.blocks, -1), threads.live.reshape(threads.blocks, -1)
        blocks = there.any(1)
        if (there != live)[blocks].any():
            raise Fault(f"not all threads of a block are at: {instruction.text} (line {instruction.line})")
        threads.shared.barrier(blocks)

    return step


@instruction("fence", "membar")
def fence(operation: Operation) -> Step:
    return lambda threads, mask: None
