"""Every check of user input: each error names the argument and what was expected, before anything is launched."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from .geometry import Association, grid_size
from .tensors import DTYPES


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


def check_images(x: Tensor, in_chans: int) -> None:
    """Raises TypeError or ValueError unless x is what a model with this number of input channels takes."""
    check_pixels(x)
    if x.shape[1] != in_chans:
        raise ValueError(f"x: expected {in_chans} channels (in_chans), got shape {tuple(x.shape)}")


def check_sampling(x: Any, stoken_size: Any, n_iter: Any, scale: Any) -> tuple[tuple[int, int], int, float]:
    """The checked (stoken_size, n_iter, scale) of super_token_sampling; ``scale=None`` is C ** -0.5."""
    check_pixels(x)
    tile = stoken_pair(stoken_size)
    iterations = _positive_int(n_iter, "n_iter")
    if scale is None:
        return tile, iterations, x.shape[1] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float or None (C ** -0.5), got {scale!r} of type {type(scale).__name__}")
    if not -math.inf < scale < math.inf:
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


def check_branch(x: Any, y: Any, gamma: Any, keep: Any, bias: Any) -> None:
    """That stream x and branch y have one shape and device, and gamma (C,), keep (B,) and bias (C,) fit them."""
    check_pixels(x)
    check_pixels(y, "y")
    check_matching(y, "y", x, tuple(x.shape))
    for tensor, name, count in ((gamma, "gamma", x.shape[1]), (keep, "keep", x.shape[0]), (bias, "bias", x.shape[1])):
        if tensor is not None:
            check_matching(tensor, name, x, (count,))


def check_depthwise(x: Any, weight: Any, bias: Any, gelu: Any, x_bias: Any) -> None:
    """That pixels x have a weight (C, 1, 3, 3), biases (C,) or None, and that gelu is a bool."""
    if not isinstance(gelu, bool):
        raise TypeError(f"gelu: expected a bool, got {gelu!r} of type {type(gelu).__name__}")
    check_pixels(x)
    check_matching(weight, "weight", x, (x.shape[1], 1, 3, 3))
    for vector, argument in ((bias, "bias"), (x_bias, "x_bias")):
        if vector is not None:
            check_matching(vector, argument, x, (x.shape[1],))


def check_norm(x: Any, weight: Any, bias: Any, eps: Any) -> float:
    """That pixels x have a weight (C,) and a bias (C,); eps as a float."""
    check_pixels(x)
    check_matching(weight, "weight", x, (x.shape[1],))
    check_matching(bias, "bias", x, (x.shape[1],))
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a float, got {eps!r} of type {type(eps).__name__}")
    if not 0 <= eps < math.inf:  # unlike math.isfinite, torch.compile(dynamic=True) can trace it
        raise ValueError(f"eps: expected a finite float of at least 0, got {eps!r}")
    return float(eps)
