"""The choice of a backend: by argument, context, environment variable; reasons; falling back once and aloud."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

import stvit
from stvit import BackendError, available_backends, super_token_sampling, token_upsampling, use_backend
from stvit.backends import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def from_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend asked for, nothing said yet, and no interpreter."""
    monkeypatch.delenv("STVIT_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_used", None)
    monkeypatch.setattr(dispatch.extension, "_state", dispatch.extension._State())
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings of the package so far."""
    caplog.set_level(logging.INFO, logger="stvit")
    return lambda: [r.getMessage() for r in caplog.records if (r.name, r.levelno) == ("stvit", logging.WARNING)]


def sample(backend: str = "auto", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return super_token_sampling(torch.randn(1, 3, 4, 4, dtype=dtype), 2, backend=backend)[0]


def chosen(backend: str = "auto") -> str:
    return dispatch.choose(backend, torch.zeros(1))


def test_every_backend_has_its_list_of_reasons() -> None:
    available = available_backends()
    assert set(available) == {"cuda", "triton", "reference"} == set(dispatch.BACKENDS)
    assert available["reference"] == []
    for reasons in available.values():
        assert isinstance(reasons, list) and all(isinstance(reason, str) and reason for reason in reasons)
    if not torch.cuda.is_available():
        for name in ("triton", "cuda"):
            assert len(available[name]) == 1 and "CUDA" in available[name][0]
    assert stvit.available_backends is available_backends


def test_the_interpreter_makes_triton_available_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.why_not("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.why_not("triton", CPU) == []
    # but "auto" does not take it: it is slow
    assert chosen() == "reference"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_explicit_backend_that_cannot_run_says_every_reason(
    backend: str, monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]
) -> None:
    reasons = ["the first reason", "the second reason"]
    monkeypatch.setattr(dispatch, "_triton_missing", lambda device: list(reasons))
    monkeypatch.setattr(dispatch, "_extension_missing", lambda device: list(reasons))
    for call in (lambda: sample(backend), lambda: token_upsampling(*refined(), backend)):
        with pytest.raises(BackendError) as error:
            call()
        assert backend in str(error.value) and "stvit.info" in str(error.value)
        assert all(reason in str(error.value) for reason in reasons)
    assert not said()


def refined() -> tuple[torch.Tensor, stvit.Association]:
    return super_token_sampling(torch.randn(1, 3, 4, 4), 2, backend="reference")


def test_an_explicit_backend_on_the_wrong_device() -> None:
    for backend in ("triton", "cuda"):
        with pytest.raises(BackendError, match="cpu"):
            sample(backend)
        with use_backend(backend), pytest.raises(BackendError, match="cpu"):
            sample()


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert any("triton is not installed" in reason for reason in dispatch.why_not("triton", CPU))


def test_an_old_gpu_and_another_vendor_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ["8.0" in reason and "7.5" in reason for reason in dispatch.why_not("triton", gpu)] == [True]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch.why_not("triton", gpu) == []
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert any("ROCm" in reason for reason in dispatch.why_not("triton", gpu))


def test_a_dtype_without_kernels_is_a_reason() -> None:
    assert any("int32" in reason for reason in dispatch.why_not("triton", CPU, torch.int32))
    assert dispatch.why_not("reference", CPU, torch.int32) == []


def test_auto_falls_back_and_says_so_once(said: Callable[[], list[str]]) -> None:
    for _ in range(3):
        assert sample().isfinite().all()
    assert len(said()) == 1
    (message,) = said()
    for name in ("triton", "cuda"):
        assert name in message
        assert all(reason in message for reason in dispatch.why_not(name, CPU))


def test_auto_takes_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    usable = {"triton": [], "cuda": [], "reference": []}
    monkeypatch.setattr(dispatch, "why_not", lambda name, *_: list(usable[name]))
    monkeypatch.setattr(dispatch, "_only_by_name", lambda *_: [])
    assert chosen() == dispatch.AUTO_ORDER[0]
    usable[dispatch.AUTO_ORDER[0]].append("it can't")
    assert chosen() == dispatch.AUTO_ORDER[1]
    assert not said()
    usable[dispatch.AUTO_ORDER[1]].append("nor can it")
    assert chosen() == "reference"
    assert "it can't" in said()[0] and "nor can it" in said()[0]


def test_auto_builds_nothing_where_the_extension_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "AUTO_ORDER", ("cuda", "triton", "reference"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch.extension, "load", lambda: pytest.fail("built"))
    monkeypatch.setattr(dispatch.extension, "why_not", list)
    monkeypatch.setattr(dispatch.extension, "device", lambda: None)
    for ready, expected in ((False, "triton"), (True, "cuda")):
        monkeypatch.setattr(dispatch.extension, "ready", lambda ready=ready: ready)
        assert dispatch.resolve("auto", torch.device("cuda"), torch.float32) == expected


def test_the_reference_asked_for_is_not_announced(said: Callable[[], list[str]]) -> None:
    sample("reference")
    with use_backend("reference"):
        sample()
    assert not said()


def test_environment_variable(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    monkeypatch.setenv("STVIT_BACKEND", "reference")
    assert chosen() == "reference" and not said()
    monkeypatch.setenv("STVIT_BACKEND", "triton")
    with pytest.raises(BackendError, match="triton"):
        sample()
    assert sample("reference").isfinite().all()  # the argument comes first
    with use_backend("reference"):  # then the context
        assert chosen() == "reference"
    monkeypatch.setenv("STVIT_BACKEND", "auto")
    assert chosen() == "reference" and len(said()) == 1
    monkeypatch.setenv("STVIT_BACKEND", "")
    assert chosen() == "reference"
    monkeypatch.setenv("STVIT_BACKEND", "tritn")
    with pytest.raises(ValueError, match="STVIT_BACKEND.*triton.*'tritn'"):
        sample()


def test_use_backend_nests_and_ends_with_its_block() -> None:
    assert dispatch.default_backend() == "auto"
    with use_backend("reference"):
        assert dispatch.default_backend() == "reference"
        with use_backend("triton"):
            assert dispatch.default_backend() == "triton"
            with use_backend("auto"):
                assert dispatch.default_backend() == "auto"
            assert dispatch.default_backend() == "triton"
        assert dispatch.default_backend() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("triton"):
            raise ZeroDivisionError
        assert dispatch.default_backend() == "reference"
        with pytest.raises(ValueError), use_backend("nothing"):
            pass
        assert dispatch.default_backend() == "reference"
    assert dispatch.default_backend() == "auto"


@pytest.mark.parametrize("name", ["Triton", "", "gpu", "tritn"])
def test_unknown_names(name: str) -> None:
    for call in (lambda: sample(name), lambda: token_upsampling(*refined(), name)):
        with pytest.raises(ValueError, match=f"^backend: expected one of auto, .*reference.*{name!r}"):
            call()
    with pytest.raises(ValueError, match="^use_backend: expected one of"), use_backend(name):
        pass


@pytest.mark.parametrize("name", [None, 3, torch.device("cuda")])
def test_names_that_are_no_strings(name: object) -> None:
    for call in (lambda: sample(name), lambda: token_upsampling(*refined(), name)):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="^backend: expected a str"):
            call()
    with pytest.raises(TypeError, match="^use_backend: expected a str"), use_backend(name):  # type: ignore[arg-type]
        pass


def test_tensors_on_the_cpu_are_answered_without_a_look_at_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.extension, "why_not", lambda: pytest.fail("looked for the extension"))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("initialised CUDA"))
    assert chosen() == "reference"


def test_the_rest_of_the_block_beside_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_extension_missing", lambda *_: [])
    monkeypatch.setattr(dispatch.extension, "load", lambda: None)
    assert dispatch.choose("cuda", torch.zeros(1)) == "cuda"
    assert dispatch.choose_for_block("cuda", torch.zeros(1)) == "reference"
    monkeypatch.setattr(dispatch, "_triton_missing", lambda device: [])
    assert dispatch.choose_for_block("cuda", torch.zeros(1)) == "triton"
    assert dispatch.choose_for_block("reference", torch.zeros(1)) == "reference"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu_runs_kernels(said: Callable[[], list[str]]) -> None:
    x = torch.zeros(1, device="cuda")
    assert dispatch.choose("auto", x) in ("triton", "cuda")
    assert available_backends()["triton"] == []
    assert not said()
