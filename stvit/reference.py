"""Super token attention without refinement, in plain PyTorch: the truth that every kernel is held to.

Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, section 3.2. Written in the paper's order:
pool, associate, sample, upsample. Notation: P = h * w pixels a tile, T = gh * gw tiles an image, 9 = the super tokens
of a pixel's 3 x 3 neighbourhood. Logits and sums over pixels are kept in float32 (float64 for float64 input): either
may pass float16's largest number, 65504, where what comes of it doesn't.

Two rules that published checkpoints depend on:
  * a neighbour outside the grid is not masked: its features are zero, so its logit is 0 and it takes its share of the
    softmax; what it takes is dropped;
  * padded pixels take part with logits 0, weights 1/9, and count in the mass.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import grid_size
from .tensors import accumulator, is_channels_last, laid_out

EPS = 1e-12


def pixels_by_tile(x: Tensor, stoken_size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, T, P, C), zero-padded right and bottom."""
    batch, channels, height, width = x.shape
    h, w = stoken_size
    gh, gw = grid_size(height, width, stoken_size)
    if (gh * h, gw * w) != (height, width):  # padding by nothing would copy
        x = F.pad(x, (0, gw * w - width, 0, gh * h - height))
    x = x.reshape(batch, channels, gh, h, gw, w).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(batch, gh * gw, h * w, channels)


def pixels_from_tiles(tiles: Tensor, stoken_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(B, T, P, C) -> (B, C, H, W) in channels_last: the inverse of `pixels_by_tile`, cropped to size = (H, W)."""
    batch, _, _, channels = tiles.shape
    h, w = stoken_size
    gh, gw = grid_size(*size, stoken_size)
    x = tiles.reshape(batch, gh, gw, h, w, channels).transpose(2, 3)
    return x.reshape(batch, gh * h, gw * w, channels)[:, : size[0], : size[1]].permute(0, 3, 1, 2)


def neighbours(stokens: Tensor) -> Tensor:
    """(B, C, gh, gw) -> (B, T, 9, C): the 3 x 3 neighbourhood of each super token, zeros outside the grid."""
    padded = F.pad(stokens, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    shifts = (slice(0, -2), slice(1, -1), slice(2, None))  # no size in them, and so none in graphs of any size
    views = [padded[:, shifts[k // 3], shifts[k % 3]] for k in range(9)]
    return torch.stack(views, dim=3).flatten(1, 2)


def fold(parts: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, T, 9, C) -> (B, C, gh, gw): sums what each tile holds for its neighbours; the transpose of `neighbours`."""
    batch, _, _, channels = parts.shape
    gh, gw = grid
    parts = parts.reshape(batch, gh, gw, 9, channels)
    # Tile (i, j) holds at k the part of super token (i + k//3 - 1, j + k%3 - 1): shifting by that aligns the parts.
    total = sum(F.pad(parts[:, :, :, k], (0, 0, k % 3, 2 - k % 3, k // 3, 2 - k // 3)) for k in range(9))
    assert isinstance(total, Tensor)
    return total[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


def pool(x: Tensor, stoken_size: tuple[int, int]) -> Tensor:
    """Initial super tokens (B, C, gh, gw): the mean over each tile, padding counted."""
    grid = grid_size(x.shape[2], x.shape[3], stoken_size)
    tiles = pixels_by_tile(x, stoken_size)
    means = tiles.mean(2, dtype=accumulator(x.dtype)).to(x.dtype)
    return means.transpose(1, 2).reshape(x.shape[0], x.shape[1], *grid)


def associate(tiles: Tensor, stokens: Tensor, scale: float) -> Tensor:
    """Association (B, T, P, 9) of pixels (B, T, P, C) with super tokens (B, C, gh, gw); paper, eq. 3."""
    wide = accumulator(tiles.dtype)
    logits = tiles.to(wide) @ neighbours(stokens).to(wide).transpose(2, 3)
    return (logits * scale).softmax(-1).to(tiles.dtype)


def sample(tiles: Tensor, weights: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Super tokens (B, C, gh, gw) and their mass (B, 1, gh, gw); paper, eq. 4-5."""
    wide = accumulator(tiles.dtype)
    sums = fold(weights.to(wide).transpose(2, 3) @ tiles.to(wide), grid)
    mass = fold(weights.sum(2, dtype=wide).unsqueeze(-1), grid)
    return (sums / (mass + EPS)).to(tiles.dtype), mass


def sampling(
    x: Tensor, stoken_size: tuple[int, int], n_iter: int, scale: float, association_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Super tokens (B, C, gh, gw), weights (B, 9, H, W) and mass (B, 1, gh, gw) of x (B, C, H, W).

    With `association_grad=False` weights and mass are constants to autograd, as in the authors' training.
    """
    grid = grid_size(x.shape[2], x.shape[3], stoken_size)
    tiles = pixels_by_tile(x, stoken_size)
    constant = torch.is_grad_enabled() and not association_grad
    with torch.no_grad() if constant else nullcontext():
        stokens = pool(x, stoken_size)
        for iteration in range(n_iter):
            weights = associate(tiles, stokens, scale)
            if iteration < n_iter - 1:
                stokens, _ = sample(tiles, weights, grid)
    stokens, mass = sample(tiles, weights, grid)
    stokens = laid_out(stokens, is_channels_last(x))
    return stokens, pixels_from_tiles(weights, stoken_size, (x.shape[2], x.shape[3])), mass


def upsampling(stokens: Tensor, weights: Tensor, stoken_size: tuple[int, int], channels_last: bool) -> Tensor:
    """Pixels (B, C, H, W): each the mixture of its neighbouring super tokens, weights (B, 9, H, W); paper, eq. 8."""
    tiles = pixels_by_tile(weights, stoken_size) @ neighbours(stokens)
    y = pixels_from_tiles(tiles, stoken_size, (weights.shape[2], weights.shape[3]))
    return laid_out(y, channels_last)


def residual_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, x_bias: Tensor | None = None
) -> Tensor:
    """h + depthwise3x3(h) + bias of x (B, C, H, W), where h = gelu(x + x_bias) or x + x_bias; weight (C, 1, 3, 3),
    bias and x_bias (C,)."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype).view(1, -1, 1, 1)
    h = F.gelu(x) if gelu else x
    bias = None if bias is None else bias.to(h.dtype)
    return h + F.conv2d(h, weight.to(h.dtype), bias, padding=1, groups=x.shape[1])


def channel_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the channels of each pixel of x (B, C, H, W); weight and bias (C,), in any floating dtype."""
    if weight.dtype == bias.dtype == x.dtype:
        wide = x
    else:  # PyTorch wants one dtype
        wide, weight, bias = (t.to(torch.promote_types(accumulator(x.dtype), weight.dtype)) for t in (x, weight, bias))
    y = F.layer_norm(wide.permute(0, 2, 3, 1), (int(x.shape[1]),), weight, bias, eps).permute(0, 3, 1, 2)
    y = y if wide is x else y.to(x.dtype)
    return laid_out(y, is_channels_last(x))


def residual_branch(
    x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """x + keep * gamma * (y + bias) of x and y (B, C, H, W): LayerScale gamma (C,), drop-path factors keep (B,) and
    bias (C,), each or None."""
    if bias is not None:
        y = y + bias.to(y.dtype).view(1, -1, 1, 1)
    if gamma is not None:
        y = gamma.view(1, -1, 1, 1) * y
    if keep is not None:
        y = (y * keep.view(-1, 1, 1, 1)).to(y.dtype)
    return x + y
