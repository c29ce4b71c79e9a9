"""The stage `sanitizer`: every kernel on small shapes (tests/kernels/test_sanitized.py) under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

from bench.gpu_check.counts import pytest_counts, sanitizer_counts
from bench.gpu_check.stage import Stage
from stvit.backends import dispatch

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Uncaptured, so that the sanitizer's own lines are seen.
CASES = [*PYTEST, "-s", "tests/kernels/test_sanitized.py"]
SMALLEST = ["-k", "triton and tiny"]
CHECKS = ("memcheck", "racecheck", "initcheck")
# API errors off: torch probes for things that a driver may not have, and handles the answer.
OPTIONS = ["--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "50"]
# With PyTorch's caching allocator a write past a tensor lands in memory that is still valid.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
WHOLE = r"\d+ passed"
NOT_FOUND = "compute-sanitizer is not on the PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin"


def side_by_side() -> list[str]:
    """pytest's flags for as many processes as there are cores, at most 16, so that they fit beside each other."""
    if not importlib.util.find_spec("xdist"):
        return []
    return ["-n", str(min(16, len(os.sched_getaffinity(0)))), "--dist", "loadgroup"]


def sanitizer(stage: Stage) -> None:
    """The cases without a sanitizer, which compiles and checks them; then under each tool of compute-sanitizer."""
    if not stage.on_gpu:
        stage.step("cases", [*CASES, *SMALLEST], pytest_counts)
        for check in CHECKS:
            stage.skip(check, "no GPU")
        return
    if stage.step("cases", [*CASES, *side_by_side()], pytest_counts, UNCACHED)["status"] != "passed":
        return
    program = find()
    if program is None:
        stage.note("compute-sanitizer", "failed", code=127, note=NOT_FOUND)
        return
    for backend in ("cuda", "triton"):
        if reasons := dispatch.prepare(backend, stage.device):
            stage.skip(f"planted-{backend}", "; ".join(reasons))
            continue
        command = [program, "--tool", "memcheck", *OPTIONS, sys.executable, "-m", "tests.support.plant", backend]
        planted = stage.step(f"planted-{backend}", command, sanitizer_counts, UNCACHED)
        found = planted.get("errors", 0) > 0
        note = "a planted fault is found" if found else "a planted fault is NOT found"
        planted.update(status="passed" if found else "failed", note=note)
    for place, check in enumerate(CHECKS):  # a slow tool must not take the next one's time
        watch(stage, program, check, stage.left / (len(CHECKS) - place))


def watch(stage: Stage, program: str, check: str, seconds: float, *chosen: str) -> None:
    """The cases under one tool."""
    command = [program, "--tool", check, *OPTIONS, *CASES, *chosen]
    stage.step(check, command, lambda output: sanitizer_counts(output, WHOLE), UNCACHED, seconds)


def find() -> str | None:
    """The path of compute-sanitizer, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH"), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(filter(None, folders)))
