"""Result files: what was measured, on what, from which commit. Everything that README and docs claim comes from them.

A file is bench/results/<gpu>/<benchmark>.json: {"benchmark", "command", "environment", "rows": [...]}. Numbers of a
CPU carry environment["device"] == "cpu" and never enter the GPU tables.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.harness import console
from stvit.backends import extension
from stvit.checkpoint import whole_file

RESULTS = Path(__file__).parents[1] / "results"


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: GPU or CPU, driver, versions, what the CUDA extension was built with (None where
    there is none), commit, whether the working tree was clean."""
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else None,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "threads": None if on_gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "timm")},
        "extension": extension.describe()["built"],
        # A machine that got the files without .git is told the commit.
        "commit": _first_line("git", "rev-parse", "HEAD") or os.environ.get("STVIT_COMMIT"),
        "clean": _first_line("git", "status", "--porcelain", "--untracked-files=no") is None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.strip().splitlines()[0] if output.strip() else None


def folder(device: torch.device) -> Path:
    """bench/results/<gpu>, for example bench/results/nvidia-h100-80gb-hbm3; bench/results/cpu on a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return RESULTS / "-".join(name.lower().split())


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yields where to write: a file beside `path` that takes its place, whole, when the block ends.

    Where the disk is full or the folder can't be written, that ends the program: one line that names `path`, exit code
    1, and what was there is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            yield partial
    except OSError as error:
        console.failure(f"{path}: {(error.strerror or str(error)).lower()}; files that were there are as they were")


def write_json(path: Path, content: Any) -> None:
    """As `written` says."""
    with written(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def write(path: Path, benchmark: str, device: torch.device, rows: list[dict[str, Any]], **extra: Any) -> Path:
    """Writes a result file, as `written` says, and returns its path."""
    write_json(path, {
        "benchmark": benchmark,
        "command": " ".join(["python", "-m", f"bench.{benchmark}", *sys.argv[1:]]),
        "environment": environment(device),
        **extra,
        "rows": rows,
    })  # fmt: skip
    return path
