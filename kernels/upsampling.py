"""Token upsampling with Triton: forward, and backward in both gradient modes.

Bytes, X being those of y and A = 9/C X those of the association, partial sums left aside (pixels_to_tokens.py):
  forward             read A, write 1 X; with a residual read 1 X more
  backward, detached  read A and 1 X (dy)
  backward, full      read A and 1 X (dy), write A (its gradient)
dy wider than one block of channels is read once more by the full backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import grid_size
from ..tensors import by_pixel, empty_pixels, empty_weights, is_channels_last
from .pixels_to_tokens import PRODUCTS, WEIGHTED, pixels_to_tokens
from .tokens_to_pixels import tokens_to_pixels


def upsampling(
    stokens: Tensor, weights: Tensor, h: int, w: int, channels_last: bool, residual: Tensor | None = None
) -> Tensor:
    """y = A S', plus the residual: pixels (B, C, H, W) from super tokens (B, C, gh, gw)."""
    dtype = stokens.dtype if residual is None else torch.promote_types(stokens.dtype, residual.dtype)
    y = empty_pixels(stokens, stokens.shape[1], weights.shape[2], weights.shape[3], channels_last, dtype)
    tokens_to_pixels(by_pixel(weights), stokens, y, h, w, residual=residual)
    return y


def upsampling_backward(grad_y: Tensor, weights: Tensor, h: int, w: int, channels_last: bool) -> Tensor:
    """dS' = A^T dy, the association held constant."""
    grid = grid_size(grad_y.shape[2], grad_y.shape[3], (h, w))
    grad_stokens = empty_pixels(grad_y, grad_y.shape[1], *grid, channels_last)
    pixels_to_tokens(WEIGHTED, grad_y, None, by_pixel(weights), grad_stokens, h, w)
    return grad_stokens


def upsampling_backward_full(grad_y: Tensor, stokens: Tensor, weights: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """dS' = A^T dy and dA = dy . S' at the pattern."""
    grad_stokens = empty_pixels(stokens, *stokens.shape[1:], is_channels_last(stokens))
    grad_weights = empty_weights(grad_y)
    pixels_to_tokens(PRODUCTS, grad_y, stokens, by_pixel(weights), grad_stokens, h, w, out=grad_weights)
    return grad_stokens, grad_weights
