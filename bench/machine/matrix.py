"""Products of matrices by a warp (ldmatrix, stmatrix, mma) and by four (wgmma). Sums are in float64, rounded once.

Fragments are those of the PTX manual: of a 16 x 8 result thread 4 g + t holds columns 2 t and 2 t + 1 of rows g and
g + 8.
"""

from __future__ import annotations

import re

import numpy as np

from bench.machine.numbers import Array, halves
from bench.machine.operation import Operation, Value, instruction
from bench.machine.threads import Mask, Step, Threads

GROUP, PLACE = np.arange(32) // 4, np.arange(32) % 4  # g and t


@instruction("ldmatrix")
def load_matrices(operation: Operation) -> Step:
    """Matrices of 8 x 8 16-bit numbers, whose rows lie at the addresses of threads 0-7, 8-15, ..."""
    targets, address, transposed = operation.targets(0), operation.address(1), "trans" in operation.parts
    count = _matrices(operation, len(targets))

    def step(threads: Threads, mask: Mask) -> None:
        warps = threads.warps(mask, operation.instruction)
        rows = threads.by_warp(threads.all)[warps, : 8 * count].reshape(-1)
        found = threads.shared.load(address(threads)[rows], rows, 16, 2, operation.instruction)
        found = found.reshape(-1, count, 8, 8)
        pairs = np.ascontiguousarray(found.swapaxes(2, 3) if transposed else found).view(np.uint32)
        for n, target in enumerate(targets):
            value = np.zeros((threads.count // 32, 32), np.uint32)
            value[warps] = pairs[:, n].reshape(-1, 32)
            target(threads, value.reshape(-1), mask)

    return step


@instruction("stmatrix")
def store_matrices(operation: Operation) -> Step:
    values, address, transposed = operation.sources(1, "b32"), operation.address(0), "trans" in operation.parts
    count = _matrices(operation, len(values))

    def step(threads: Threads, mask: Mask) -> None:
        warps = threads.warps(mask, operation.instruction)
        rows = threads.by_warp(threads.all)[warps, : 8 * count].reshape(-1)
        pairs = np.stack([threads.by_warp(value(threads))[warps] for value in values], 1)
        matrices = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, count, 8, 8)
        stored = (matrices.swapaxes(2, 3) if transposed else matrices).reshape(-1, 8)
        threads.shared.store(address(threads)[rows], rows, stored, operation.instruction)

    return step


def _matrices(operation: Operation, registers: int) -> int:
    operation.expect(operation.type == "b16" and f"x{registers}" in operation.parts)
    return registers


def shape(operation: Operation) -> tuple[int, int, int]:
    found = next(re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part) for part in operation.parts if re.match(r"m\d+n", part))
    assert found, operation.instruction.text
    return int(found[1]), int(found[2]), int(found[3])


def _entries(value: Value, type_: str, threads: Threads) -> Array:
    """(warps, 32, 1 or 2) float64: what each thread's register holds of a fragment."""
    number = threads.by_warp(value(threads))
    wide = halves(number.reshape(-1), f"{type_}x2") if type_ in ("f16", "bf16") else number.astype(np.float64)
    return wide.reshape(-1, 32, 2 if type_ in ("f16", "bf16") else 1)


def rows_of_registers(values: list[Value], type_: str, threads: Threads, m: int, k: int) -> Array:
    """(warps, m, k) float64: the left operand that a warp's threads hold in their registers."""
    pack = 2 if type_ in ("f16", "bf16") else 1
    a = np.empty((threads.count // 32, m, k))
    for j, value in enumerate(values):
        row, column = GROUP + 8 * (j % (m // 8)), pack * PLACE + 4 * pack * (j // (m // 8))
        entries = _entries(value, type_, threads)
        for e in range(pack):
            a[:, row, column + e] = entries[:, :, e]
    return a


@instruction("mma")
def multiply(operation: Operation) -> Step:
    """d = a b + c by one warp: 16 x 8, or 8 x 8 of float64."""
    (m, n, k), (sum_type, type_, other, _) = shape(operation), operation.parts[-4:]
    register = "f64" if type_ == "f64" else "b32"
    operation.expect(
        type_ in ("f16", "bf16", "f64") and type_ == other and sum_type in ("f32", "f64") and n == 8 and m in (8, 16)
    )
    targets = operation.targets(0)
    left, right = operation.sources(1, register), operation.sources(2, register)
    sums = operation.sources(3, sum_type)
    pack = 2 if type_ in ("f16", "bf16") else 1
    result = np.float64 if sum_type == "f64" else np.float32
    operation.expect(len(left) == m * k // 32 // pack and len(right) == k * n // 32 // pack)

    def step(threads: Threads, mask: Mask) -> None:
        threads.warps(mask, operation.instruction)
        warps = threads.count // 32
        a = rows_of_registers(left, type_, threads, m, k)
        b, c = np.empty((warps, k, n)), np.empty((warps, m, n))
        for j, value in enumerate(right):
            entries = _entries(value, type_, threads)
            for e in range(pack):
                b[:, pack * PLACE + e + 4 * pack * j, GROUP] = entries[:, :, e]
        for j, value in enumerate(sums):
            c[:, GROUP + 8 * (j // 2), 2 * PLACE + j % 2] = threads.by_warp(value(threads))
        d = (c + a @ b).astype(result)
        for j, target in enumerate(targets):
            target(threads, d[:, GROUP + 8 * (j // 2), 2 * PLACE + j % 2].reshape(-1), mask)

    return step
