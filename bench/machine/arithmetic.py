"""Arithmetic, bits, comparisons, moves and conversions.

Exact where a GPU approximates: ex2, rcp, div, sqrt and rsqrt are numpy's. Half precision is computed in float64 and
rounded once; so is the float32 fma, whose second rounding can only matter at a tie, once in 2**29.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.machine.numbers import FLOATS, HALVES, SIGNED, UNSIGNED, Array, bits, dtype, flush, from_halves, halves
from bench.machine.operation import Operation, instruction
from bench.machine.threads import Mask, Step, Threads

Function = Callable[..., Array]


def elementwise(operation: Operation, function: Function, wide: Function | None = None) -> Step:
    """target = function(sources). 16-bit floats are computed by `wide` in float64; pairs of 16-bit integers apart."""
    type_ = operation.type
    if type_ in HALVES:

        def rounded(*values: Array) -> Array:
            return from_halves((wide or function)(*(halves(value, type_) for value in values)), type_)

        return operation.apply(rounded)
    if type_ in ("s16x2", "u16x2"):
        half = SIGNED[16] if type_[0] == "s" else UNSIGNED[16]

        def paired(*values: Array) -> Array:
            parts = (np.ascontiguousarray(value).view(half).reshape(-1, 2) for value in values)
            return np.ascontiguousarray(function(*parts)).view(np.uint32)[:, 0]

        return operation.apply(paired)
    if type_ == "f32" and "ftz" in operation.parts:
        return operation.apply(lambda *values: flush(function(*map(flush, values))))
    return operation.apply(function)


def _minimum(operation: Operation) -> Step:
    names = operation.head + (".NaN" if "NaN" in operation.parts else "")
    functions = {"min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum}
    return elementwise(operation, functions[names])


def _fma32(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _fma64(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


@instruction("fma")
def fma(operation: Operation) -> Step:
    exact = _fma64 if operation.type == "f64" else _fma32
    return elementwise(operation, exact, lambda a, b, c: a * b + c)


def _divide(a: Array, b: Array) -> Array:
    """Truncated towards zero; what a GPU leaves open for b = 0 is a / 1."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return a // b
    floor = a // b
    return floor + ((floor * b != a) & ((a < 0) != (b < 0)))


ELEMENTWISE: dict[str, Function] = {
    "add": operator.add, "sub": operator.sub, "neg": operator.neg, "abs": np.abs, "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "not": operator.invert, "ex2": np.exp2, "rcp": np.reciprocal, "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
}  # fmt: skip
for _name, _function in ELEMENTWISE.items():
    instruction(_name)(lambda operation, function=_function: elementwise(operation, function))  # type: ignore[misc]
instruction("min", "max")(_minimum)


def product(operation: Operation) -> Function:
    """Of integers: the low half of the bits, the high one, or all."""
    type_ = operation.type
    if "wide" in operation.parts:
        wide = dtype(f"{type_[0]}{2 * bits(type_)}")
        return lambda a, b: a.astype(wide) * b.astype(wide)
    if "hi" not in operation.parts:
        return operator.mul
    if bits(type_) == 64:
        return _high64
    wide = dtype(f"{type_[0]}64")
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(bits(type_))).astype(dtype(type_))


def _high64(a: Array, b: Array) -> Array:
    """The upper 64 of the 128 bits of a product, from those of 32-bit halves."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    middle = (ua >> half) * (ub & low) + ((ua & low) * (ub & low) >> half)
    other = (ua & low) * (ub >> half) + (middle & low)
    high = (ua >> half) * (ub >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(a.dtype)


@instruction("mul")
def mul(operation: Operation) -> Step:
    if operation.type in (*FLOATS, *HALVES):
        return elementwise(operation, operator.mul)
    function = product(operation)
    first, second = operation.source(1), operation.source(2)
    result = f"{operation.type[0]}{bits(operation.type) * (2 if 'wide' in operation.parts else 1)}"
    target = operation.target(0, result)
    return lambda threads, mask: target(threads, function(first(threads), second(threads)), mask)


@instruction("mad")
def mad(operation: Operation) -> Step:
    if operation.type in FLOATS:
        return fma(operation)
    function = product(operation)
    first, second = operation.source(1), operation.source(2)
    result = f"{operation.type[0]}{bits(operation.type) * (2 if 'wide' in operation.parts else 1)}"
    third, target = operation.source(3, result), operation.target(0, result)
    return lambda threads, mask: target(threads, function(first(threads), second(threads)) + third(threads), mask)


@instruction("shl", "shr")
def shift(operation: Operation) -> Step:
    """A shift by the width or more leaves zeros, or the sign."""
    number, by, target = operation.source(1), operation.source(2, "u32"), operation.target()
    width, type_ = bits(operation.type), dtype(operation.type)
    move = operator.lshift if operation.head == "shl" else operator.rshift

    def step(threads: Threads, mask: Mask) -> None:
        count = by(threads)
        moved = move(number(threads), np.minimum(count, width - 1).astype(type_))
        keep = operation.head == "shr" and operation.type[0] == "s"
        target(threads, moved if keep else np.where(count >= width, type_(0), moved), mask)

    return step


@instruction("shf")
def funnel(operation: Operation) -> Step:
    def shifted(low: Array, high: Array, count: Array) -> Array:
        both = high.astype(np.uint64) << np.uint64(32) | low
        count = count & np.uint32(31) if "wrap" in operation.parts else np.minimum(count, np.uint32(32))
        moved = both << count if operation.parts[1] == "l" else both >> count
        return (moved >> np.uint64(32) if operation.parts[1] == "l" else moved).astype(np.uint32)

    return operation.apply(shifted)


@instruction("prmt")
def permute(operation: Operation) -> Step:
    operation.expect(operation.instruction.name == "prmt.b32")

    def picked(low: Array, high: Array, selectors: Array) -> Array:
        both, found = high.astype(np.uint64) << np.uint64(32) | low, np.zeros(1, np.uint64)
        for n in range(4):
            selector = selectors >> np.uint32(4 * n)
            byte = both >> ((selector & np.uint32(7)) * np.uint32(8)) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            found = found | np.where(selector & np.uint32(8), sign, byte) << np.uint64(8 * n)
        return found.astype(np.uint32)

    return operation.apply(picked)


@instruction("bfe")
def extract(operation: Operation) -> Step:
    length, first = int(operation.arguments.pop()), int(operation.arguments.pop())
    width, type_ = bits(operation.type), dtype(operation.type)
    operation.expect(0 < length <= width - first)
    return operation.apply(lambda a: (a << type_(width - first - length)) >> type_(width - length))


@instruction("bfi")
def insert(operation: Operation) -> Step:
    length, first = int(operation.arguments.pop()), int(operation.arguments.pop())
    width, type_ = bits(operation.type), dtype(operation.type)
    operation.expect(0 < length <= width - first)
    field = type_(((1 << length) - 1) << first)
    return operation.apply(lambda a, b: a << type_(first) & field | b & ~field)


COMPARE: dict[str, Any] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


def _comparison(name: str) -> Function:
    """Of floats: ordered (lt), or true for NaN too (ltu)."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name[-1] == "u":
        ordered = COMPARE[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    compare = COMPARE[name]
    return lambda a, b: compare(a, b) & ~(np.isnan(a) | np.isnan(b))


@instruction("setp")
def compare(operation: Operation) -> Step:
    """p, or p|q: the comparison and its opposite; of pairs, that of the lower and of the upper halves."""
    type_ = operation.type
    first, second = operation.source(1), operation.source(2)
    name, combined = operation.parts[1], operation.parts[2] in ("and", "or", "xor")
    function = _comparison(name) if type_ in (*FLOATS, *HALVES) else COMPARE[name]
    results = operation.arguments[0].split("|")
    targets = [operation.target(result, "pred") for result in results]
    third = operation.source(3, "pred") if combined else None
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.get(operation.parts[2])
    operation.expect(not (combined and len(targets) > 1))

    def step(threads: Threads, mask: Mask) -> None:
        values = [value(threads) for value in (first, second)]
        if type_ in HALVES:
            values = [halves(value, type_) for value in values]
        found = function(*values)
        if third is not None and combine is not None:
            found = combine(found, third(threads))
        both = (found[:, 0], found[:, 1]) if type_.endswith("x2") else (found, ~found)
        for target, value in zip(targets, both, strict=False):
            target(threads, value, mask)

    return step


@instruction("selp")
def select(operation: Operation) -> Step:
    first, second, target = operation.source(1), operation.source(2), operation.target()
    chosen = operation.source(3, "pred")
    return lambda threads, mask: target(threads, np.where(chosen(threads), first(threads), second(threads)), mask)


@instruction("mov", "cvta")
def move(operation: Operation) -> Step:
    """A copy; or a register's parts to several registers, or the reverse."""
    result, source = operation.arguments
    if not (result + source).count("{"):
        return operation.apply(lambda value: value)
    parts = operation.vector(0 if result.startswith("{") else 1)
    part = bits(operation.type) // len(parts)
    whole = UNSIGNED[bits(operation.type)]
    if result.startswith("{"):
        number, targets = operation.source(1), operation.targets(0)

        def take_apart(threads: Threads, mask: Mask) -> None:
            value = number(threads)
            for n, target in enumerate(targets):
                target(threads, (value >> whole(n * part)).astype(UNSIGNED[part]), mask)

        return take_apart
    values, target = operation.sources(1, f"b{part}"), operation.target(0)

    def put_together(threads: Threads, mask: Mask) -> None:
        found = np.zeros(1, whole)
        for n, value in enumerate(values):
            found = found | value(threads).astype(whole) << whole(n * part)
        target(threads, found, mask)

    return put_together


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction("cvt")
def convert(operation: Operation) -> Step:
    to, of = operation.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        return _convert_pair(operation, to)
    number, target = operation.source(1), operation.target(0, to)
    function = _conversion(operation, to, of)

    def step(threads: Threads, mask: Mask) -> None:
        value = number(threads)
        target(threads, function(halves(value, of) if of in HALVES else value), mask)

    return step


def _conversion(operation: Operation, to: str, of: str) -> Function:
    type_ = dtype(to)
    rounding: Function | None = next((ROUND[part] for part in operation.parts if part in ROUND), None)
    if of not in FLOATS and to not in FLOATS:
        if "sat" in operation.parts:
            raise operation.unknown()
        return lambda value: value.astype(type_)
    if to not in FLOATS:
        nearest, limits = rounding or np.trunc, np.iinfo(type_)
        return lambda value: np.clip(nearest(value.astype(np.float64)), limits.min, limits.max).astype(type_)
    if rounding is not None:
        operation.expect(to == of)
        return rounding
    operation.expect(not {"rz", "rm", "rp"} & set(operation.parts))
    if to in HALVES:
        return lambda value: from_halves(value if value.dtype.kind == "f" else value.astype(np.float64), to)
    if "ftz" in operation.parts:
        return lambda value: flush(value.astype(type_))
    return lambda value: value.astype(type_)


def _convert_pair(operation: Operation, to: str) -> Step:
    """cvt.rn.bf16x2.f32 d, upper, lower."""
    operation.expect(operation.type == "f32" and "rn" in operation.parts and "relu" not in operation.parts)
    upper, lower, target = operation.source(1), operation.source(2), operation.target()

    def step(threads: Threads, mask: Mask) -> None:
        values = np.stack(np.broadcast_arrays(lower(threads), upper(threads)), 1)
        target(threads, from_halves(values, to), mask)

    return step
