"""How an op is registered with torch.library, and where each backend keeps its kernels.

Every backend with kernels of its own implements the same ops, told apart by their last argument, so autograd, fake
kernels and tests are written once. An op's file holds its parts side by side: what runs, what it answers on fake
tensors, and its gradient. The reference needs no op: autograd and torch.compile see through plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from . import extension

KERNELS = {"triton": "kernels"}  # backend -> the package, beside this one, that holds its kernels
SUPER_TOKEN_OPS: list[str] = []  # names of the ops of super token attention, which every backend implements
BLOCK_OPS: list[str] = []  # names of the ops of the rest of the block, which the extension leaves to others


@functools.cache
def kernels(backend: str, op: str) -> Any:
    """What holds a backend's kernels for an op and its backward: a module, or torch.ops.stvit_cuda."""
    if backend == "cuda":
        extension.load()
        return torch.ops.stvit_cuda
    return importlib.import_module(f"..{KERNELS[backend]}.{op}", __package__)


def register(
    names: list[str],
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines the op stvit::`name` for every device and adds it to `names`.

    The schema is that of `run`'s annotations. `setup` saves for `backward`; the gradient of an op without them is an
    error, not a result that leaves the op out.
    """
    schema = torch.library.infer_schema(run, mutates_args=())
    torch.library.define(f"stvit::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"stvit::{name}", "default", run)
    torch.library.register_fake(f"stvit::{name}", fake)
    torch.library.register_autograd(f"stvit::{name}", backward or _refuse_second, setup_context=setup)
    names.append(name)


def _refuse_second(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("kernels of stvit have no second derivative: use backend='reference' for a double backward")
