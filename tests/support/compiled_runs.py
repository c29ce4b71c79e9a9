"""The kernels' own checks, with the kernels compiled for a GPU and executed by the emulator of bench/machine.

Imported by a process in which Triton compiles (the fixture `compiling`): here it may be the interpreter instead.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from bench.machine import launch
from bench.machine.parse import Fault


def run(op: str, case: Any, capability: int, mutate: Callable[[str], str] | None = None) -> int:
    """The check that tests/kernels has for an op, on one case; races between warps are an error too.
    Returns the number of launches."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN, as in conftest.py
    torch.manual_seed(0)
    tests = importlib.import_module(f"tests.kernels.test_{op}")
    with launch.emulated(capability, races=True, mutate=mutate) as launches:
        if hasattr(tests, "check_case"):
            tests.check_case(case, "cpu")
        else:
            tests.check(case, "triton", "cpu")
    return len(launches)


def plant(op: str, case: Any, capability: int, kernel: str, pattern: str, replacement: str, count: int) -> str:
    """What a check says when the first `count` matches (0: all) are replaced in the PTX of a kernel: "" if nothing."""
    planted = 0

    def mutate(text: str) -> str:
        nonlocal planted
        if f".entry {kernel}(" not in text:
            return text
        text, replaced = re.subn(pattern, replacement, text, count=count, flags=re.MULTILINE)
        planted += replaced
        return text

    try:
        run(op, case, capability, mutate)
    except (AssertionError, Fault) as error:
        found = f"{type(error).__name__}: {error}"
    else:
        found = ""
    assert planted, f"nothing in {kernel} to plant this in: {pattern}"
    return found
