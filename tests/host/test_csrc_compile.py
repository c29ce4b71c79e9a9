"""The CUDA kernels, compiled for GPUs that need not be there: registers, spills, shared memory, instructions.

Run as a program, ``python tests/host/test_csrc_compile.py`` prints what each kernel takes, as JSON lines.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

from stvit.backends import build, extension
from tests.support import extensions

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # cuobjdump, and nvdisasm that it calls
FAST = re.compile("walk|spread")
SINGLE = re.compile("walk_kernelIf|spread_single")  # of float, as the symbol says
ATOMIC = re.compile(r"U?(ATOM|RED)[SGR]?")  # ATOM, ATOMS, ATOMG, RED, REDG; not REDUX, a sum over the lanes of a warp


class Usage(NamedTuple):
    """What one compiled kernel takes: registers a thread, bytes of stack, of static shared and of local memory."""

    architecture: str
    kernel: str
    registers: int
    stack: int
    shared: int
    local: int


def cuobjdump(binary: Path, *arguments: str) -> Iterator[str]:
    """The lines that it prints."""
    path = f"{TOOLS}{os.pathsep}{os.environ['PATH']}"
    command = [TOOLS / "cuobjdump", *arguments, binary]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PATH": path}
    ) as child:
        assert child.stdout is not None
        yield from child.stdout
    assert child.returncode == 0, command


def usages(binary: Path) -> Iterator[Usage]:
    architecture = kernel = ""
    for line in cuobjdump(binary, "-res-usage"):
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r" Function (.+):$", line):
            kernel = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            yield Usage(architecture, kernel, *map(int, found.groups()))


def instructions(binary: Path, architecture: str) -> dict[str, Counter[str]]:
    """How often each kernel holds each instruction."""
    counts: dict[str, Counter[str]] = {}
    kernel = ""
    for line in cuobjdump(binary, "-sass", "-arch", architecture):
        if found := re.match(r"\s*Function : (\S+)", line):
            kernel = found[1]
            counts[kernel] = Counter()
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line):
            counts[kernel][found[1]] += 1
    return counts


def atomics(counts: dict[str, Counter[str]]) -> list[tuple[str, str]]:
    return [(kernel, name) for kernel, found in counts.items() for name in found if ATOMIC.fullmatch(name)]


@pytest.fixture(scope="module")
def binary() -> Path:
    return extensions.real().path


@pytest.fixture(scope="module")
def taken(binary: Path) -> list[Usage]:
    return list(usages(binary))


def test_every_kernel_is_compiled_for_every_architecture(taken: list[Usage]) -> None:
    found = {usage.architecture for usage in taken}
    assert found == {"sm_" + name.replace(".", "") for name in extensions.ARCHITECTURES}
    sources = "".join(path.read_text() for path in build.files(extensions.ROOT / "csrc"))
    written = re.findall(r"__global__ void (?:__launch_bounds__\(.*\)\s+)?(\w+)\(", sources)
    assert written and sources.count("__global__") == len(written)
    for architecture in found:
        names = "".join(usage.kernel for usage in taken if usage.architecture == architecture)
        assert not [name for name in written if name not in names]


def test_the_fast_kernels_keep_to_registers(taken: list[Usage]) -> None:
    fast = [usage for usage in taken if FAST.search(usage.kernel)]
    assert {found for usage in fast for found in FAST.findall(usage.kernel)} == {"walk", "spread"}
    assert not [usage for usage in fast if usage.stack or usage.local]


def test_the_documented_registers_are_those_taken(taken: list[Usage]) -> None:
    text = (extensions.ROOT / "docs" / "kernels.md").read_text()
    walk = re.search(r"`walk_kernel`, 16-bit \| 512 \| at most (\d+) ", text)
    spread = re.search(r"`spread_kernel` \| 128 \| at most (\d+) ", text)
    single = re.search(r"`walk_kernel`, float32 \| 256 \| at most (\d+) ", text)
    spread_single = re.search(r"`spread_single_kernel` \| 128 \| at most (\d+) ", text)
    walks = [usage for usage in taken if "walk" in usage.kernel]
    spreads = [usage for usage in taken if "spread" in usage.kernel]
    assert walk and max(usage.registers for usage in walks if not SINGLE.search(usage.kernel)) == int(walk[1])
    assert single and max(usage.registers for usage in walks if SINGLE.search(usage.kernel)) == int(single[1])
    assert spread and max(usage.registers for usage in spreads if not SINGLE.search(usage.kernel)) == int(spread[1])
    assert spread_single and max(usage.registers for usage in spreads) == int(spread_single[1])


def test_static_shared_memory_leaves_the_rest_to_the_plan(taken: list[Usage]) -> None:
    # csrc/plan.cpp and csrc/spread.cuh count dynamic shared memory only; 1 KiB of each block is the system's own.
    assert not [usage for usage in taken if usage.shared > 1024]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_no_kernel_holds_an_atomic_instruction(architecture: str, binary: Path, taken: list[Usage]) -> None:
    counts = instructions(binary, architecture)
    assert len(counts) == sum(usage.architecture == architecture for usage in taken)
    assert atomics(counts) == []
    for kernel, found in counts.items():
        if SINGLE.search(kernel):
            assert found["FFMA"] and not found["HMMA"], f"{kernel} rounds to TF32"
        elif FAST.search(kernel):
            assert found["HMMA"], f"no matrix instruction in {kernel}"


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = build.toolkit()
    if tools is None:
        pytest.skip("needs nvcc")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    target = extension.target(extensions.write_stand_in(tmp_path / "csrc"), tools, ["9.0"])
    extension.compile_target(target)
    (spilling,) = [usage for usage in usages(target.path) if "walk" in usage.kernel]
    assert spilling.stack == 256
    ((kernel, _),) = atomics(instructions(target.path, "sm_90"))
    assert "atomic_kernel" in kernel


if __name__ == "__main__":
    for usage in usages(extensions.real().path):
        print(json.dumps(usage._asdict()))
