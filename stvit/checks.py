"""Every check of user input: each error names the argument and what was expected, before anything is launched."""

from __future__ import annotations

import operator
import reprlib
import sys
from typing import Any

import torch
from torch import Tensor

from .geometry import Association, grid_size
from .tensors import DTYPES

LARGEST = sys.float_info.max
LARGEST_TILE = 1024  # pixels a side, where the image is smaller
MOST_ROUNDS = 1000  # of association and sampling; papers use one to three


def shown(value: Any) -> str:
    """A value in one line of an error, cut where it is long, and its type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if not value.is_nested else "a nested tensor"
    text = " ".join(reprlib.repr(value).split())
    return f"{text} of type {type(value).__name__}"


def stoken_pair(stoken_size: Any, name: str = "stoken_size") -> tuple[int, int]:
    """The tile as a pair (h, w) from an int or a pair; TypeError or ValueError naming the argument otherwise."""
    if isinstance(stoken_size, (tuple, list, torch.Size)):
        if len(stoken_size) != 2:
            raise ValueError(f"{name}: expected an int or a pair (h, w), got {shown(stoken_size)}")
        return _positive_int(stoken_size[0], name), _positive_int(stoken_size[1], name)
    side = _positive_int(stoken_size, name)
    return side, side


def _positive_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or isinstance(value, float):
        raise TypeError(f"{name}: expected a positive int, got {shown(value)}")
    try:
        number = operator.index(value)
    except Exception:  # a tensor without a value raises errors of its own
        raise TypeError(f"{name}: expected a positive int, got {shown(value)}") from None
    if number < 1:
        raise ValueError(f"{name}: expected a positive int, got {shown(number)}")
    return number


def _finite_float(value: Any, name: str, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
    if not -LARGEST <= value <= LARGEST:  # unlike math.isfinite, torch.compile(dynamic=True) can trace it
        raise ValueError(f"{name}: expected a finite float, got {shown(value)}")
    return float(value)


def _bool(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {shown(value)}")


def _dense(tensor: Tensor, name: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {str(tensor.layout).removeprefix('torch.')}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_pixels(x: Any, name: str = "x") -> None:
    """(B, C, H, W), a floating dtype, C, H and W at least 1; B may be 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape (B, C, H, W), got {type(x).__name__}")
    _dense(x, name)
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


def check_sampling(
    x: Any, stoken_size: Any, n_iter: Any, scale: Any, association_grad: Any
) -> tuple[tuple[int, int], int, float]:
    """The checked (stoken_size, n_iter, scale) of super_token_sampling; ``scale=None`` is C ** -0.5."""
    check_pixels(x)
    tile = check_tile(stoken_size, "stoken_size", x)
    iterations = _positive_int(n_iter, "n_iter")
    if iterations > MOST_ROUNDS:
        raise ValueError(f"n_iter: expected at most {MOST_ROUNDS}, got {shown(iterations)}")
    _bool(association_grad, "association_grad")
    if scale is None:
        return tile, iterations, x.shape[1] ** -0.5
    return tile, iterations, _finite_float(scale, "scale", "a float or None (C ** -0.5)")


def check_tile(stoken_size: Any, name: str, x: Tensor) -> tuple[int, int]:
    """The tile of pixels x (B, C, H, W), which may reach beyond them, but not so far that padding fills the memory."""
    tile = stoken_pair(stoken_size, name)
    for side, size in zip(tile, x.shape[2:], strict=True):
        if side > LARGEST_TILE and side > size:
            raise ValueError(
                f"{name}: expected sides of at most {LARGEST_TILE}, or of at most the image's, {tuple(x.shape[2:])}, "
                f"got {shown(side)}"
            )
    return tile


def check_upsampling(stokens: Any, association: Any, residual: Any = None) -> None:
    """That super tokens and association have one grid, batch and device, and a residual the shape of the result."""
    check_pixels(stokens, "stokens")
    if not isinstance(association, Association):
        raise TypeError(
            "association: expected the Association that super_token_sampling returned, "
            f"got {type(association).__name__}"
        )
    weights, mass, stoken_size, channels_last = association
    check_pixels(weights, "association.weights")
    check_pixels(mass, "association.mass")
    tile = check_tile(stoken_size, "association.stoken_size", weights)
    _bool(channels_last, "association.channels_last")
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
    _dense(tensor, name)
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
    _bool(gelu, "gelu")
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
    eps = _finite_float(eps, "eps", "a float")
    if eps < 0:
        raise ValueError(f"eps: expected a finite float of at least 0, got {eps!r}")
    return eps


def check_batch_norm(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, eps: Any) -> float:
    """As `check_norm`, and that the running statistics are (C,)."""
    eps = check_norm(x, weight, bias, eps)
    for statistic, argument in ((running_mean, "running_mean"), (running_var, "running_var")):
        check_matching(statistic, argument, x, (x.shape[1],))
    return eps


def check_conv(x: Tensor, conv: Any) -> tuple[Tensor, Tensor]:
    """That `conv` is a weight (K, C, 1, 1) and a bias (K,) for pixels x (B, C, H, W)."""
    if not isinstance(conv, (tuple, list)) or len(conv) != 2:
        raise TypeError(f"conv: expected a weight (K, C, 1, 1) and a bias (K,), got {type(conv).__name__}")
    weight, bias = conv
    outputs = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 1
    check_matching(weight, "conv", x, (outputs, x.shape[1], 1, 1))
    check_matching(bias, "conv", x, (outputs,))
    return weight, bias


def check_attention(tokens: Any, num_heads: Any, scale: Any, dropout: Any) -> None:
    """That tokens (B, N, 3C) divide into heads, and that scale and dropout are floats that make sense."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens: expected a torch.Tensor of shape (B, N, 3C), got {type(tokens).__name__}")
    _dense(tokens, "tokens")
    if tokens.dim() != 3:
        raise ValueError(f"tokens: expected 3 dimensions (B, N, 3C), got shape {tuple(tokens.shape)}")
    if tokens.dtype not in DTYPES:
        raise TypeError(f"tokens: expected a floating dtype, got {str(tokens.dtype).removeprefix('torch.')}")
    heads = _positive_int(num_heads, "num_heads")
    if tokens.shape[2] < 1 or tokens.shape[2] % (3 * heads):
        raise ValueError(
            f"tokens: expected 3C channels, C a multiple of {shown(heads)}, got shape {tuple(tokens.shape)}"
        )
    _finite_float(scale, "scale", "a float")
    if not 0 <= _finite_float(dropout, "dropout", "a float") <= 1:
        raise ValueError(f"dropout: expected a probability, got {dropout!r}")
