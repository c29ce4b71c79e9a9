"""Every kernel on small shapes, roughly held to the reference: what `make gpu-check STAGE=sanitizer` runs under
compute-sanitizer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from stvit.backends import registry
from tests.support import emulated
from tests.support.small_cases import FAMILIES, Case, Family, run

TINY = "tiny"  # cases that reach every kernel; in Triton's interpreter the others take too long
CASES = [
    pytest.param(backend, family, case, id=f"{backend}-{name}-{case}")
    for name, family in FAMILIES.items()
    for backend in family.backends
    for case in family.cases
    if torch.cuda.is_available() or backend == "cuda" or case.name == TINY
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is left as it is: initcheck has to see what was never written."""
    yield


def on_gpu_of_its_size(case: Case, device: str) -> tuple[Case, AbstractContextManager[None]]:
    """Emulated, batches that fill a GPU are smaller, and so is the GPU."""
    if device != "cpu":
        return case, nullcontext()
    few = case._replace(shape=(case.shape[0] // 48 or case.shape[0], *case.shape[1:]))
    return few, emulated.device().limits(multiprocessors=132 if few == case else 3)


@pytest.mark.parametrize(("backend", "family", "case"), CASES, indirect=["backend"])
def test_cases(backend: str, family: Family, case: Case, device: str) -> None:
    case, limits = on_gpu_of_its_size(case, device)
    with limits:
        run(family, case, device, backend)


def test_the_smallest_reach_every_op(backend: str, device: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        for family in FAMILIES.values():
            for case in family.cases:
                if case.name == TINY and backend in family.backends:
                    run(family, case, device, backend)
    reached = {event.key for event in profile.key_averages() if event.key.startswith("stvit::")}
    every = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("stvit::")}
    if backend == "cuda":
        every = {f"stvit::{name}" for name in registry.SUPER_TOKEN_OPS}
    assert len(every) >= 6 and reached == every
