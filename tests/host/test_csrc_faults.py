"""Faults planted in the CUDA kernels: the tests of their results have to find each.

Every one is compiled with the kernels, for the emulated device, which takes minutes: `make test ARGS="-m planted"`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import emulated

ORDERS = "tests/host/test_csrc_emulated.py::test_the_order_of_threads_does_not_matter"
SAMPLING = "tests/kernels/test_sampling.py::test_vectorized_cases"
UPSAMPLING = "tests/kernels/test_upsampling.py::test_vectorized_cases"


class Fault(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    test: str  # that finds it
    dtype: str = ""  # in whose cases alone


FAULTS = [
    Fault(
        "a group is used before it has arrived",
        "walk.cuh",
        "? gpu::wait<1>() : gpu::wait<0>();  // for",
        "? gpu::wait<2>() : gpu::wait<1>();  // for",
        SAMPLING,
    ),
    Fault(
        "no barrier between steps",
        "walk.cuh",
        "gpu::barrier();\n      copy(coming, step + b.walk.ahead);\n      const int index",
        "copy(coming, step + b.walk.ahead);\n      const int index",
        ORDERS,
    ),
    Fault(
        "no barrier between pooling and weighing",
        "walk.cuh",
        "if (TOKENS) gpu::barrier_of(b.weighing());",
        "",
        ORDERS,
    ),
    Fault(
        "no barrier before the last rows",
        "walk.cuh",
        "gpu::barrier();\n    if (sums) return;",
        "if (sums) return;",
        ORDERS,
    ),
    Fault("the last row is not written", "walk.cuh", "row < b.region.walked_end(); ++row", "false; ++row", SAMPLING),
    Fault("a row is written that is added to", "walk.cuh", "own.row - 3);", "own.row - 2);", SAMPLING),
    Fault("masses are freed while they are read", "walk.cuh", "b, own.row - 4", "b, own.row - 3", ORDERS),
    Fault("one scratch for both", "walk_block.cuh", "(step & 1) * walk.scratch_bytes", "0", ORDERS),
    Fault("a stage too few", "plan.cpp", "(task.size == 2 ? 2 : 1)", "1", SAMPLING),
    Fault("pooling a group too late", "plan.cpp", "of_row + (of_row > 1)", "of_row", SAMPLING),
    Fault(
        "no barrier before phase 1",
        "walk.cuh",
        "gpu::barrier();\n      const bool weighs",
        "const bool weighs",
        ORDERS,
        "float32",
    ),
    Fault(
        "no barrier before phase 2",
        "walk.cuh",
        "gpu::barrier();\n      copy(coming, step + b.walk.ahead);\n      if (sums)",
        "copy(coming, step + b.walk.ahead);\n      if (sums)",
        ORDERS,
        "float32",
    ),
    Fault(
        "the last row of float32 is not written",
        "walk.cuh",
        "row < group.row + last;",
        "row < group.row;",
        SAMPLING,
        "float32",
    ),
    Fault("the ring is left by a tile", "walk_sum.cuh", "--left_of_ring == 0", "--left_of_ring == -1", SAMPLING),
    Fault(
        "pieces of the next tile's weights", "walk_copy.cuh", "corner += b.a.weight_tiles", "corner += 0", UPSAMPLING
    ),
    Fault(
        "a slice is not gathered",
        "walk_single.cuh",
        "left = b.walk.split - 1;",
        "left = b.walk.split - 2;",
        SAMPLING,
        "float32",
    ),
    Fault(
        "a quarter of the channels is left out",
        "walk_single.cuh",
        "own[k] += gpu::shuffle_xor(own[k], 16);",
        "own[k] += own[k];",
        SAMPLING,
        "float32",
    ),
    Fault(
        "partial sums of the step before",
        "walk.cuh",
        "summer.gather(group);",
        "if (group.column > b.region.column0) summer.gather(group);",
        SAMPLING,
        "float32",
    ),
    Fault(
        "a neighbour across the grid's edge",
        "spread_single.cuh",
        "unsigned(column + k % 3 - 1) < unsigned(shape.gw)",
        "true",
        UPSAMPLING,
        "float32",
    ),
    Fault(
        "rows of a tile taken twice",
        "spread_single.cuh",
        "* a.lines;\n    lines",
        "* (a.lines - 1);\n    lines",
        UPSAMPLING,
        "float32",
    ),
    Fault("the mean is left out", "maps.cuh", "weights[k] * (slopes[k] - mean)", "weights[k] * slopes[k]", SAMPLING),
]


def test_the_faults_fit_the_sources() -> None:
    """Each can be planted, in one place, whatever has been rewritten since."""
    texts = {fault.name: (emulated.ROOT / "csrc" / fault.file).read_text() for fault in FAULTS}
    assert {fault.name: texts[fault.name].count(fault.right) for fault in FAULTS} == {fault.name: 1 for fault in FAULTS}


@pytest.mark.planted
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found(
    fault: Fault, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(emulated.ROOT / "csrc", sources)
    text = (sources / fault.file).read_text()
    (sources / fault.file).write_text(text.replace(fault.right, fault.wrong))
    chosen = ["-k", f"cuda and {fault.dtype}" if fault.dtype else "cuda"]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    environment = {"STVIT_EMULATION_SOURCES": str(sources), "OMP_NUM_THREADS": "1"}
    child = run_python("-m", "pytest", fault.test, *options, env=environment, check=False)
    assert child.returncode == 1 and "1 failed" in child.stdout, f"{child.stdout[-3000:]}\n{child.stderr[-3000:]}"
