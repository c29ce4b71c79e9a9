"""Dtypes, memory formats and allocation: how pixels (B, C, H, W) and weights (B, 9, H, W) lie in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.autograd.forward_ad
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on for x's device, else x's own; float64 stays, as with torch's own ops."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast asks for."""
    return x.to(autocast_dtype(x))


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off for x's device (meta has none); no block where it is off, so that no exported graph holds one."""
    on = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if on else nullcontext()


def transformed() -> bool:
    """Whether a transform of torch.func (grad, jacrev, vmap, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a (B, C, H, W) tensor lie next to each other in memory.

    Decided by strides alone so that slices of a channels_last tensor count too.
    """
    return x.stride(1) == 1 and x.stride(3) != 1


def memory_format(channels_last: bool) -> torch.memory_format:
    """The torch.memory_format that an output is allocated in."""
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """x in the memory format asked for, copied only where it isn't; as it is under vmap, which knows no formats."""
    return (
        x if torch._C._are_functorch_transforms_active() else x.contiguous(memory_format=memory_format(channels_last))
    )


def empty_pixels(
    like: Tensor, channels: int, height: int, width: int, channels_last: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised (B, channels, height, width) tensor in the memory format and dtype (of `like`) asked for."""
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last))


def empty_like_pixels(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of x's shape and memory format, in `dtype`, else x's own."""
    return empty_pixels(x, x.shape[1], x.shape[2], x.shape[3], is_channels_last(x), dtype)


def empty_weights(x: Tensor) -> Tensor:
    """Uninitialised weights (B, 9, H, W) for pixels x, with memory (B, H, W, 9)."""
    return x.new_empty((x.shape[0], x.shape[2], x.shape[3], 9)).permute(0, 3, 1, 2)


def by_pixel(weights: Tensor) -> Tensor:
    """Weights (B, 9, H, W) with memory (B, H, W, 9), copied only where someone else made them otherwise.

    Hooks of saved tensors do too: torch.autograd.graph.save_on_cpu(pin_memory=True) forgets strides.
    """
    return weights.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
