"""Super token sampling and upsampling pixel by pixel in plain Python: slow, and independent of the package.

Every sum of the paper's section 3.2 is a loop over pixels, the 9 neighbours or channels, on Python floats (float64).
An image is a dictionary of channel lists by (row, column); what isn't in it is padding, or outside the grid.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

Place = tuple[int, int]
Vectors = dict[Place, list[float]]

OFFSETS = [(up, left) for up in (-1, 0, 1) for left in (-1, 0, 1)]  # of the neighbours k = 0..8


def sampling(x: Tensor, tile: Place, n_iter: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Super tokens (B, C, gh, gw), weights (B, 9, H, W) and mass (B, 1, gh, gw) of pixels x (B, C, H, W)."""
    grid = _grid(x.shape[2], x.shape[3], tile)
    images = [_sampling(_vectors(image), x.shape[1], grid, tile, n_iter, scale) for image in x]
    sizes = (grid, (x.shape[2], x.shape[3]), grid)
    return tuple(  # type: ignore[return-value]
        torch.stack([_tensor(image[i], size) for image in images]) for i, size in enumerate(sizes)
    )


def _sampling(
    pixels: Vectors, channels: int, grid: Place, tile: Place, n_iter: int, scale: float
) -> tuple[Vectors, Vectors, Vectors]:
    nothing = [0.0] * channels
    stokens = {token: [0.0] * channels for token in product(range(grid[0]), range(grid[1]))}
    for pixel, features in pixels.items():
        for c in range(channels):
            stokens[_tile(pixel, tile)][c] += features[c] / (tile[0] * tile[1])
    for _ in range(n_iter):
        weights: Vectors = {}
        mass = {token: [0.0] for token in stokens}
        sums = {token: [0.0] * channels for token in stokens}
        for pixel in product(range(grid[0] * tile[0]), range(grid[1] * tile[1])):
            features = pixels.get(pixel, nothing)
            near = _neighbours(_tile(pixel, tile))
            logits = [
                scale * math.fsum(a * b for a, b in zip(features, stokens.get(token, nothing), strict=True))
                for token in near
            ]
            shares = [math.exp(logit - max(logits)) for logit in logits]
            weights[pixel] = [share / math.fsum(shares) for share in shares]
            for token, weight in zip(near, weights[pixel], strict=True):
                if token in stokens:
                    mass[token][0] += weight
                    for c in range(channels):
                        sums[token][c] += weight * features[c]
        stokens = {token: [s / (mass[token][0] + 1e-12) for s in sums[token]] for token in sums}
    return stokens, weights, mass


def upsampling(stokens: Tensor, weights: Tensor, tile: Place) -> Tensor:
    """Pixels (B, C, H, W) from super tokens (B, C, gh, gw) and weights (B, 9, H, W)."""
    size = (weights.shape[2], weights.shape[3])
    return torch.stack([
        _tensor(_spread(_vectors(tokens), _vectors(shares), tile), size)
        for tokens, shares in zip(stokens, weights, strict=True)
    ])  # fmt: skip


def upsampling_backward(grad_y: Tensor, weights: Tensor, tile: Place) -> Tensor:
    """dS': gradient of the super tokens (B, C, gh, gw), the weights held constant."""
    grid = _grid(weights.shape[2], weights.shape[3], tile)
    images = []
    for grads, shares in zip(grad_y, weights, strict=True):
        tokens = {token: [0.0] * grad_y.shape[1] for token in product(range(grid[0]), range(grid[1]))}
        pixels = _vectors(grads)
        for pixel, nine in _vectors(shares).items():
            for token, weight in zip(_neighbours(_tile(pixel, tile)), nine, strict=True):
                if token in tokens:
                    for c in range(grad_y.shape[1]):
                        tokens[token][c] += weight * pixels[pixel][c]
        images.append(_tensor(tokens, grid))
    return torch.stack(images)


def sampling_backward(grad_stokens: Tensor, weights: Tensor, mass: Tensor, tile: Place) -> Tensor:
    """dx: gradient of the pixels (B, C, H, W), weights and mass held constant."""
    images = []
    for grads, shares, masses in zip(grad_stokens, weights, mass, strict=True):
        masses = _vectors(masses)
        tokens = {token: [g / (masses[token][0] + 1e-12) for g in grad] for token, grad in _vectors(grads).items()}
        images.append(_tensor(_spread(tokens, _vectors(shares), tile), (weights.shape[2], weights.shape[3])))
    return torch.stack(images)


def _spread(tokens: Vectors, weights: Vectors, tile: Place) -> Vectors:
    pixels: Vectors = {}
    for pixel, nine in weights.items():
        near = _neighbours(_tile(pixel, tile))
        channels = len(next(iter(tokens.values())))
        pixels[pixel] = [
            math.fsum(weight * tokens[token][c] for token, weight in zip(near, nine, strict=True) if token in tokens)
            for c in range(channels)
        ]
    return pixels


def _grid(height: int, width: int, tile: Place) -> Place:
    return math.ceil(height / tile[0]), math.ceil(width / tile[1])


def _tile(pixel: Place, tile: Place) -> Place:
    return pixel[0] // tile[0], pixel[1] // tile[1]


def _neighbours(token: Place) -> list[Place]:
    return [(token[0] + up, token[1] + left) for up, left in OFFSETS]


def _vectors(image: Tensor) -> Vectors:
    """(C, H, W) -> the C numbers at each (row, column)."""
    rows = image.permute(1, 2, 0).tolist()
    return {(y, x): vector for y, row in enumerate(rows) for x, vector in enumerate(row)}


def _tensor(vectors: Vectors, size: Place) -> Tensor:
    """The inverse of `_vectors`, cropped to size = (H, W)."""
    rows = [[vectors[y, x] for x in range(size[1])] for y in range(size[0])]
    return torch.tensor(rows, dtype=torch.float64).permute(2, 0, 1)
