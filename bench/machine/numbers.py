"""PTX's types as numpy's, bfloat16 as 16 bits of an integer, and the roundings between them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")  # held as unsigned integers of 16 bits, one or two in a register
FLOATS = ("f16", "bf16", "f32", "f64")


def bits(type_: str) -> int:
    """Of a register of a PTX type: 16 for s16, 32 for bf16x2, 1 for pred."""
    if type_ == "pred":
        return 1
    return int(re.sub(r"\D", "", type_.removesuffix("x2"))) * (2 if type_.endswith("x2") else 1)


def dtype(type_: str) -> Any:
    """The numpy type that values of a PTX type are held in."""
    if type_ == "pred":
        return np.bool_
    if type_ in ("f32", "f64"):
        return np.float32 if type_ == "f32" else np.float64
    return SIGNED[bits(type_)] if type_[0] == "s" and type_[-2:] != "x2" else UNSIGNED[bits(type_)]


def bfloat16(value: Array) -> Array:
    """float32 or float64 rounded once to the nearest bfloat16, ties to even; NaN as the GPU makes it."""
    single = value.astype(np.float32)
    number = single.view(np.uint32)
    if value.dtype == np.float64:  # to odd in float32 first, so that the second rounding sees what the first dropped
        toward_zero = np.where(np.abs(single.astype(np.float64)) > np.abs(value), number - np.uint32(1), number)
        exact = (single.astype(np.float64) == value) | ~np.isfinite(single)
        number = np.where(exact, number, toward_zero | np.uint32(1))
    odd = (number >> np.uint32(16)) & np.uint32(1)
    rounded = ((number + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def halves(value: Array, type_: str) -> Array:
    """Registers of one or two 16-bit floats as float64, (n,) or (n, 2)."""
    number = np.ascontiguousarray(value).view(np.uint16)
    if type_.startswith("bf16"):
        wide = (number.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        wide = number.view(np.float16)
    return wide.astype(np.float64).reshape(-1, 2) if type_.endswith("x2") else wide.astype(np.float64)


def from_halves(value: Array, type_: str) -> Array:
    """The inverse of `halves`, rounded to nearest even; value may be float32 too."""
    number = bfloat16(value) if type_.startswith("bf16") else value.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(number).view(np.uint32)[:, 0] if type_.endswith("x2") else number


def flush(value: Array) -> Array:
    """float32 with subnormal numbers as zero of their sign: .ftz."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)
