"""The baseline of every benchmark: super token attention without refinement, formulated as its authors train it.

Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, released their model in PyTorch. What makes
its cost is kept here, operation by operation: the 3 x 3 neighbourhoods are gathered and folded by convolutions whose
kernels are one-hot, so that every gathered tensor is written out; the association is computed without autograd and
stored as (B, T, P, 9); its mass is folded in every round. Notation: T tiles an image, P pixels a tile.

Nothing in the package depends on this module.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AuthorsStokenAttention(nn.Module):
    """Sampling and upsampling without refinement of (B, C, H, W) -> (B, C, H, W), by the authors' operations.

    stoken_size: (h, w), pixels a super token covers. n_iter: rounds of association and sampling.
    The gradient is the authors' too: the association is a constant, as with ``association_grad=False``.
    """

    shifts: Tensor

    def __init__(self, stoken_size: tuple[int, int], n_iter: int = 1) -> None:
        super().__init__()
        self.stoken_size = stoken_size
        self.n_iter = n_iter
        # Kernel k picks the neighbour at row k // 3 - 1 and column k % 3 - 1.
        self.register_buffer("shifts", torch.eye(9).reshape(9, 1, 3, 3))

    def unfold(self, stokens: Tensor) -> Tensor:
        """(B, C, gh, gw) -> (B, T, C, 9), zeros outside the grid."""
        batch, channels, gh, gw = stokens.shape
        near = F.conv2d(stokens.reshape(batch * channels, 1, gh, gw), self.shifts, padding=1)
        return near.reshape(batch, channels * 9, gh * gw).transpose(1, 2).reshape(batch, gh * gw, channels, 9)

    def fold(self, parts: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, T, C, 9) -> (B, C, gh, gw): the transpose of `unfold`."""
        batch, _, channels, _ = parts.shape
        parts = parts.permute(0, 2, 3, 1).reshape(batch * channels, 9, *grid)
        return F.conv_transpose2d(parts, self.shifts, padding=1).reshape(batch, channels, *grid)

    def sampling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Super tokens (B, C, gh, gw) and the association (B, T, P, 9) of x (B, C, H, W)."""
        h, w = self.stoken_size
        right, bottom = -x.shape[3] % w, -x.shape[2] % h
        if right or bottom:
            x = F.pad(x, (0, right, 0, bottom))
        batch, channels, height, width = x.shape
        grid = gh, gw = height // h, width // w
        stokens = F.adaptive_avg_pool2d(x, grid)
        pixels = x.reshape(batch, channels, gh, h, gw, w).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(batch, gh * gw, h * w, channels)
        with torch.no_grad():
            for step in range(self.n_iter):
                association = (pixels @ self.unfold(stokens) * channels**-0.5).softmax(-1)
                mass = self.fold(association.sum(2).unsqueeze(2), grid) + 1e-12
                if step < self.n_iter - 1:
                    stokens = self.fold(pixels.transpose(2, 3) @ association, grid) / mass
        return self.fold(pixels.transpose(2, 3) @ association, grid) / mass, association

    def upsampling(self, stokens: Tensor, association: Tensor, size: tuple[int, int]) -> Tensor:
        """Pixels (B, C, H, W), size = (H, W), from super tokens (B, C, gh, gw) and the association (B, T, P, 9)."""
        batch, channels, gh, gw = stokens.shape
        h, w = self.stoken_size
        tiles = self.unfold(stokens) @ association.transpose(2, 3)
        y = tiles.reshape(batch, gh, gw, channels, h, w).permute(0, 3, 1, 4, 2, 5)
        return y.reshape(batch, channels, gh * h, gw * w)[:, :, : size[0], : size[1]]

    def forward(self, x: Tensor) -> Tensor:
        stokens, association = self.sampling(x)
        return self.upsampling(stokens, association, (x.shape[2], x.shape[3]))
