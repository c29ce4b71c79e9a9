"""How an op is registered with torch.library, and where each backend keeps its kernels.

Every backend with kernels of its own implements the same ops, told apart by their last argument, so autograd, fake
kernels and tests are written once. An op's file holds its parts side by side: what runs, what it answers on fake
tensors, and its gradient. The reference needs no op: autograd and torch.compile see through plain PyTorch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from . import extension

NAMESPACE = "stvit"  # of the ops in torch.ops; a copy of the package beside this one has another (hub_kernel.py)
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


class Ops:
    """The ops by name, called the shortest way: `ops.sampling(x, ...)`.

    torch.ops.stvit.sampling does the same for everyone. Its way through PyTorch's dispatcher and the autograd that
    torch.library generates costs the host as much as the kernels' launches; an autograd.Function of the same parts
    needs a third of that. Where somebody looks at ops (the compiler, modes, subclasses of Tensor, tracers, the
    profiler) they are what is called.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"no op {name} is registered")


ops: Any = Ops()


def _unseen(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody but autograd looks at a call with these arguments."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(value, Tensor) and _watched(value) for value in arguments)
    )


def _watched(x: Tensor) -> bool:
    """Whether x is more than its data: of a subclass, batched, as gradients are under is_grads_batched=True, or with a
    sign or zeros that are not in memory."""
    return (
        type(x) not in (Tensor, nn.Parameter)
        or torch._C._functorch.is_legacy_batchedtensor(x)
        or x.is_neg()
        or x._is_zerotensor()
    )


def _direct(
    run: Callable[..., Any], setup: Callable[..., None] | None, backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The op as an autograd.Function: what torch.library makes of the same parts, without the dispatcher."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            if setup is not None:
                setup(ctx, arguments, output)
            return output

    Direct.backward = staticmethod(backward)  # type: ignore[method-assign]
    return Direct


def register(
    names: list[str],
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    changes: tuple[str, ...] = (),
) -> None:
    """Defines the op NAMESPACE::`name` for every device, adds it to `names` and makes it an attribute of `ops`.

    The schema is that of `run`'s annotations. `setup` saves for `backward`; the gradient of an op without them is an
    error, not a result that leaves the op out. `flops` tells PyTorch's FlopCounterMode, which hands it `run`'s
    arguments with shapes in the place of tensors, what it counts of the reference: products of matrices, convolutions.
    `changes` names the arguments that are written in place; such an op has no gradient.
    """
    schema = torch.library.infer_schema(run, mutates_args=changes)
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"{NAMESPACE}::{name}", "default", run)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    if not changes:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward or _refuse_second, setup_context=setup)
    names.append(name)
    op, direct = getattr(getattr(torch.ops, NAMESPACE), name), _direct(run, setup, backward or _refuse_second)
    if flops is not None and find_spec("triton"):  # without it the ops can't run, and PyTorch's counter logs a warning
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(op)(flops)

    def call(*arguments: Any) -> Any:
        if not _unseen(arguments):
            return op.default(*arguments)
        return direct.apply(*arguments) if torch.is_grad_enabled() else run(*arguments)

    setattr(ops, name, call)


def _refuse_second(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("kernels of stvit have no second derivative: use backend='reference' for a double backward")
