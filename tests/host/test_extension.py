"""The CUDA extension is found, built once and on request, loaded; what can go wrong ends in one message."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stvit import BackendError, super_token_sampling
from stvit.backends import build, dispatch, extension, registry
from tests.support import extensions

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NO_NVCC = pytest.mark.skipif(build.toolkit() is None, reason="needs nvcc")


@pytest.fixture(autouse=True)
def from_scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has not looked yet, with nothing installed and an empty cache."""
    monkeypatch.setattr(extension, "_state", extension._State())
    monkeypatch.setattr(extension, "installed", lambda: None)
    monkeypatch.delitem(sys.modules, build.NAME, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("STVIT_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "_told", set())
    registry.kernels.cache_clear()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = extensions.write_stand_in(tmp_path / "csrc")
    monkeypatch.setattr(extension, "sources", lambda: folder)
    return folder


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the choice of a backend can tell, but without triton."""
    monkeypatch.setattr(dispatch, "_gpu_missing", lambda device: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_triton_missing", lambda device: ["no triton"])


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_state", extension._State())


def never(*_: Any) -> Any:
    pytest.fail("built again")


def emulated(device: str = "cpu", architectures: str = "") -> Any:
    module: Any = types.ModuleType("stand_in")
    module.build_info = lambda: {"device": device, "architectures": architectures}
    return module


@NO_NVCC
def test_it_is_built_once_and_kept(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert extension.why_not() == [] and not extension.ready()
    assert extension.describe()["builds_for"] == ["9.0"]
    assert not (tmp_path / "cache").exists()  # asking builds nothing
    built = extension.load().build_info()
    assert built == {
        "nvcc": build.toolkit().version,  # type: ignore[union-attr]
        "torch": torch.__version__,
        "architectures": "9.0",
        "flags": " ".join(build.NVCC_FLAGS),
        "device": "cuda",
    }
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"stvit: building the CUDA extension for sm_90 \(.*once\) \.\.\. done after \d+ s\n", err)
    assert extension.why_not() == [] and extension.ready() and extension.load() is sys.modules["stvit._C"]

    monkeypatch.setattr(extension, "_compile", never)
    new_process(monkeypatch)
    assert extension.ready() and extension.load().build_info() == built
    assert str(tmp_path / "cache") in extension.describe()["origin"]
    assert capfd.readouterr() == ("", "")

    for change in (
        lambda: monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0"),
        lambda: (stand_in / "stand_in.h").write_text("#pragma once\nvoid launch();  // changed\n"),
    ):
        new_process(monkeypatch)
        change()
        assert not extension.ready() and extension.why_not() == []


@NO_NVCC
def test_two_processes_build_once(stand_in: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from stvit.backends import extension; extension.installed = lambda: None;"
        f"extension.sources = lambda: Path({str(stand_in)!r}); print(extension.load().build_info()['device'])"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [child.communicate() for child in both]
    assert [out for out, _ in said] == ["cuda\n"] * 2
    assert sum(err.count("building") for _, err in said) == 1
    assert not list((tmp_path / "cache").rglob("build-*"))


@NO_NVCC
def test_a_compile_error_is_shown_and_remembered(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: None, capfd: pytest.CaptureFixture[str]
) -> None:
    (stand_in / "kernel.cu").write_text("__global__ void kernel() { undefined_name(); }\n")
    with pytest.raises(BackendError) as error:
        dispatch.resolve("cuda", GPU, torch.float32)
    message = str(error.value)
    assert "backend='cuda' can't run: the compiled extension stvit._C is not installed; compiling failed" in message
    assert 'identifier "undefined_name" is undefined' in message and len(message.splitlines()) < 16
    assert "-gencode" not in message and "[1/" not in message
    log = re.search(r"all of it is in (\S+):\n", message)
    assert log and "-gencode" in Path(log[1]).read_text()
    assert "Traceback" not in message + Path(log[1]).read_text()
    assert re.search("failed after [0-9]+ s\n$", capfd.readouterr().err)

    monkeypatch.setattr(extension, "_compile", never)
    with pytest.raises(BackendError) as again:
        dispatch.resolve("cuda", GPU, torch.float32)
    assert str(again.value) == message
    assert dispatch.why_not("cuda", GPU) == extension.why_not() != []


def test_auto_builds_nothing_and_takes_what_is_built(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extension, "_compile", never)
    monkeypatch.setattr(extension.build, "toolkit", lambda: build.Toolkit(Path("/cuda"), "13.0.88"))
    monkeypatch.setattr(extension.build, "obstacles", list)
    assert dispatch.why_not("cuda", GPU) == []
    with caplog.at_level(logging.WARNING, "stvit"):
        assert dispatch.resolve("auto", GPU, torch.float32) == "reference"
    assert 'cuda: it is not built yet, backend="cuda" builds it' in caplog.text
    extension.use(emulated("cuda"))
    assert dispatch.resolve("auto", GPU, torch.float32) == "cuda"


@NO_NVCC
def test_the_backend_asked_for_by_name_is_built(stand_in: Path, with_gpu: None) -> None:
    assert dispatch.resolve("cuda", GPU, torch.float32) == "cuda"
    assert extension.ready()
    assert registry.kernels("cuda", "sampling") is torch.ops.stvit_cuda


def test_nothing_is_built_for_tensors_that_can_not_use_it(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_compile", never)
    with pytest.raises(BackendError, match="needs tensors on a CUDA device, got cpu"):
        super_token_sampling(torch.zeros(1, 3, 4, 4), 2, backend="cuda")


def test_what_is_missing_is_told(stand_in: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: None) -> None:
    monkeypatch.setattr(extension.build, "toolkit", lambda: None)
    monkeypatch.setattr(extension.build, "obstacles", lambda: ["no nvcc: install it", "no ninja: install it"])
    with pytest.raises(BackendError) as error:
        dispatch.resolve("cuda", GPU, torch.float32)
    assert str(error.value) == (
        "backend='cuda' can't run: the compiled extension stvit._C is not installed; it can't be built: no nvcc: "
        "install it; it can't be built: no ninja: install it (see python -m stvit.info)"
    )


def test_a_wrong_list_of_architectures_is_told(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    monkeypatch.setattr(extension.build, "toolkit", lambda: build.Toolkit(Path("/cuda"), "13.0.88"))
    monkeypatch.setattr(extension.build, "obstacles", list)
    assert "it can't be built: TORCH_CUDA_ARCH_LIST: expected something from 8.0 on" in extension.why_not()[1]


def test_missing_sources_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "sources", lambda: None)
    assert "it can't be built: its sources, csrc, are not installed" in extension.why_not()
    with pytest.raises(extension.ExtensionError, match="csrc"):
        extension.load()


@NO_NVCC
def test_a_cache_that_can_not_be_written_is_told(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(extension.ExtensionError, match=r"can't be built in .*file .*: set TORCH_EXTENSIONS_DIR"):
        extension.load()


@NO_NVCC
def test_a_broken_file_is_told(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extension.why_not()
    path = extension._state.target.path  # type: ignore[union-attr]
    path.parent.mkdir(parents=True)
    path.write_text("no library")
    new_process(monkeypatch)
    (_, reason) = extension.why_not()
    assert f"{path} can't be loaded" in reason and "remove it" in reason
    with pytest.raises(extension.ExtensionError, match="can't be loaded"):
        extension.load()


def test_what_was_installed_is_taken_as_long_as_it_fits(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary = tmp_path / "_C.so"
    identity = build.identity(stand_in)
    taken: list[Path] = []
    monkeypatch.setattr(extension, "installed", lambda: binary)
    monkeypatch.setattr(extension, "_import", lambda path, origin: taken.append(path))
    monkeypatch.setattr(extension.build, "obstacles", lambda: ["no nvcc"])
    monkeypatch.setattr(extension.build, "toolkit", lambda: None)

    def reasons(recorded: dict[str, str] | None) -> list[str]:
        build.record(binary).unlink(missing_ok=True)
        if recorded is not None:
            build.record(binary).write_text(json.dumps(recorded))
        new_process(monkeypatch)
        taken.clear()
        return extension.why_not()

    reasons(identity)
    assert taken == [binary]
    reasons(None)  # nobody knows
    assert taken == [binary]
    (changed, _) = reasons({**identity, "sources": "others"})
    assert changed == f"{binary} was built from other sources: install stvit again to renew it" and not taken
    (changed, _) = reasons({**identity, "torch": "2.0"})
    assert f"built from torch 2.0, this is {torch.__version__}: install" in changed and not taken


def test_an_installed_one_without_code_for_any_gpu_here_is_left_alone(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    binary, taken = tmp_path / "_C.so", []
    build.record(binary).write_text(json.dumps({**build.identity(stand_in), "architectures": ["8.0", "9.0"]}))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(extension, "installed", lambda: binary)
    monkeypatch.setattr(extension, "_import", lambda path, origin: taken.append(path))
    monkeypatch.setattr(extension.build, "obstacles", list)
    monkeypatch.setattr(extension.build, "toolkit", lambda: build.Toolkit(Path("/cuda"), "13.0.88"))
    monkeypatch.setattr(extension.build, "architectures", lambda tools, present: present)
    for here, loaded in ((["12.0"], False), (["12.0", "8.6"], True), (["7.5"], True), ([], True)):
        monkeypatch.setattr(extension, "gpus", lambda here=here: here)
        new_process(monkeypatch)
        taken.clear()
        extension.why_not()
        assert taken == [binary] * loaded
        if not loaded:  # built for this GPU when asked for
            assert extension.describe()["builds_for"] == here
            (reason,) = extension.describe()["reasons"]
            assert reason.startswith(f"{binary} was built for 8.0 9.0, without code for the GPU here, of")


def test_one_without_code_for_the_gpu_is_refused(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: None
) -> None:
    for built in ("9.0a", "8.0 9.0", "8.0+PTX"):
        extension.use(emulated("cuda", built))
        assert dispatch.why_not("cuda", GPU) == [] and dispatch.resolve("cuda", GPU, torch.float32) == "cuda"
    extension.use(emulated("cuda", "8.0 12.0+PTX"))
    (reason,) = dispatch.why_not("cuda", GPU)
    assert reason == (
        "it was built for 8.0 12.0+PTX, without code for the GPU here, of compute capability 9.0: unset"
        " TORCH_CUDA_ARCH_LIST or add 9.0 to it, and install stvit again or let it be built on request"
    )
    with pytest.raises(BackendError, match="without code for the GPU here"):
        dispatch.resolve("cuda", GPU, torch.float32)
    assert dispatch.resolve("auto", GPU, torch.float32) == "reference"


def test_what_the_gpu_can_not_run_is_not_built(stand_in: Path, monkeypatch: pytest.MonkeyPatch, with_gpu: None) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(extension, "_compile", never)
    monkeypatch.setattr(extension.build, "toolkit", lambda: build.Toolkit(Path("/cuda"), "13.0.88"))
    monkeypatch.setattr(extension.build, "obstacles", list)
    with pytest.raises(BackendError, match="what would be built is for 8.0, without code .* 9.0: unset"):
        dispatch.resolve("cuda", GPU, torch.float32)


def test_an_emulated_extension_runs_on_the_cpu_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.use(emulated()) is None
    assert dispatch.resolve("cuda", CPU, torch.float64) == "cuda"
    assert dispatch.resolve("auto", CPU, torch.float32) == "reference"
    assert dispatch.why_not("cuda", GPU) == ["the extension in use runs on the CPU, got tensors on cuda"]
    assert dispatch.choose_for_block("cuda", torch.zeros(1)) == "reference"
    assert registry.kernels("cuda", "upsampling") is torch.ops.stvit_cuda
    assert extension.use(None) is not None and extension.device() is None


def test_gpus_are_not_asked_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: int) -> Any:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert extension.gpus() == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device))
    assert extension.gpus() == ["9.0", "9.1"]


def test_the_extension_builds_and_imports(monkeypatch: pytest.MonkeyPatch, run_python: Callable[..., Any]) -> None:
    """Against the installed torch, for three generations of GPUs, none of which need be here."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")  # built by an earlier run of the tests, as a rule
    target = extensions.real()
    code = f"""
import importlib.util, json, torch
spec = importlib.util.spec_from_file_location("stvit._C", {str(target.path)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not torch.cuda.is_initialized()
schemas = [str(getattr(torch.ops.stvit_cuda, name).default._schema) for name in {list(registry.SUPER_TOKEN_OPS)}]
print(json.dumps([module.build_info(), schemas]))
"""
    built, schemas = json.loads(run_python("-c", code).stdout)
    assert built == {
        "nvcc": target.tools.version,
        "torch": torch.__version__,
        "architectures": " ".join(extensions.ARCHITECTURES),
        "flags": " ".join(build.NVCC_FLAGS),
        "device": "cuda",
    }
    assert [schema.split("(")[0] for schema in schemas] == [f"stvit_cuda::{name}" for name in registry.SUPER_TOKEN_OPS]
