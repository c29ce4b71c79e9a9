"""Tiles, grid and padding of super tokens.

A super token covers a tile of h x w pixels. An image of H x W pixels is padded right and bottom with zeros to
gh*h x gw*w, which gives a grid of gh x gw super tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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


def grid_size(height: int, width: int, stoken_size: tuple[int, int]) -> tuple[int, int]:
    """(gh, gw): the number of tiles down and across, the last ones possibly padded."""
    h, w = stoken_size
    return (height + h - 1) // h, (width + w - 1) // w


def product_flops(batch: int, channels: int, size: tuple[int, int], stoken_size: tuple[int, int]) -> int:
    """Operations of one product over the pattern of pixels and their 9 super tokens, padded pixels included."""
    gh, gw = grid_size(*size, stoken_size)
    return 2 * 9 * batch * channels * gh * stoken_size[0] * gw * stoken_size[1]
