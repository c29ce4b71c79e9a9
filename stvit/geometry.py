"""Tiles, grid and padding of super tokens, and every check of user input.

A super token covers a tile of h x w pixels. An image of H x W pixels is padded right and bottom with zeros to
gh*h x gw*w, which gives a grid of gh x gw super tokens. Every input error of the public functions is raised here,
before anything is launched.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Association(NamedTuple):
    """How much of each pixel belongs to each super token of its 3 x 3 neighbourhood (paper, section 3.2, eq. 3).

    weights:       (B, 9, H, W), the input's dtype; entry k is the weight of the grid neighbour at row offset
                   ``k // 3 - 1`` and column offset ``k % 3 - 1``. A view: memory holds (B, H, W, 9).
    mass:          (B, 1, gh, gw), float32 (float64 for float64 input); the sum of the weights that each super token
                   receives, padded pixels included.
    stoken_size:   (h, w), pixels a tile.
    channels_last: whether the sampled tensor was in channels_last; upsampling answers in the same format.
    """

    weights: Tensor
    mass: Tensor
    stoken_size: tuple[int, int]
    channels_last: bool


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grid_size(height: int, width: int, stoken_size: tuple[int, int]) -> tuple[int, int]:
    """(gh, gw): the number of tiles down and across, the last ones possibly padded."""
    h, w = stoken_size
    return (height + h - 1) // h, (width + w - 1) // w


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a (B, C, H, W) tensor lie next to each other in memory.

    Decided by strides alone so that slices of a channels_last tensor count too.
    """
    return x.stride(1) == 1 and x.stride(3) != 1


def memory_format(channels_last: bool) -> torch.memory_format:
    """The torch.memory_format that an output is allocated in."""
    return torch.channels_last if channels_last else torch.contiguous_format


def stoken_pair(stoken_size: Any, name: str = "stoken_size") -> tuple[int, int]:
    """The tile as a pair (h, w) from an int or a pair; TypeError or ValueError naming the argument otherwise."""
    if isinstance(stoken_size, (tuple, list, torch.Size)):
        if len(stoken_size) != 2:
            raise ValueError(f"{name}: expected an int or a pair (h, w), got {stoken_size!r}")
        return _positive_int(stoken_size[0], name), _positive_int(stoken_size[1], name)
    side = _positive_int(stoken_size, name)
    return side, side


def _positive_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or isinstance(value, float):
        raise TypeError(f"{name}: expected a positive int, got {value!r} of type {type(value).__name__}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected a positive int, got {value!r} of type {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name}: expected a positive int, got {number}")
    return number


def check_pixels(x: Any, name: str = "x") -> None:
    """(B, C, H, W), a floating dtype, C, H and W at least 1; B may be 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape (B, C, H, W), got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions (B, C, H, W), got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}: expected one of the dtypes {names}, got {str(x.dtype).removeprefix('torch.')}")
    if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name}: expected at least one channel, row and column, got shape {tuple(x.shape)}")


def check_sampling(x: Any, stoken_size: Any, n_iter: Any, scale: Any) -> tuple[tuple[int, int], int, float]:
    """The checked (stoken_size, n_iter, scale) of super_token_sampling; ``scale=None`` is C ** -0.5."""
    check_pixels(x)
    tile = stoken_pair(stoken_size)
    iterations = _positive_int(n_iter, "n_iter")
    if scale is None:
        return tile, iterations, x.shape[1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float or None (C ** -0.5), got {scale!r} of type {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite float, got {scale!r}")
    return tile, iterations, float(scale)


def check_upsampling(stokens: Any, association: Any, residual: Any = None) -> None:
    """That super tokens and association have one grid, batch and device, and a residual the shape of the result."""
    check_pixels(stokens, "stokens")
    if not isinstance(association, Association):
        raise TypeError(
            "association: expected the Association that super_token_sampling returned, "
            f"got {type(association).__name__}"
        )
    weights, mass, stoken_size, _ = association
    check_pixels(weights, "association.weights")
    check_pixels(mass, "association.mass")
    tile = stoken_pair(stoken_size, "association.stoken_size")
    batch, nine, height, width = weights.shape
    if nine != 9:
        raise ValueError(f"association.weights: expected shape (B, 9, H, W), got {tuple(weights.shape)}")
    expected = (batch, *grid_size(height, width, tile))
    for name, tensor in (("stokens", stokens), ("association.mass", mass)):
        if (tensor.shape[0], *tensor.shape[2:]) != expected:
            raise ValueError(
                f"{name}: expected batch and grid {expected} for association.weights of shape "
                f"{tuple(weights.shape)} and tiles of {tile[0]} x {tile[1]}, got shape {tuple(tensor.shape)}"
            )
        if tensor.device != weights.device:
            raise ValueError(
                f"{name}: expected the device of association.weights, {weights.device}, got {tensor.device}"
            )
    if residual is not None:
        check_matching(residual, "residual", stokens, (batch, stokens.shape[1], height, width), "stokens")


def check_matching(tensor: Any, name: str, x: Tensor, shape: tuple[int, ...], x_name: str = "x") -> None:
    """That a tensor has the shape expected, a floating dtype, and lies on the device of x."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape {shape}, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape} for {x_name} of shape {tuple(x.shape)}, got {tuple(tensor.shape)}"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: expected a floating dtype, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected the device of {x_name}, {x.device}, got {tensor.device}")


def check_branch(x: Any, y: Any, gamma: Any, keep: Any) -> None:
    """That stream x and branch y have one shape and device, and gamma (C,) and keep (B,) fit them."""
    check_pixels(x)
    check_pixels(y, "y")
    check_matching(y, "y", x, tuple(x.shape))
    for tensor, name, count in ((gamma, "gamma", x.shape[1]), (keep, "keep", x.shape[0])):
        if tensor is not None:
            check_matching(tensor, name, x, (count,))


def check_depthwise(x: Any, weight: Any, bias: Any, gelu: Any) -> None:
    """That pixels x have a weight (C, 1, 3, 3) and a bias (C,) or None, and that gelu is a bool."""
    if not isinstance(gelu, bool):
        raise TypeError(f"gelu: expected a bool, got {gelu!r} of type {type(gelu).__name__}")
    check_pixels(x)
    check_matching(weight, "weight", x, (x.shape[1], 1, 3, 3))
    if bias is not None:
        check_matching(bias, "bias", x, (x.shape[1],))


def check_norm(x: Any, weight: Any, bias: Any, eps: Any) -> float:
    """That pixels x have a weight (C,) and a bias (C,); eps as a float."""
    check_pixels(x)
    check_matching(weight, "weight", x, (x.shape[1],))
    check_matching(bias, "bias", x, (x.shape[1],))
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {eps!r} of type {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: expected a finite float of at least 0, got {eps!r}")
    return float(eps)
