"""wgmma: products by four warps of operands in shared memory, which run on while the program goes on.

The accumulators hold NaN from the instruction to the wait. The operands are read at the instruction.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bench.machine.matrix import rows_of_registers, shape
from bench.machine.numbers import Array, halves
from bench.machine.operation import Operation, Value, Write, instruction, together
from bench.machine.parse import Fault, Instruction
from bench.machine.threads import Mask, Step, Threads

DEPTH = 16  # columns of a, rows of b
WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a swizzle, by the descriptor's bits 62 and 63; 16: none


class Product(NamedTuple):
    """One under way: where its results go, by name too; the results; threads that wait for it, and their groups."""

    targets: list[Write]
    names: list[str]
    results: list[Array]
    threads: Array
    groups: Array


@instruction("wgmma")
def warpgroup(operation: Operation) -> Step:
    if operation.parts[1] == "fence":
        return together(operation)
    if operation.parts[1] == "commit_group":
        return _commit
    return _wait(operation) if operation.parts[1] == "wait_group" else _multiply(operation)


def _commit(threads: Threads, mask: Mask) -> None:
    threads.product_group += 1 if mask is None else mask


def _wait(operation: Operation) -> Step:
    latest = int(operation.arguments[0])

    def step(threads: Threads, mask: Mask) -> None:
        left = []
        for product in threads.products:
            done = product.threads & (product.groups < threads.product_group - latest)
            done = done if mask is None else done & mask
            if done.any():
                for target, result in zip(product.targets, product.results, strict=True):
                    target(threads, result, None if done.all() else done)
            if (product.threads & ~done).any():
                left.append(product._replace(threads=product.threads & ~done))
        threads.products = left

    return step


def _multiply(operation: Operation) -> Step:
    """d = a b + d, or a b where the predicate says so: 64 x n by 16. b is given by a descriptor, a by one too or
    in registers, 16 rows a warp as a fragment of mma."""
    (m, n, k), (sum_type, type_, other) = shape(operation), operation.parts[-3:]
    names = operation.vector(0)
    operation.expect(sum_type == "f32" and type_ == other and type_ in ("f16", "bf16") and (m, k) == (64, DEPTH))
    in_registers = operation.arguments[1].startswith("{")
    operation.expect(len(names) == n // 2 and operation.arguments[4:6] == ["1", "1"])  # neither operand is negated
    accumulators, targets = operation.sources(0, "f32"), operation.targets(0)
    fragment = operation.sources(1, "b32") if in_registers else []
    left, right = None if in_registers else operation.source(1, "b64"), operation.source(2, "b64")
    operation.expect(len(fragment) in (0, 4))
    adds = operation.source(3, "pred")
    transposed = [argument == "1" for argument in operation.arguments[6:]]  # of those given by descriptors
    # Thread 4 g + t of warp q holds rows 16 q + g and + 8 and of every 8 columns 2 t and 2 t + 1.
    lane, register = np.arange(32)[:, None], np.arange(n // 2)
    row = lane // 4 + 8 * (register // 2 % 2)
    column = 2 * (lane % 4) + 8 * (register // 4) + register % 2

    def step(threads: Threads, mask: Mask) -> None:
        groups = threads.warps(mask, operation.instruction, 128)
        if left is None:
            a = rows_of_registers(fragment, type_, threads, 16, DEPTH).reshape(-1, 64, DEPTH)[groups]
        else:
            a = _operand(threads, left, groups, 64, transposed[0], type_, operation.instruction)
        b = _operand(threads, right, groups, n, transposed[-1], type_, operation.instruction)
        found = np.zeros((threads.count // 128, 4, 32, n // 2))
        found[groups] = (a @ b.swapaxes(1, 2)).reshape(-1, 4, 16, n)[:, :, row, column]
        products = found.reshape(threads.count, n // 2)
        active = np.ones(threads.count, bool) if mask is None else mask
        before = _take_over(threads, names, [np.broadcast_to(value(threads), threads.count) for value in accumulators],
                            active, operation.instruction)  # fmt: skip
        added = np.broadcast_to(adds(threads), threads.count)
        results = [
            (np.where(added, value, np.float32(0)) + products[:, j]).astype(np.float32)
            for j, value in enumerate(before)
        ]
        for target in targets:
            target(threads, np.full(threads.count, np.nan, np.float32), mask)
        threads.products.append(Product(targets, names, results, active, threads.product_group.copy()))

    return step


def _take_over(
    threads: Threads, names: list[str], values: list[Array], active: Array, instruction: Instruction
) -> list[Array]:
    """The accumulators, of which those under way in the same registers come from the product before."""
    left = []
    for product in threads.products:
        if product.names == names:
            values = [np.where(product.threads, r, v) for r, v in zip(product.results, values, strict=True)]
            if (product.threads & ~active).any():
                left.append(product._replace(threads=product.threads & ~active))
        elif set(product.names) & set(names):
            raise Fault(f"accumulators of a product under way overlap: {instruction.text}")
        else:
            left.append(product)
    threads.products = left
    return values


def _operand(
    threads: Threads, descriptor: Value, groups: Array, rows: int, transposed: bool, type_: str,
    instruction: Instruction,
) -> Array:  # fmt: skip
    """(warpgroups, rows, 16) float64: the rows of a, or the columns of b, by its descriptor.

    Bits 0-13 the start, 16-29 the leading and 32-45 the stride offset, each in 16 bytes; 62-63 the swizzle. Lines of 8
    rows are `stride` bytes apart; where rows are contiguous instead (transposed) those of as many as the swizzle holds.
    """
    numbers = threads.by_warp(descriptor(threads), 128)[groups]
    number = numbers[:, :1]
    mode = np.unique(number >> np.uint64(62))
    if (numbers != number).any() or len(mode) != 1 or (number >> np.uint64(49) & np.uint64(7)).any():
        raise Fault(f"a descriptor that is not emulated: {instruction.text}")
    start, lead, stride = (
        (number >> np.uint64(first) & np.uint64(0x3FFF)).astype(np.int64)[:, :, None] * 16 for first in (0, 16, 32)
    )
    width = WIDTH[int(mode[0])]
    x, k = np.arange(rows)[:, None], np.arange(DEPTH)
    if transposed:
        line = width // 2  # numbers
        across, down = (stride, lead) if width == 16 else (lead, stride)
        at = start + x // line * across + x % line * 2 + k // 8 * down + k % 8 * width
    elif width == 16:
        at = start + x // 8 * stride + x % 8 * 16 + k // 8 * lead + k % 8 * 2
    else:
        at = start + x // 8 * stride + x % 8 * width + k * 2
    at = at ^ (at >> 7 & width // 16 - 1) << 4
    reader = np.repeat(groups * 128, rows * DEPTH)
    place = threads.shared.place(at.reshape(-1), reader, 2, instruction)
    threads.shared.note(place, reader, 2, False, instruction)  # as if by the group's first warp
    return halves(threads.shared.bytes.view(np.uint16)[place // 2], type_).reshape(-1, rows, DEPTH)
