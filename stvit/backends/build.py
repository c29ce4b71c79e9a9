"""How the CUDA extension stvit._C is built: its settings, what building asks of a machine, and the build itself.

setup.py and extension.py share this file. setup.py loads it by its path, where neither the package nor torch need be
installed: it imports nothing of stvit, and torch inside functions only. ``python -m stvit.backends.build SOURCES
FOLDER`` is the process that compiles SOURCES into FOLDER/stvit.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

NAME = "stvit._C"
FILE = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # where TORCH_CUDA_ARCH_LIST says nothing
OLDEST = (8, 0)  # asynchronous copies, bfloat16 matrix products
CXX_FLAGS = ("-O3", "-g0", "-fvisibility=hidden")
NVCC_FLAGS = ("-O3",)
JOB_BYTES = 3 * 2**30  # room for one compiler; the widest file takes 0.8 GiB with g++ 12
USUAL_HOME = Path("/usr/local/cuda")


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, and the version of its nvcc as "13.0.88"."""

    home: Path
    version: str

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"


def cuda_home() -> Path | None:
    """CUDA_HOME or CUDA_PATH, else the usual folder where it holds nvcc, else that of the nvcc on the PATH.

    torch looks at the PATH first, where a script called nvcc misleads it.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    if (USUAL_HOME / "bin" / "nvcc").is_file():
        return USUAL_HOME
    found = shutil.which("nvcc")
    return Path(found).resolve().parent.parent if found else None


def toolkit() -> Toolkit | None:
    """The toolkit that builds would use; None where there is no nvcc that answers."""
    home = cuda_home()
    if home is None:
        return None
    try:
        answer = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+\.\d+\.\d+)", answer.stdout)
    return Toolkit(home, found[1]) if found else None


def tools_path() -> str:
    """PATH, and then the folder of this Python's programs: ninja may be there without an active environment."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def obstacles() -> list[str]:
    """Why the extension can't be built here, each reason with its remedy. Asks for no GPU."""
    try:
        import torch
    except ImportError as error:
        return [
            f"torch can't be imported ({error}); pip builds in an environment of its own, without torch, unless called"
            " with --no-build-isolation"
        ]
    if not sys.platform.startswith("linux"):
        return [f"it is built on Linux only, this is {sys.platform}"]
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} is not built for CUDA: install a CUDA build of torch"]
    found = [_toolkit_obstacle(torch.version.cuda)]
    if shutil.which("ninja", path=tools_path()) is None:
        found.append("ninja is not installed: pip install ninja")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        found.append(f"there is no C++ compiler {compiler}: install g++, or set CXX to one")
    return [reason for reason in found if reason]


def _toolkit_obstacle(cuda: str) -> str | None:
    major = cuda.split(".")[0]
    remedy = f"install the CUDA toolkit {major}.x, or set CUDA_HOME to where it is"
    home, found = cuda_home(), toolkit()
    if home is None:
        return f"nvcc is not installed: {remedy}"
    if found is None:
        return f"{home}/bin holds no nvcc that runs: {remedy}"
    if found.version.split(".")[0] != major:
        return f"torch is built for CUDA {cuda}, {found.nvcc} is of CUDA {found.version}: {remedy}"
    return None


def architectures(tools: Toolkit, present: Sequence[str] = ()) -> list[str]:
    """What to compile for, as TORCH_CUDA_ARCH_LIST says; else for `present`, the GPUs there are; else for the default.

    What is older than the kernels is left out: of what is named, as in containers that build everything for "7.5 8.0",
    and of the GPUs. Raises ValueError where nothing is left of what is named.
    """
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if named and named != "native":
        wanted = new_enough(re.split(r"[;\s]+", named))
        if not wanted:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected something from 8.0 on, got {named!r}")
        return wanted
    answer = subprocess.run([tools.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = {f"{code[:-1]}.{code[-1]}" for code in re.findall(r"compute_(\d+)", answer)}
    present = new_enough(present)
    if present and known.issuperset(present):
        return sorted(set(present), key=lambda name: _number(name) or OLDEST)
    wanted = [name for name in ARCHITECTURES if name in known]
    return [*wanted[:-1], wanted[-1] + "+PTX"]


def _number(architecture: str) -> tuple[int, int] | None:
    """(9, 0) of "9.0", "9.0a" and "9.0+PTX"; None of a name, such as "Hopper"."""
    found = re.match(r"(\d+)\.(\d)", architecture)
    return (int(found[1]), int(found[2])) if found else None


def new_enough(names: Sequence[str]) -> list[str]:
    """Those of the architectures or compute capabilities that the kernels run on."""
    return [name for name in names if (_number(name) or OLDEST) >= OLDEST]


@functools.cache
def covers(built: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether what was compiled for these architectures holds code that a GPU of this compute capability runs.

    True also where the names don't tell, as "Hopper" doesn't.
    """
    return not built or any(_runs(name, capability) for name in built)


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", architecture)
    if found is None:
        return True
    number = (int(found[1]), int(found[2]))
    if found[3] == "a":  # its PTX too
        return capability == number
    # PTX of a family, as "10.0f+PTX", stays within it.
    return capability >= number and (capability[0] == number[0] or bool(found[4] and not found[3]))


def free_memory() -> int:
    """Bytes that new processes can have, by the kernel's estimate and the limit of the control group."""
    found = [int(kib) << 10 for kib in re.findall(r"MemAvailable:\s+(\d+)", _read("/proc/meminfo"))]
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        found.append(int(limit) - int(used))
    return min(found, default=JOB_BYTES)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def jobs() -> int:
    """Compilers to run at once: one a core, as far as the memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // JOB_BYTES))


def environment(tools: Toolkit, wanted: Sequence[str]) -> dict[str, str]:
    """What torch's build reads from the environment. A MAX_JOBS that is set stays."""
    return {
        "CUDA_HOME": str(tools.home),
        "TORCH_CUDA_ARCH_LIST": ";".join(wanted),
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(jobs()),
        "PATH": tools_path(),
    }


def files(folder: Path) -> list[Path]:
    """Every source and header in `folder`."""
    return sorted(path for ending in ("cu", "cpp", "cuh", "h") for path in folder.glob(f"*.{ending}"))


def identity(folder: Path) -> dict[str, str]:
    """What a binary must have been built from to be of use here: these sources and this torch."""
    import torch

    digest = hashlib.sha256()
    for path in files(folder):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {"sources": digest.hexdigest(), "torch": str(torch.__version__)}


def record(binary: Path) -> Path:
    """The file beside an installed binary that tells its identity, and what it was compiled for."""
    return binary.with_name("_C.json")


def extension(folder: str, tools: Toolkit, wanted: Sequence[str]) -> Any:
    """The extension module of the sources in `folder`, for setuptools."""
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    told = {
        "NVCC": tools.version,
        "TORCH": str(torch.__version__),
        "ARCHITECTURES": " ".join(wanted),
        "FLAGS": " ".join(NVCC_FLAGS),
    }
    defines = [f'-DSTVIT_BUILD_{name}="{value}"' for name, value in told.items()]
    sources = [os.path.join(folder, path.name) for path in files(Path(folder)) if path.suffix in (".cu", ".cpp")]
    return CUDAExtension(
        NAME,
        sources,
        include_dirs=[os.path.abspath(folder)],
        extra_compile_args={"cxx": [*CXX_FLAGS, *defines], "nvcc": list(NVCC_FLAGS)},
    )


def build_ext(folder: str, wanted: Sequence[str]) -> Any:
    """setuptools' command that builds the extension: torch's, with one message where it fails, and the record."""
    from setuptools.errors import CompileError
    from torch.utils.cpp_extension import BuildExtension

    class BuildCuda(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except (RuntimeError, ValueError, OSError) as error:
                raise CompileError(f"the CUDA extension does not build: {error}") from None
            binary = Path(self.get_ext_fullpath(NAME))
            told = {**identity(Path(folder)), "architectures": list(wanted)}
            record(binary).write_text(json.dumps(told) + "\n")

    return BuildCuda


def main() -> None:
    """Compiles; CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are as `environment` says."""
    import setuptools

    sources, folder = sys.argv[1:]
    tools = toolkit()
    assert tools is not None
    wanted = architectures(tools)
    setuptools.setup(
        name="stvit",
        packages=[],
        ext_modules=[extension(sources, tools, wanted)],
        cmdclass={"build_ext": build_ext(sources, wanted)},
        script_args=["--quiet", "build_ext", "--build-lib", folder, "--build-temp", os.path.join(folder, "objects")],
    )


if __name__ == "__main__":
    main()
