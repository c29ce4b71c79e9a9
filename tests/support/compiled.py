"""Compiles the kernels that a call would launch, for GPUs that aren't there, and reads what the compiler made of them.

The host code runs as it is, on CPU tensors, so that what is compiled is what a user's call would launch: the same
block sizes, warps and argument specialisation. Only the launch itself is left out. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Bytes of stack that a kernel may take: none. The compiler that comes with Triton 3.8 keeps up to four numbers of some
# kernels there, though it gives them 48 to 128 registers of 255: held to that, so that more would show.
MOST_STACK = 16 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 0
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Usage(NamedTuple):
    """What one compiled kernel takes: registers a thread, bytes of stack (spills) and of shared memory, warps; and how
    many atomic instructions it holds."""

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int
    atomics: int


class _Driver:
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
def _compile_only(capability: int) -> Iterator[list[Any]]:
    kernels: list[Any] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    with (
        mock.patch.object(driver, "_active", _Driver(capability)),
        mock.patch.object(JITFunction, "run", compile_instead),
    ):
        yield kernels


@cache
def usage(kernel: Any) -> Usage:
    """Reads registers, stack and shared memory from the compiled kernel's cubin, atomics from its PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    atomics = re.findall(r"^\s*(?:@\S+\s+)?(?:atom|red)\b", kernel.asm["ptx"], re.MULTILINE)
    return Usage(
        kernel.metadata.name, int(found[1]), int(found[2]), kernel.metadata.shared, kernel.metadata.num_warps,
        len(atomics),
    )  # fmt: skip


def compile_call(call: Callable[[], Any], capability: int) -> list[Usage]:
    """Usage of every distinct kernel that `call` launches, compiled for a GPU of compute capability 80, 90, 100."""
    with _compile_only(capability) as kernels:
        call()
    return [usage(kernel) for kernel in {id(kernel): kernel for kernel in kernels}.values()]


def compiled_kernels(call: Callable[[], Any], capability: int) -> set[tuple[str, str]]:
    """Name and hash of every distinct kernel that `call` launches."""
    with _compile_only(capability) as kernels:
        call()
    return {(kernel.metadata.name, kernel.hash) for kernel in kernels}
