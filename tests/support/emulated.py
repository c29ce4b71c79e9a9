"""The CUDA sources compiled for the CPU by a C++ compiler alone, with tests/support/emulation in the place of the GPU.

`extension` is what stvit._C is on a GPU machine, for CPU tensors. Beside it the emulated device: the order in which
threads run, its limits, and the bytes that kernels move. Compiled once and cached, outside the repository.

STVIT_EMULATION_SOURCES names other sources than csrc/: those of a test with a fault in them.

With STVIT_EMULATION_SANITIZER=address everything is compiled with the address sanitizer, whose run-time library must
have been loaded first: `sanitizer_environment` is what a child process needs.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import stvit.backends.extension

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "support" / "emulation"
SOURCES = Path(os.environ.get("STVIT_EMULATION_SOURCES") or ROOT / "csrc")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stvit" / "emulated"
SANITIZER = os.environ.get("STVIT_EMULATION_SANITIZER", "")
COMPILER = os.environ.get("CXX", "g++")
JOBS = 2
KEPT = 30 * 24 * 3600  # seconds since the last use

TORCH = Path(torch.__file__).parent
# The C++ of torch's headers: what it compiles extensions with.
NAMED = re.findall(r"-std=c\+\+\d+", (TORCH / "utils" / "cpp_extension.py").read_text())
STANDARD = max(NAMED, key=NAMED.count)
FLAGS = [STANDARD, "-O1" if SANITIZER else "-O2", "-g0", "-fPIC", "-Wfatal-errors"]
FLAGS += ["-U_FORTIFY_SOURCE"]  # which takes a jump between stacks for a smashed one
FLAGS += [f"-fsanitize={SANITIZER}"] if SANITIZER else []
INCLUDES = [f"-I{EMULATION}", f"-I{SOURCES}"]
ORDERS = ("forward", "reverse", "shuffled")


def run_compiler(*arguments: str) -> str:
    """What the compiler prints; RuntimeError where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    child = subprocess.run([COMPILER, *arguments], capture_output=True, text=True, env=environment)
    if child.returncode:
        raise RuntimeError(f"{COMPILER} {' '.join(arguments)}\n{child.stderr}")
    return child.stdout


def made(target: Path, *arguments: str) -> Path:
    """A file of the cache, compiled where it is missing."""
    if not target.exists():
        part = target.with_suffix(".part")
        run_compiler(*arguments, "-o", str(part))
        part.rename(target)
    target.touch()
    return target


def library(name: str, sources: Sequence[Path], flags: Sequence[str] = (), link: Sequence[str] = ()) -> Path:
    """The shared library of `sources`; of several processes that ask for it at once one compiles, the others wait."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler to emulate a GPU with: no {COMPILER}")
    version, headers = run_compiler("--version"), b""
    for folder in (SOURCES, EMULATION):
        headers += b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".h", ".cuh"))

    def compiled(source: Path) -> str:
        command = [*FLAGS, *INCLUDES, *flags, "-x", "c++", "-c", str(source)]
        known = repr((version, command)).encode() + headers + source.read_bytes()
        return str(made(CACHE / f"{source.stem}-{key(known)}.o", *command))

    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock, ThreadPoolExecutor(JOBS) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = list(pool.map(compiled, sources))
        linked = made(CACHE / f"{name}-{key(repr((objects, link)).encode())}.so", *FLAGS, "-shared", *objects, *link)
        for path in CACHE.iterdir():
            if time.time() - path.stat().st_mtime > KEPT:
                path.unlink()
    return linked


def key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


SUPPORT = sorted(EMULATION.glob("*.cpp"))
NAME = "_emulated"  # of the Python module


@functools.cache
def extension_library() -> Path:
    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")], key=lambda path: path.suffix)
    folders = [TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include"]
    flags = [f"-isystem{folder}" for folder in folders] + [f"-isystem{sysconfig.get_paths()['include']}"]
    flags += ["-Wno-unknown-pragmas", f"-DTORCH_EXTENSION_NAME={NAME}", "-DSTVIT_DISPATCH_KEY=CPU"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    built = {"NVCC": "none", "TORCH": torch.__version__, "ARCHITECTURES": "none", "FLAGS": " ".join(FLAGS)}
    flags += [f'-DSTVIT_BUILD_{name}="{value}"' for name, value in built.items()]
    link = [f"-L{TORCH / 'lib'}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"]
    return library(NAME, [*sources, *SUPPORT], flags, link)


@functools.cache
def extension() -> ModuleType:
    """The extension for CPU tensors; its ops are registered as torch.ops.stvit_cuda.

    The one for GPUs is loaded first, where this process may come to use it: it registers the ops without asking whether
    they are, as this one does (emulation/torch/library.h).
    """
    with suppress(stvit.backends.extension.ExtensionError):
        stvit.backends.extension.load() if torch.cuda.is_available() else stvit.backends.extension.ready()
    path = str(extension_library())
    spec = importlib.util.spec_from_loader(NAME, importlib.machinery.ExtensionFileLoader(NAME, path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counts(NamedTuple):
    """Bytes of device memory that kernels moved, and launches."""

    loaded: int
    stored: int
    launches: int


class Launch(NamedTuple):
    """A launch as the compiled kernel would see it."""

    kernel: str  # symbol
    blocks: int
    threads: int
    shared_bytes: int
    arguments: bytes


class Device:
    """The emulated device in a library: settings that tests change, counts that they read."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    @contextmanager
    def order(self, name: str) -> Iterator[None]:
        """Threads run in this order of ORDERS between barriers; results must not depend on it."""
        self.library.emulation_order(ORDERS.index(name))
        try:
            yield
        finally:
            self.library.emulation_order(0)

    @contextmanager
    def limits(self, multiprocessors: int = 132, shared_bytes: int = 232448) -> Iterator[None]:
        """Limits that the host code plans for; an H100's otherwise."""
        self.library.emulation_limits(multiprocessors, shared_bytes)
        try:
            yield
        finally:
            self.library.emulation_limits(132, 232448)

    def counts(self) -> Counts:
        """What was counted since the last call."""
        counts = (ctypes.c_int64 * 3)()
        self.library.emulation_counts(counts)
        return Counts(*counts)

    def recorded(self, run: Callable[[], object]) -> list[Launch]:
        """The launches of `run`, noted instead of run: its results are not computed."""
        launch = self.library.emulation_launch
        launch.restype = ctypes.c_char_p
        self.library.emulation_record(1)
        try:
            run()
            found = []
            for index in range(self.library.emulation_recorded()):
                sizes, data = (ctypes.c_int64 * 4)(), ctypes.c_void_p()
                kernel = launch(index, sizes, ctypes.byref(data)).decode()
                blocks, threads, shared_bytes, size = sizes
                found.append(Launch(kernel, blocks, threads, shared_bytes, ctypes.string_at(data, size)))
            return found
        finally:
            self.library.emulation_record(0)

    @contextmanager
    def recording(self) -> Iterator[Callable[[], object]]:
        """Launches are noted instead of run; what is given forgets them."""
        forget = functools.partial(self.library.emulation_record, 1)
        forget()
        try:
            yield forget
        finally:
            self.library.emulation_record(0)

    def run_sample(self, name: str, given: torch.Tensor, out: torch.Tensor, n: int = 0) -> str:
        """Runs a kernel of tests/support/emulation/samples.cu; the text of its error, empty without one."""
        run = self.library.run_sample
        run.restype = ctypes.c_char_p
        error = run(name.encode(), *(ctypes.c_void_p(t.data_ptr()) for t in (given, out)), ctypes.c_int64(n))
        return error.decode()


@functools.cache
def device() -> Device:
    """The device that the extension runs on."""
    extension()
    return Device(extension_library())


@functools.cache
def samples() -> Device:
    """A device of its own for the kernels of tests/support/emulation/samples.cu."""
    return Device(library("samples", [EMULATION / "samples.cu", *SUPPORT]))


def sanitizer_environment() -> dict[str, str | None]:
    """What the environment of a child must hold for sanitized code to run in Python."""
    names = ("libasan.so", "libstdc++.so")  # without the latter exceptions are not intercepted
    found = [run_compiler(f"-print-file-name={name}").strip() for name in names]
    if not all(map(os.path.isabs, found)):
        pytest.skip(f"{COMPILER} has no address sanitizer")
    return {
        "STVIT_EMULATION_SANITIZER": "address",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
