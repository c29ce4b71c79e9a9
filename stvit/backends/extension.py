"""Finds the CUDA extension stvit._C, builds it on request, and loads it; its ops are then in torch.ops.stvit_cuda.

It was installed with the package, or built on an earlier request and kept in a cache, or is built when
``backend="cuda"`` is first asked for, where a CUDA toolkit is installed. Nothing else builds it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import build


class ExtensionError(RuntimeError):
    """There is no extension and none can be built; the message says what was tried, and what to do."""


class Target(NamedTuple):
    """A build: the file that it makes, which says what it was made from, and what it is for."""

    path: Path
    folder: Path  # of the sources
    tools: build.Toolkit
    architectures: Sequence[str]


@dataclass
class _State:
    """What this process knows. origin: where `module` is from. architectures: what it was compiled for, as far as it
    tells. reasons: why there is none. target: what `load` would build."""

    looked: bool = False
    module: ModuleType | None = None
    device: str | None = None
    origin: str | None = None
    architectures: tuple[str, ...] = ()
    reasons: list[str] = field(default_factory=list)
    target: Target | None = None


_state = _State()
_lock = threading.RLock()


def load() -> ModuleType:
    """The module, with its `build_info` and `plan`; builds it where it must and can.

    Raises ExtensionError. A build that failed is not tried again by this process.
    """
    if _state.module is None:
        with _lock:
            _look()
            if _state.target is not None:
                _build(_state.target)
            if _state.module is None:
                raise ExtensionError("; ".join(_state.reasons))
    return _state.module


def why_not() -> list[str]:
    """Why `load` would fail; empty also where `load` would build, see `ready`. Builds nothing."""
    _look()
    return [] if _state.target else list(_state.reasons)


def no_code(capability: tuple[int, int]) -> list[str]:
    """Why a GPU of this compute capability can't run the module, or what `load` would build; empty where it can."""
    _look()
    built = tuple(_state.target.architectures) if _state.target else _state.architectures
    if build.covers(built, capability):
        return []
    return [f"{'what would be built is' if _state.target else 'it was built'} {_for_others(built, [capability])}"]


def _for_others(built: Sequence[str], capabilities: Sequence[tuple[int, int]]) -> str:
    here = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    return (
        f"for {' '.join(built)}, without code for the GPU here, of compute capability {here}: unset"
        f" TORCH_CUDA_ARCH_LIST or add {here} to it, and install stvit again or let it be built on request"
    )


def ready() -> bool:
    """Whether `load` would build nothing."""
    _look()
    return _state.module is not None


def device() -> str | None:
    """The kind of device that the module in use runs on: "cuda", "cpu" for an emulated one; None before `load`."""
    return _state.device


def use(module: ModuleType | None) -> ModuleType | None:
    """Makes `load` return this module, already imported; None goes back to looking for one. Returns the one before."""
    global _state
    before, _state = _state.module, _State()
    if module is not None:
        _take(module, "handed in")
    return before


def describe() -> dict[str, Any]:
    """For people. origin: where the module is from; built: what with; both None where there is none, for these reasons.
    builds_for: what the first use would build it for."""
    _look()
    return {
        "origin": _state.origin,
        "built": dict(_state.module.build_info()) if _state.module else None,
        "builds_for": list(_state.target.architectures) if _state.target else None,
        "reasons": list(_state.reasons),
    }


def sources() -> Path | None:
    """The folder of the CUDA sources: stvit/csrc in a wheel, csrc beside the package in a checkout."""
    here = Path(__file__).parent.parent
    return next((path for path in (here / "csrc", here.parent / "csrc") if any(path.glob("*.cu"))), None)


def cache_root() -> Path:
    """Where builds are kept: torch's folder for extensions."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "torch_extensions"


def target(folder: Path, tools: build.Toolkit, architectures: Sequence[str]) -> Target:
    """The build of these sources: everything that it depends on is in its path."""
    settings = [build.identity(folder), tools.version, architectures, build.CXX_FLAGS, build.NVCC_FLAGS]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return Target(cache_root() / "stvit" / key / build.FILE, folder, tools, architectures)


def gpus() -> list[str]:
    """Compute capabilities of the GPUs here, as "9.0"."""
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return ["{}.{}".format(*torch.cuda.get_device_capability(index)) for index in range(count)]
    except RuntimeError:  # in a forked process
        return []


def compile_target(wanted: Target) -> None:
    """Makes `wanted.path`, unless it is there. Of several processes that do so at once one builds, the others wait.

    Raises ExtensionError with the end of the compiler's output, OSError where the folder can't be written.
    """
    import fcntl  # not on Windows, where the rest of the package works

    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with open(wanted.path.parent / "lock", "w") as lock:  # let go of when this process ends, however it does
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("stvit: waiting for another process that builds the CUDA extension", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.path.exists():
            _compile(wanted)


def _compile(wanted: Target) -> None:
    names = ", ".join("sm_" + name.replace(".", "") for name in wanted.architectures)
    print(
        f"stvit: building the CUDA extension for {names} (a minute or more, once) ...",
        end=" ", file=sys.stderr, flush=True,
    )  # fmt: skip
    start, how = time.monotonic(), "failed"
    folder = wanted.path.parent
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
            output = _run([sys.executable, "-m", "stvit.backends.build", str(wanted.folder.resolve()), scratch], wanted)
            if output is not None:
                (folder / "build.log").write_text(output)
                raise ExtensionError(f"compiling failed, all of it is in {folder}/build.log:\n{_end(output)}")
            os.replace(Path(scratch) / "stvit" / build.FILE, wanted.path)
        how = "done"
    finally:
        print(f"{how} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _run(command: list[str], wanted: Target) -> str | None:
    """None where the command succeeds, otherwise what it said. It finds the modules that this process finds."""
    path = [*filter(None, sys.path), str(Path(__file__).resolve().parents[2])]
    settings = {**build.environment(wanted.tools, wanted.architectures), "PYTHONPATH": os.pathsep.join(path)}
    child = subprocess.run(
        command, cwd=command[-1], env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return child.stdout.decode(errors="replace") if child.returncode else None


def _end(output: str, lines: int = 12) -> str:
    """The last lines, without the compilers' command lines, which are long."""
    told = [line for line in output.splitlines() if line.strip() and len(line) < 400]
    return "\n".join(f"  {line}" for line in told[-lines:])


def _look() -> None:
    """Loads what can be loaded without building, once; else finds out what building would make, or why it can't."""
    with _lock:
        if not _state.looked:
            _state.looked = True
            _try_installed()
            if _state.module is None:
                _try_cached()


def installed() -> Path | None:
    """The binary that was installed with the package."""
    spec = importlib.util.find_spec(build.NAME)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _try_installed() -> None:
    path = installed()
    record = _record(path) if path else {}
    changed = _changes(record)
    built = tuple(record.get("architectures", ()))
    foreign = _fits_no_gpu(built) if built else None
    if path is None:
        _state.reasons.append("the compiled extension stvit._C is not installed")
    elif changed:
        _state.reasons.append(f"{path} was built from {changed}: install stvit again to renew it")
    elif foreign:  # left alone, as a process can't load another one beside it: both register the same ops
        _state.reasons.append(f"{path} was built {foreign}")
    else:
        _import(path, "installed")


def _fits_no_gpu(built: tuple[str, ...]) -> str | None:
    """Why what was built for these architectures is of no use to any GPU here that the kernels run on."""
    here = [(int(major), int(minor)) for major, minor in (name.split(".") for name in build.new_enough(gpus()))]
    useless = here and not any(build.covers(built, capability) for capability in here)
    return _for_others(built, here) if useless else None


def _record(binary: Path) -> dict[str, Any]:
    """What was written down when the binary was installed; empty where nothing was."""
    path = build.record(binary)
    return json.loads(path.read_text()) if path.is_file() else {}


def _changes(then: dict[str, Any]) -> str | None:
    """What a binary was built from that is no longer so. With another torch, loading it may end the process."""
    folder = sources()
    if folder is None or not then:
        return None
    now = build.identity(folder)
    if then["torch"] != now["torch"]:
        return f"torch {then['torch']}, this is {now['torch']}"
    return "other sources" if then["sources"] != now["sources"] else None


def _try_cached() -> None:
    folder, tools = sources(), build.toolkit()
    obstacles = build.obstacles()
    if folder is None:
        obstacles.append("its sources, csrc, are not installed")
    if folder is not None and tools is not None:
        try:
            found = target(folder, tools, build.architectures(tools, gpus()))
        except ValueError as error:
            obstacles.append(str(error))
        else:
            if found.path.exists():
                return _import(found.path, "built on request")
            _state.target = None if obstacles else found
    _state.reasons += [f"it can't be built: {reason}" for reason in obstacles]


def _build(wanted: Target) -> None:
    _state.target = None  # once
    try:
        compile_target(wanted)
    except ExtensionError as error:
        _state.reasons.append(str(error))
    except OSError as error:
        _state.reasons.append(
            f"it can't be built in {cache_root()} ({error}): set TORCH_EXTENSIONS_DIR to another folder"
        )
    else:
        _import(wanted.path, "built on request")


def _import(path: Path, origin: str) -> None:
    """Loads the file as stvit._C; where it can't be, that is a reason."""
    loader = importlib.machinery.ExtensionFileLoader(build.NAME, str(path))
    spec = importlib.util.spec_from_file_location(build.NAME, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        _state.reasons.append(f"{path} can't be loaded ({error}): remove it, and it is built again")
        return
    sys.modules[build.NAME] = module
    _take(module, f"{origin}: {path}")


def _take(module: ModuleType, origin: str) -> None:
    global _state
    told = module.build_info()
    _state = _State(True, module, told["device"], origin, tuple(told.get("architectures", "").split()))
