"""The choice of a backend: which can run, why the others can't, and saying so once.

An explicit ``backend=`` argument comes first, then `use_backend`, then the environment variable STVIT_BACKEND, then
"auto": the first of AUTO_ORDER that can run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from ..checks import shown
from ..tensors import DTYPES, transformed
from . import extension

BACKENDS = ("cuda", "triton", "reference")
AUTO_ORDER = ("triton", "cuda", "reference")  # Triton first until a GPU has timed both: docs/benchmarks.md

NO_TRANSFORMS = (
    "kernels run neither under the transforms of torch.func (grad, jacrev, vmap, jvp, ...) nor in forward-mode "
    "differentiation; backend='reference' does"
)

NO_DTENSORS = "kernels take no DTensor, whose parts they don't know; backend='reference' does"

logger = logging.getLogger("stvit")
Function = TypeVar("Function", bound=Callable[..., Any])
_told: set[str] = set()
_used: str | None = None


class BackendError(RuntimeError):
    """A backend was asked for by name and can't run; the message lists every reason."""


def check_backend(name: object, argument: str = "backend") -> str:
    """`name` if it is "auto" or one of BACKENDS; TypeError or ValueError naming `argument` otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a str, got {shown(name)}")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def default_backend() -> str:
    """What "auto" stands for at the moment: `use_backend`, else STVIT_BACKEND, else "auto"."""
    if _used is not None:
        return _used
    return check_backend(os.environ.get("STVIT_BACKEND") or "auto", "STVIT_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every call whose backend is "auto" uses `name`. Process-wide, not per thread.

    Raises ValueError for an unknown name. A function compiled by torch.compile keeps the backend it was traced with.
    """
    global _used
    before, _used = _used, check_backend(name, "use_backend")
    try:
        yield
    finally:
        _used = before


def available_backends() -> dict[str, list[str]]:
    """For each backend the reasons why it can't run on this machine; an empty list means that it can."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return {name: why_not(name, device) for name in BACKENDS}


def why_not(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
    """The reasons why `backend` can't run on tensors of this device and dtype; an empty list means that it can.

    Builds nothing: an extension that `prepare` would build counts as one that can run.
    """
    if backend == "reference":
        return []
    reasons = _triton_missing(device) if backend == "triton" else _extension_missing(device)
    if dtype is not None and dtype not in DTYPES:
        reasons.append(f"no kernel for {dtype}")
    return reasons


def prepare(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> list[str]:
    """As `why_not`, after building what the backend lacks: the one place where a call may compile the extension."""
    reasons = why_not(backend, device, dtype)
    if backend == "cuda" and not reasons:
        try:
            extension.load()
        except extension.ExtensionError as error:
            return [str(error)]
    return reasons


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), which works on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _triton_missing(device: torch.device) -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["the package triton is not installed"]
    return [] if interpreting() else _gpu_missing(device)


def _extension_missing(device: torch.device) -> list[str]:
    if extension.device() == "cpu":
        return [] if device.type == "cpu" else [f"the extension in use runs on the CPU, got tensors on {device.type}"]
    reasons = _gpu_missing(device)
    if reasons:  # which no extension changes, and looking for one initialises CUDA
        return reasons
    return extension.why_not() or extension.no_code(torch.cuda.get_device_capability(device))


def _gpu_missing(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"it needs tensors on a CUDA device, got {device.type}"]
    if torch.version.hip is not None:
        return ["it is built and tested for NVIDIA GPUs, this torch is built for ROCm"]
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return [f"it needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"]
    return []


def _only_by_name(backend: str, device: torch.device) -> list[str]:
    """The reasons why "auto" doesn't take a backend that can run."""
    if backend == "triton" and interpreting() and device.type == "cpu":
        return ["Triton's interpreter runs only when asked for by name"]
    if backend == "cuda" and device.type == "cpu":
        return ["an extension for the CPU runs only when asked for by name"]
    if backend == "cuda" and not extension.ready():
        return ['it is not built yet, backend="cuda" builds it']
    return []


def _constant(function: Function) -> Function:
    """As torch.compiler.assume_constant_result, which imports torch._dynamo: that takes as long as all of torch."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: `backend` itself, or for "auto" the first of AUTO_ORDER without a reason against it.

    Raises BackendError, listing every reason, when a backend named explicitly can't run.
    """
    if backend != "auto":
        reasons = prepare(backend, device, dtype)
        if reasons:
            raise BackendError(f"backend={backend!r} can't run: {'; '.join(reasons)} (see python -m stvit.info)")
        return backend
    refused = []
    for name in AUTO_ORDER:
        reasons = why_not(name, device, dtype) or _only_by_name(name, device)
        if not reasons:
            break
        refused.append(f"{name}: {'; '.join(reasons)}")
    if name == "reference":
        _say_once(" | ".join(refused))
    return name


@_constant
def _say_once(reasons: str) -> None:
    if reasons not in _told:
        _told.add(reasons)
        logger.warning("backend 'auto' falls back to the PyTorch reference (%s)", reasons)


def _beyond_kernels(tensor: torch.Tensor) -> str:
    """Why no kernel may run for this tensor, whatever the machine; empty where one may."""
    if transformed():
        return NO_TRANSFORMS
    return NO_DTENSORS if type(tensor).__name__ == "DTensor" else ""


def choose(backend: str, tensor: torch.Tensor) -> str:
    """The backend that runs a call with this `backend` argument on `tensor`; raises as `resolve` does.

    Where PyTorch would silently leave the kernels out of a derivative, or has no rule for them, the reference runs, as
    it does on the meta device, which has shapes alone.
    """
    if check_backend(backend) == "auto":
        backend = default_backend()
    if backend == "reference" or tensor.is_meta:
        return "reference"
    if reason := _beyond_kernels(tensor):
        if backend != "auto":
            raise BackendError(f"backend={backend!r} can't run: {reason}")
        _say_once(reason)
        return "reference"
    return resolve(backend, tensor.device, tensor.dtype)


@_constant
def _beside_the_extension(device: torch.device, dtype: torch.dtype) -> str:
    return "reference" if why_not("triton", device, dtype) or _only_by_name("triton", device) else "triton"


def choose_for_block(backend: str, tensor: torch.Tensor) -> str:
    """The backend that runs an op of the rest of the block; raises as `resolve` does.

    The extension holds super token sampling and upsampling alone. Beside it, the rest runs on Triton where that can run
    and else on the reference.
    """
    name = choose(backend, tensor)
    return _beside_the_extension(tensor.device, tensor.dtype) if name == "cuda" else name
