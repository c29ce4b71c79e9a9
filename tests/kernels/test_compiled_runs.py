"""Compiled kernels, executed on the CPU by bench/machine: the checks of each op against float64.

What the interpreter leaves out is checked here: bfloat16, what the compiler makes of the kernels for a GPU of compute
capability 8.0 and 9.0, barriers, asynchronous copies and products, layouts in shared memory, races between warps.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import pytest

from tests.kernels import test_channel_layer_norm as norm
from tests.kernels import test_residual_branch as branch
from tests.kernels import test_residual_depthwise as depthwise
from tests.support import compiled_runs
from tests.support.block_cases import Pixels
from tests.support.cases import BRAIN, DOUBLE, HALF, LAST, SINGLE, SLICED, SLICED_LAST, Case

CAPABILITIES = (80, 90)
BOTH = (False, True)  # detached, full

# The stages of stvit_small; rows walked by one program or by several; padding, slices and tiles that nothing divides.
STOKENS = [
    *(Case(1, 64, 16, 24, (8, 8), BRAIN, full, 1, LAST, LAST, run=3) for full in BOTH),
    *(Case(1, 128, 8, 12, (4, 4), HALF, full, 1, LAST, LAST, run=2) for full in BOTH),
    *(Case(2, 40, 10, 9, (5, 3), BRAIN, full, 2, SLICED_LAST, SLICED, run=2) for full in BOTH),
    *(Case(1, 64, 10, 13, (4, 4), HALF, full) for full in BOTH),
    Case(1, 300, 3, 7, (2, 3), BRAIN, True, layout=LAST, grad_layout=LAST),  # wider than a block of channels
    Case(1, 20, 5, 7, (2, 3), SINGLE, True, layout=LAST, grad_layout=LAST),
    Case(1, 20, 5, 7, (2, 3), DOUBLE, True),
]
DEPTHWISE = [
    depthwise.Case(Pixels(1, 64, 9, 6, BRAIN, LAST, LAST, SINGLE), gelu=True),
    depthwise.Case(Pixels(1, 64, 9, 6, BRAIN, LAST, LAST), bias=False),
    depthwise.Case(Pixels(2, 40, 5, 7, HALF, SLICED, SLICED_LAST), gelu=True),
    depthwise.Case(Pixels(1, 256, 7, 3, HALF, LAST, LAST, SINGLE), gelu=True),
    depthwise.Case(Pixels(1, 20, 5, 7, SINGLE, LAST, LAST), gelu=True, span=3),
    depthwise.Case(Pixels(1, 20, 5, 3, DOUBLE)),
]
NORM = [
    norm.Case(Pixels(1, 64, 7, 6, BRAIN, LAST, LAST, SINGLE), skip=True),
    norm.Case(Pixels(1, 64, 7, 6, BRAIN, LAST, LAST)),
    norm.Case(Pixels(2, 40, 5, 7, HALF, SLICED, SLICED_LAST), skip=True),
    norm.Case(Pixels(1, 320, 5, 9, HALF, LAST, LAST, SINGLE), elements=1024, programs=2),
    norm.Case(Pixels(1, 20, 5, 7, SINGLE, LAST, LAST), skip=True),
    norm.Case(Pixels(1, 20, 3, 3, DOUBLE)),
]
BRANCH = [
    branch.Case(Pixels(3, 64, 5, 6, BRAIN, LAST, LAST)),
    branch.Case(Pixels(3, 64, 5, 6, BRAIN, LAST, LAST, SINGLE), gamma=False, stream=SINGLE),
    branch.Case(Pixels(2, 40, 5, 7, HALF, SLICED, SLICED_LAST)),
    branch.Case(Pixels(1, 320, 5, 9, HALF, LAST, LAST, SINGLE), keep=False, elements=1024, programs=2),
    branch.Case(Pixels(2, 20, 5, 7, SINGLE, LAST, LAST)),
    branch.Case(Pixels(2, 20, 3, 3, DOUBLE), keep=False),
]
LISTED = {
    "tests.kernels.test_sampling": STOKENS,
    "tests.kernels.test_upsampling": [case._replace(n_iter=1) for case in STOKENS],
    "tests.kernels.test_residual_depthwise": DEPTHWISE,
    "tests.kernels.test_channel_layer_norm": NORM,
    "tests.kernels.test_residual_branch": BRANCH,
}


def dtype(case: Any) -> Any:
    return case.dtype if isinstance(case, Case) else case.pixels.dtype


def name(case: Any) -> str:
    first, *others = case
    return case.name if isinstance(case, Case) else "-".join([first.name, *map(str, others)])


def listed() -> list[Any]:
    """Both 16-bit formats on both GPUs; the wide ones, whose compiled code hardly differs, on one."""
    return [
        pytest.param(module, case, capability, id=f"{module.split("test_")[1]}-{capability}-{name(case)}",
                     marks=pytest.mark.xdist_group(f"compiled-{capability}"))
        for capability in CAPABILITIES
        for module, cases in LISTED.items()
        for case in cases
        if capability == 90 or dtype(case) in (BRAIN, HALF)
    ]  # fmt: skip


@pytest.mark.parametrize(("module", "case", "capability"), listed())
def test_listed_cases(module: str, case: Any, capability: int, compiling: Executor) -> None:
    compiling.submit(compiled_runs.run, module, case, capability).result()
