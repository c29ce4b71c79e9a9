"""What building the extension asks for, each missing piece with its message, and the settings it is built with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from stvit.backends import build

NVCC = """\
#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_%s\\n' {known} ;;
esac
"""


def fake_toolkit(home: Path, release: str = "13.0", known: str = "75 80 86 89 90 100 103 120") -> build.Toolkit:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(NVCC.format(release=release, known=known))
    nvcc.chmod(0o755)
    return build.Toolkit(home, f"{release}.88")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CUDA build of torch on Linux with every tool but a toolkit, and nothing set."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ninja", "c++"):
        (tools / name).touch(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/bin")  # /bin/sh runs the scripts
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    monkeypatch.setattr(build, "USUAL_HOME", tmp_path / "usual")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(sys, "platform", "linux")


def test_nothing_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_toolkit(tmp_path / "usual")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    assert build.obstacles() == []


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (reason,) = build.obstacles()
    assert "torch can't be imported" in reason and "--no-build-isolation" in reason


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (reason,) = build.obstacles()
    assert torch.__version__ in reason and "not built for CUDA: install a CUDA build of torch" in reason


def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert build.obstacles() == ["it is built on Linux only, this is win32"]


def test_no_nvcc() -> None:
    expected = "nvcc is not installed: install the CUDA toolkit 13.x, or set CUDA_HOME to where it is"
    assert build.obstacles() == [expected]
    assert build.toolkit() is None


def test_cuda_home_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_toolkit(tmp_path / "usual")  # is not what was asked for
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (reason,) = build.obstacles()
    assert f"{tmp_path}/bin holds no nvcc that runs" in reason and "CUDA toolkit 13.x" in reason


@pytest.mark.parametrize("release", ["12.8", "14.0"])
def test_another_major_version(release: str, tmp_path: Path) -> None:
    tools = fake_toolkit(tmp_path / "usual", release)
    (reason,) = build.obstacles()
    assert f"torch is built for CUDA 13.0, {tools.nvcc} is of CUDA {release}.88" in reason
    assert "install the CUDA toolkit 13.x, or set CUDA_HOME" in reason


def test_another_minor_version_will_do(tmp_path: Path) -> None:
    fake_toolkit(tmp_path / "usual", "13.2")
    assert build.obstacles() == []


def test_no_ninja_and_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_toolkit(tmp_path / "usual")
    for tool in (tmp_path / "tools").iterdir():
        tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    monkeypatch.setattr(build, "toolkit", lambda: build.Toolkit(tmp_path, "13.0.88"))
    ninja, compiler = build.obstacles()
    assert ninja == "ninja is not installed: pip install ninja"
    assert compiler == "there is no C++ compiler c++: install g++, or set CXX to one"
    monkeypatch.setenv("CXX", "clang++ -v")
    assert "no C++ compiler clang++:" in build.obstacles()[1]


def test_ninja_beside_python_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = fake_toolkit(tmp_path / "usual")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "tools" / "ninja").rename(tmp_path / "scripts" / "ninja")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    assert build.obstacles() == []
    assert build.environment(tools, [])["PATH"].endswith(str(tmp_path / "scripts"))


def test_which_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> str | None:
        found = build.cuda_home()
        return found and found.name

    assert home() is None
    fake_toolkit(tmp_path / "first")
    monkeypatch.setenv("PATH", str(tmp_path / "first" / "bin"), prepend=":")
    assert home() == "first"
    fake_toolkit(tmp_path / "usual")
    assert home() == "usual"
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    assert home() == "path"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert home() == "home"


@pytest.mark.parametrize(
    ("named", "present", "expected"),
    [
        (None, [], "8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        (None, ["9.0", "8.0", "9.0"], "8.0 9.0"),
        (None, ["10.0", "9.0"], "9.0 10.0"),
        (None, ["12.1"], "8.0 8.6 8.9 9.0 10.0 12.0+PTX"),  # newer than this nvcc: its PTX runs there
        (None, ["7.5", "8.0"], "8.0"),
        (None, ["7.0", "9.0"], "9.0"),  # nor need this nvcc know it
        (None, ["7.5"], "8.0 8.6 8.9 9.0 10.0 12.0+PTX"),
        ("native", ["9.0", "7.5"], "9.0"),
        ("9.0", ["8.0"], "9.0"),
        ("8.0;9.0a 10.0+PTX", [], "8.0 9.0a 10.0+PTX"),
        ("7.5 8.0 12.0+PTX", [], "8.0 12.0+PTX"),
        ("Ampere;Hopper", [], "Ampere Hopper"),
    ],
)
def test_architectures(
    named: str | None, present: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if named is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    assert build.architectures(fake_toolkit(tmp_path / "cuda"), present) == expected.split()


def test_architectures_that_nvcc_does_not_know(tmp_path: Path) -> None:
    tools = fake_toolkit(tmp_path / "cuda", "12.4", "75 80 86 87 89 90")
    assert build.architectures(tools) == ["8.0", "8.6", "8.9", "9.0+PTX"]


def test_only_architectures_that_are_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: expected something from 8.0 on, got '7.0;7.5.PTX'"):
        build.architectures(fake_toolkit(tmp_path / "cuda"))


@pytest.mark.parametrize(
    ("built", "yes", "no"),
    [
        ("8.0", [(8, 0), (8, 6), (8, 9)], [(9, 0), (10, 0)]),
        ("8.6 9.0", [(8, 6), (8, 9), (9, 0)], [(8, 0), (10, 0), (12, 0)]),
        ("8.0 12.0+PTX", [(8, 9), (12, 0), (12, 1), (13, 0)], [(9, 0), (10, 0)]),
        ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("10.0f+PTX", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("Hopper", [(8, 0), (9, 0)], []),  # torch knows what that is
        ("", [(9, 0)], []),
    ],
)
def test_which_gpus_run_what_was_built(built: str, yes: list[tuple[int, int]], no: list[tuple[int, int]]) -> None:
    names = tuple(built.split())
    assert [build.covers(names, capability) for capability in yes + no] == [True] * len(yes) + [False] * len(no)


@pytest.mark.parametrize(("cores", "gib", "expected"), [(2, 64, 2), (64, 32, 10), (8, 1, 1)])
def test_jobs(cores: int, gib: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(build, "free_memory", lambda: gib << 30)
    tools = build.Toolkit(tmp_path, "13.0.88")
    assert build.environment(tools, ["9.0"])["MAX_JOBS"] == str(expected)
    monkeypatch.setenv("MAX_JOBS", "5")
    assert build.environment(tools, ["9.0"])["MAX_JOBS"] == "5"


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   2048 kB\n"}
    monkeypatch.setattr(build, "_read", lambda path: texts.get(path, ""))
    assert build.free_memory() == 2 << 20
    texts |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "9\n"}
    assert build.free_memory() == 2 << 20
    texts["/sys/fs/cgroup/memory.max"] = "1009\n"
    assert build.free_memory() == 1000


def test_identity_is_that_of_every_source_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cu").write_text("a")
    seen = [build.identity(tmp_path)]
    (tmp_path / "a.cu").write_text("b")
    seen.append(build.identity(tmp_path))
    (tmp_path / "b.cuh").write_text("")
    seen.append(build.identity(tmp_path))
    monkeypatch.setattr(torch, "__version__", "9.9")
    seen.append(build.identity(tmp_path))
    assert len({str(identity) for identity in seen}) == 4
    (tmp_path / "notes.txt").touch()
    assert build.identity(tmp_path) == seen[-1]
