"""Runs Triton launches on CPU tensors: compiles each kernel for a GPU that isn't there, and executes its PTX.

    with launch.emulated(90, races=True) as launches:
        stvit.super_token_sampling(x, (8, 8), backend="triton")

The host code runs as it is, so that what runs is what a user's call would launch: the same blocks, warps and argument
specialisation. Without TRITON_INTERPRET.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.machine.counters import Counters
from bench.machine.machine import Kernel
from bench.machine.memory import Range
from bench.machine.parse import Fault
from stvit.backends import dispatch

WIDTHS = {"i64": "u64", "u64": "u64", "fp64": "f64", "fp32": "f32"}  # of parameters that aren't 32-bit integers

_kernels: dict[int, tuple[Any, Kernel]] = {}  # by the identity of Triton's, which is kept alive beside it


@dataclass
class Launch:
    """One launch: Triton's compiled kernel (`compiled.asm` holds its PTX and cubin), ours, blocks, what it did."""

    compiled: Any
    kernel: Kernel
    grid: int
    counters: Counters
    seconds: float

    @property
    def name(self) -> str:
        return self.kernel.program.name


class Driver:
    """The parts of Triton's driver that compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # keeps the in-process caches of different GPUs apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def emulated(
    capability: int = 90, *, profile: bool = False, races: bool = False,
    mutate: Callable[[str], str] | None = None, sample: Callable[[int], int] | None = None,
) -> Iterator[list[Launch]]:  # fmt: skip
    """Within, every Triton launch is executed by the emulator and added to the list that is given.

    capability: of the GPU, 80 or 90. profile: count sectors, wavefronts and bytes too. races: raise Fault where warps
    race, at the end of the launch. mutate: PTX to PTX, plants a fault into every kernel. sample: from the blocks of a
    launch to those that are executed, the first so many.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def execute(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = _kernel(compiled, mutate)
        blocks = _blocks(grid)
        names = self.signature.parameters
        bound = self.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in names})
        bound.apply_defaults()
        values, ranges = _arguments(compiled, kernel, bound.arguments)
        start = time.perf_counter()
        executed = blocks if sample is None else sample(blocks)
        counters = kernel.run(blocks, values, ranges, profile=profile, races=races, blocks=executed)
        if counters.races:
            raise Fault(f"{kernel.program.name}: {len(counters.races)} races, {next(iter(counters.races))}")
        launches.append(Launch(compiled, kernel, blocks, counters, time.perf_counter() - start))
        return compiled

    with (
        mock.patch.object(driver, "_active", Driver(capability)),
        mock.patch.object(JITFunction, "run", execute),
        mock.patch.object(dispatch, "_triton_missing", lambda device: []),
    ):
        yield launches


def _kernel(compiled: Any, mutate: Callable[[str], str] | None) -> Kernel:
    text, shared = compiled.asm["ptx"], compiled.metadata.shared
    if mutate is not None and (changed := mutate(text)) != text:
        return Kernel(changed, shared)
    if id(compiled) not in _kernels:
        _kernels[id(compiled)] = compiled, Kernel(text, shared)
    return _kernels[id(compiled)][1]


def _blocks(grid: Any) -> int:
    blocks, *others = grid
    if any(n != 1 for n in others):
        raise Fault(f"expected a grid of one dimension, got {grid}")
    return int(blocks)


def _arguments(compiled: Any, kernel: Kernel, arguments: dict[str, Any]) -> tuple[list[Any], list[Range]]:
    """The values of the kernel's parameters, and the memory of its tensors.

    Triton's own parameters at the end, for scratch memory and profiling, are null: they must not be touched.
    """
    values: list[Any] = []
    ranges = []
    kinds = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
    for (name, kind), (_, type_) in zip(kinds.items(), kernel.program.parameters, strict=False):
        if type_ != ("u64" if kind[0] == "*" else WIDTHS.get(kind, "u32")):
            raise Fault(f"{kernel.program.name}: {name} is {kind} to Triton, {type_} in its PTX")
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            ranges.append(Range(storage.data_ptr(), storage.nbytes(), name))
            value = value.data_ptr()
        values.append(value)
    return values + [0] * (len(kernel.program.parameters) - len(values)), ranges
