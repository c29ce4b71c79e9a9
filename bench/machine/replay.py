"""Launches of a step, recorded on fake tensors, as calls that can be made again on memory of the same shape."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.machine.launch import Launch, emulated
from bench.traffic.count import Launched

PATTERN = 1 << 18  # random numbers that memory is filled with, again and again
ALIGNED = 512  # bytes, as PyTorch's allocations on a GPU are


class TensorLike(NamedTuple):
    """A tensor's shape and place; tensors of one call with the same `storage` share their memory."""

    storage: int
    size: int  # bytes of the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Recorded(NamedTuple):
    """A launch that can be sent to another process. Launches that are equal cost the same."""

    phase: str
    op: str
    module: str
    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # TensorLike, numbers, types
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        return repr(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the largest image: pixels (B, C, H, W)."""
        images = [a.shape for a in self.arguments if isinstance(a, TensorLike) and len(a.shape) == 4]
        return max(images, key=lambda shape: torch.Size(shape).numel(), default=())


def record(launched: Launched) -> Recorded:
    storages: dict[int, int] = {}

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        number = storages.setdefault(storage._cdata, len(storages))
        place = tuple(value.shape), tuple(value.stride()), int(value.storage_offset())
        return TensorLike(number, storage.nbytes(), *place, value.dtype)

    function = launched.kernel.fn
    return Recorded(
        phase=launched.phase,
        op=launched.op.removeprefix("stvit::"),
        module=function.__module__,
        kernel=function.__name__,
        grid=tuple(map(int, launched.grid)),
        arguments=tuple(map(plain, launched.arguments)),
        options=tuple(sorted(launched.options.items())),
    )


def replay(recorded: Recorded, capability: int, images: int) -> tuple[Launch, float]:
    """Executes the blocks of the first image of so many, profiled; and how many times as many blocks there are.

    Memory that no block touches takes address space alone. What the first image touches holds random numbers.
    """
    filled: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, TensorLike):
            return value
        if value.storage not in filled:
            filled[value.storage] = _memory(value.size, value.dtype, images)
        return filled[value.storage].view(value.dtype).as_strided(value.shape, value.stride, value.offset)

    arguments = [real(value) for value in recorded.arguments]
    kernel = getattr(importlib.import_module(recorded.module), recorded.kernel)
    sampled = 0

    def sample(blocks: int) -> int:
        nonlocal sampled
        sampled = -(-blocks // images)
        return sampled

    with emulated(capability, profile=True, sample=sample) as launches:
        kernel[recorded.grid](*arguments, **dict(recorded.options))
    return launches[0], launches[0].grid / sampled


def _memory(size: int, dtype: torch.dtype, images: int) -> Tensor:
    """Bytes, of which those of the first two images, and small tensors whole, are random numbers of a dtype."""
    room = np.empty(size + ALIGNED, np.uint8)  # torch.empty may fill it, where tests ask for that
    first = -room.ctypes.data % ALIGNED
    whole = torch.from_numpy(room[first : first + size])
    used = whole[: size if size < 1 << 20 else 2 * size // images // 64 * 64]
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)).to(dtype).view(torch.uint8)
    for start in range(0, len(used), len(pattern)):
        part = used[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])
    return whole
