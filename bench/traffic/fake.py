"""A training step on fake tensors that claim to be on a GPU: autocast, backward, launches of Triton kernels.

PyTorch's fake tensors stop short of a training step where there is no driver; each part here bridges one such gap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from stvit.backends import dispatch


class FusedAttention(TorchFunctionMode):
    """Without a driver PyTorch can't tell that a fused kernel would run, and writes attention out: so it is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _fused_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    if q.element_size() == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, False, False, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout_p, False, scale=scale)[0]


def _convolution_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """cuDNN's rule, which PyTorch doesn't apply to 16-bit numbers where it finds no GPU."""
    channels_last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if channels_last else torch.contiguous_format


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Within, tensors on "cuda" are fake, and every backend can run: nothing does."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FusedAttention(),
        mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _convolution_format),
        mock.patch.object(dispatch, "why_not", lambda *_: []),
        mock.patch.object(dispatch, "prepare", lambda *_: []),
    ):
        yield


@contextmanager
def cuda_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast("cuda", dtype), which turns itself off where there is no driver; None for none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


@contextmanager
def triton_launches(launched: Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Within, a launch of a Triton kernel calls `launched` with the kernel, its grid, its arguments and its options,
    and does nothing else."""
    from triton.runtime.jit import KernelInterface

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: launched(kernel, grid, args, options)

    with (
        mock.patch.object(KernelInterface, "__getitem__", launch),
        mock.patch.object(torch.cuda, "device_of", lambda tensor: nullcontext()),
    ):
        yield


def backward(root: Tensor, enter: Callable[[Any], None] = lambda node: None) -> dict[Tensor, Tensor]:
    """The gradients of a scalar with respect to the leaves, by a walk over its graph in Python.

    PyTorch's own engine asks the driver for a context before it runs a node of a CUDA tensor, even of a fake one. This
    does what that one does: latest node first, gradients that meet are added, broadcast and cast ones are reduced and
    cast back. `enter(node)` is called before each node.
    """
    assert root.grad_fn is not None
    gradients: dict[Any, dict[int, Tensor]] = {root.grad_fn: {0: torch.ones_like(root)}}
    waiting = _incoming(root.grad_fn)
    ready = [(0, 0, root.grad_fn)]
    leaves: dict[Tensor, Tensor] = {}
    while ready:
        node = heapq.heappop(ready)[2]
        enter(node)
        given = gradients.pop(node, {})
        for (target, index), gradient in _run(node, given):
            if gradient is not None:
                _add(gradients.setdefault(target, {}), index, gradient, target._input_metadata[index])
            waiting[target] -= 1
            if waiting[target] > 0:
                continue
            if hasattr(target, "variable"):
                leaves.update((target.variable, gradient) for gradient in gradients.pop(target, {}).values())
            else:
                heapq.heappush(ready, (-target._sequence_nr(), id(target), target))
    return leaves


def _incoming(root: Any) -> dict[Any, int]:
    """How many edges lead to each node below `root`."""
    edges: dict[Any, int] = {}
    seen, stack = {root}, [root]
    while stack:
        for target, _ in stack.pop().next_functions:
            if target is None:
                continue
            edges[target] = edges.get(target, 0) + 1
            if target not in seen:
                seen.add(target)
                stack.append(target)
    return edges


def _run(node: Any, given: dict[int, Tensor]) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """Edges of `node` with the gradient that flows along each."""
    edges = list(node.next_functions)
    if not given:
        return [(edge, None) for edge in edges if edge[0] is not None]
    incoming = [given.get(index) for index in range(len(node._input_metadata))]
    if hasattr(node, "apply"):  # written in Python: it answers for every argument, tensor or not
        results = [r for r, needed in zip(_tuple(node.apply(*incoming)), node.needs_input_grad, strict=True) if needed]
        return list(zip([edge for edge in edges if edge[0] is not None], results, strict=True))
    return [(e, r) for e, r in zip(edges, _tuple(node(*incoming)), strict=True) if e[0] is not None]


def _tuple(values: Any) -> tuple[Tensor | None, ...]:
    return values if isinstance(values, tuple) else (values,)


def _add(sums: dict[int, Tensor], index: int, gradient: Tensor, expected: Any) -> None:
    if gradient.shape != expected.shape:
        gradient = gradient.sum_to_size(expected.shape)
    if gradient.dtype != expected.dtype:
        gradient = gradient.to(expected.dtype)
    sums[index] = gradient if index not in sums else sums[index] + gradient
