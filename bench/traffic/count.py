"""Counts what a training step, or a forward pass, moves without running it: the ops run over fake tensors.

The tensors claim to be on a GPU, so that the ops, memory formats and autocast rules are those of CUDA; none is needed.
"""

from __future__ import annotations

import re
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.calls import watched
from bench.harness.categories import of_module
from bench.traffic.fake import backward, cuda_autocast, fake_gpu, triton_launches
from bench.traffic.per_op import Traffic, arguments, category, nbytes, traffic

BLOCK = re.compile(r"layers\.\d+\.(?:blocks\.\d+|downsample)|patch_embed")


class Scope(NamedTuple):
    """Where an op runs: the block, and the category that the innermost module with one gives."""

    block: str
    hint: str | None


class Key(NamedTuple):
    """What traffic is added up by."""

    phase: str  # forward, backward
    block: str
    category: str
    op: str


class Launched(NamedTuple):
    """One launch of a Triton kernel, its arguments fake tensors and numbers."""

    phase: str
    op: str
    kernel: Any
    grid: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Counted(NamedTuple):
    """One training step: traffic of each call of an op or launch of ours, bytes saved for the backward, images of the
    batch, launches of Triton's."""

    calls: list[tuple[Key, Traffic]]
    saved: int
    batch: int
    launches: list[Launched]

    @property
    def rows(self) -> dict[Key, Traffic]:
        return added_up(self.calls)

    def total(self) -> Traffic:
        return reduce(Traffic.plus, (moved for _, moved in self.calls), Traffic())


def added_up(calls: Iterable[tuple[Key, Traffic]]) -> dict[Key, Traffic]:
    rows: dict[Key, Traffic] = {}
    for key, moved in calls:
        rows[key] = rows.get(key, Traffic()).plus(moved)
    return rows


OUTSIDE = Scope("head and loss", None)


class Counter(TorchDispatchMode):
    """Adds up the traffic of every op within, forward or backward.

    Our Triton ops are taken apart: their own Python runs, on fake tensors, and each kernel that it would launch reads
    or writes each of its tensors once. So workspace and second readings count, and every launch does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Key, Traffic]] = []
        self.launches: list[Launched] = []
        self.phase = "forward"
        self.scope = OUTSIDE
        self.within: tuple[str, str] | None = None  # category and name of the Triton op that is taken apart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = arguments(func, args, kwargs)
        named = category(func, given, self.scope.hint), func._schema.name.removeprefix("aten::")
        if func.namespace == "stvit" and given["backend"] == "triton":
            self.within = named
            with self, triton_launches(self._launched):
                output = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            self.within = None
            return output
        output = func(*args, **kwargs)
        moved = traffic(func, args, kwargs, output)
        if moved is not None:
            self._add(moved, *(self.within or named))
        return output

    def _launched(self, kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert self.within is not None
        self.launches.append(Launched(self.phase, self.within[1], kernel, grid, args, options))
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        unused = [name for name, flag in SPARE.get(kernel.__name__, {}).items() if not given[flag]]
        distinct = {id(t): nbytes(t) for name, t in given.items() if isinstance(t, Tensor) and name not in unused}
        self._add(Traffic(moved=sum(distinct.values()), kernels=1), *self.within)

    def _add(self, moved: Traffic, found: str, op: str) -> None:
        self.calls.append((Key(self.phase, self.scope.block, found, op), moved))


# Kernel -> pointer -> flag without which the kernel is given that pointer but doesn't use it. A pointer that repeats
# another one of the launch needs no entry.
SPARE = {"fold_kernel": {"partial_mass": "MASS", "mass": "MASS"}}


class Scopes:
    """Keeps a counter's scope up to date in the forward, and tells the scope of each autograd node afterwards.

    Nodes are numbered in the order in which they are made; the numbers at which the scope changed say whose each is.
    """

    def __init__(self, model: nn.Module, counter: Counter) -> None:
        self.counter = counter
        self.stack = [OUTSIDE]
        self.changes: list[int] = [0]
        self.scopes = [OUTSIDE]
        self.names = {module: name for name, module in model.named_modules()}

    def kept(self) -> AbstractContextManager[None]:
        """Within the block the scope follows the model's calls."""
        return watched(self.names, self._enter, self._leave)

    def of(self, node: Any) -> Scope:
        return self.scopes[bisect_right(self.changes, node._sequence_nr()) - 1]

    def _enter(self, name: str, module: nn.Module) -> None:
        block = BLOCK.match(name)
        hint = of_module(module) or self.stack[-1].hint
        self.stack.append(Scope(block.group() if block else OUTSIDE.block, hint))
        self._changed()

    def _leave(self) -> None:
        self.stack.pop()
        self._changed()

    def _changed(self) -> None:
        self.counter.scope = self.stack[-1]
        self.changes.append(_get_sequence_nr())
        self.scopes.append(self.stack[-1])


def count(
    build: Callable[[], nn.Module], batch: int, size: int, dtype: torch.dtype, *,
    inference: bool = False, autocast: bool = False, channels_last: bool = True,
) -> Counted:  # fmt: skip
    """Counts one training step of the model that `build` returns, on images (batch, 3, size, size).

    inference=True: one forward in evaluation mode instead. autocast=False: activations and weights in `dtype`. True:
    float32 weights under autocast to `dtype`. A step is forward, loss and backward.
    """
    built = _on_fake_gpu(lambda: build().train(not inference), batch, size, dtype, autocast, channels_last)
    with built as (model, images, counter, scopes):
        if inference:
            with counter, cuda_autocast(dtype if autocast else None), torch.no_grad():
                model(images)
            return Counted(counter.calls, 0, batch, counter.launches)
        labels = torch.zeros(batch, dtype=torch.long, device="cuda")
        saved = Saved(model)
        with counter, cuda_autocast(dtype if autocast else None), saved.hooks():
            loss = F.cross_entropy(model(images), labels)
        held_bytes = saved.total()
        with counter, torch.no_grad():
            counter.phase = "backward"
            backward(loss, lambda node: setattr(counter, "scope", scopes.of(node)))
    return Counted(counter.calls, held_bytes, batch, counter.launches)


@contextmanager
def _on_fake_gpu(
    build: Callable[[], nn.Module], batch: int, size: int, dtype: torch.dtype, autocast: bool, channels_last: bool
) -> Iterator[tuple[nn.Module, Tensor, Counter, Scopes]]:
    """The model, its images, and what counts its ops."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    held = torch.float32 if autocast else dtype
    with torch.device("meta"):
        model = build().to(held)
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
    counter = Counter()
    scopes = Scopes(model, counter)
    with fake_gpu():
        model.to_empty(device="cuda")
        images = torch.empty((batch, 3, size, size), dtype=held, device="cuda", memory_format=memory_format)
        with scopes.kept():
            yield model, images, counter, scopes


class Saved:
    """What autograd holds for the backward. A node that nothing leads to dies, and what it held with it."""

    class Holder:
        """Lives as long as the node that saved the tensor."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self, model: nn.Module) -> None:
        self.own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.holders: weakref.WeakSet[Saved.Holder] = weakref.WeakSet()

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda holder: holder.tensor)

    def total(self) -> int:
        """Bytes of the storages held, each once; those of parameters and buffers not counted."""
        storages = [holder.tensor.untyped_storage() for holder in self.holders]
        return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in self.own}.values())

    def _pack(self, tensor: Tensor) -> Saved.Holder:
        holder = Saved.Holder(tensor.detach())  # an output that kept its node alive would never die
        self.holders.add(holder)
        return holder
