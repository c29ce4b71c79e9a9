"""Super token sampling with Triton: forward, and backward in both gradient modes.

Bytes, X being those of x and A = 9/C X those of the association, partial sums left aside (pixels_to_tokens.py):
  forward, n_iter = 1         read 2 X (pooling; association and sums), write A
  forward, each further round read 1 X, write A
  backward, detached          read A, write 1 X
  backward, full, n_iter = 1  read 1 X + 2 A (weights and their gradient), write A (dlogit), read 2 A, write 1 X
x wider than one block of channels is read once more by each round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import grid_size
from ..tensors import accumulator, by_pixel, empty_pixels, empty_weights, is_channels_last
from . import configs
from .pixels_to_tokens import ASSOCIATE, DIFFERENTIATE, pixels_to_tokens
from .pooling import pooling
from .tiles import EPSILON, tile_corner
from .tokens_to_pixels import tokens_to_pixels


@triton.jit
def offset_kernel(
    grad, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,  # (B, C, gh, gw)
    stokens, stokens_stride_b, stokens_stride_c, stokens_stride_h, stokens_stride_w,  # (B, C, gh, gw)
    mass,  # (B, gh, gw)
    offset,  # (B, gh, gw), written
    gh, gw, C: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: <dS, S> / mass of one super token, what division by the mass adds to the gradient of the weights."""
    place = tl.program_id(0)
    column, row, image = place % gw, place // gw % gh, (place // gw // gh).to(tl.int64)
    c = tl.arange(0, CHANNELS).to(tl.int64)
    m = tl.load(mass + place)
    at = tile_corner(image, row, column, 1, 1, grad_stride_b, grad_stride_h, grad_stride_w) + c * grad_stride_c
    ds = tl.load(grad + at, mask=c < C, other=0.0).to(m.dtype)
    at = tile_corner(image, row, column, 1, 1, stokens_stride_b, stokens_stride_h, stokens_stride_w)
    s = tl.load(stokens + at + c * stokens_stride_c, mask=c < C, other=0.0).to(m.dtype)
    tl.store(offset + place, tl.sum(ds * s) / (m + EPSILON))


def offsets(grad: Tensor, stokens: Tensor, mass: Tensor) -> Tensor:
    """<dS, S> / mass (B, 1, gh, gw) from dS and S (B, C, gh, gw)."""
    offset = torch.empty_like(mass)
    if mass.numel():
        with torch.cuda.device_of(mass):
            offset_kernel[(mass.numel(),)](
                grad, *grad.stride(), stokens, *stokens.stride(), mass, offset, *mass.shape[2:],
                C=grad.shape[1], CHANNELS=configs.power_of_two(grad.shape[1]), num_warps=1,
            )  # fmt: skip
    return offset


def sample(x: Tensor, tokens: Tensor, h: int, w: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """One round: super tokens, weights and mass of pixels x associated with `tokens` (B, C, gh, gw)."""
    gh, gw = tokens.shape[2:]
    stokens = empty_pixels(x, x.shape[1], gh, gw, is_channels_last(x))
    weights = empty_weights(x)
    mass = x.new_empty((x.shape[0], 1, gh, gw), dtype=accumulator(x.dtype))
    pixels_to_tokens(ASSOCIATE, x, tokens, None, stokens, h, w, scale=scale, out=weights, mass=mass)
    return stokens, weights, mass


def sampling(x: Tensor, h: int, w: int, n_iter: int, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(stokens, weights, mass, pooled) of pixels x (B, C, H, W); pooled is (B, gh, gw, C)."""
    pooled = pooling(x, h, w, *grid_size(x.shape[2], x.shape[3], (h, w)))
    stokens = pooled.permute(0, 3, 1, 2)
    for _ in range(n_iter):
        stokens, weights, mass = sample(x, stokens, h, w, scale)
    return stokens, weights, mass, pooled


def sampling_backward(
    grad_stokens: Tensor, weights: Tensor, mass: Tensor, h: int, w: int, channels_last: bool
) -> Tensor:
    """dx = A (D^-1 dS), the association held constant."""
    grad_x = empty_pixels(grad_stokens, grad_stokens.shape[1], weights.shape[2], weights.shape[3], channels_last)
    tokens_to_pixels(by_pixel(weights), grad_stokens, grad_x, h, w, mass=mass)
    return grad_x


def sampling_backward_full(
    grad_stokens: Tensor | None, grad_weights: Tensor | None, x: Tensor, stokens: Tensor, pooled: Tensor,
    weights: Tensor, mass: Tensor, h: int, w: int, n_iter: int, scale: float,
) -> Tensor:  # fmt: skip
    """The true gradient: through every round of association and sampling, and the pooling.

    Rounds before the last are computed again from `pooled` rather than saved.
    """
    rounds = [pooled.permute(0, 3, 1, 2)]
    saved = []
    for _ in range(n_iter - 1):
        saved.append(sample(x, rounds[-1], h, w, scale))
        rounds.append(saved[-1][0])
    saved.append((stokens, by_pixel(weights), mass))
    grad = torch.zeros_like(stokens) if grad_stokens is None else grad_stokens
    if grad_weights is not None:
        grad_weights = by_pixel(grad_weights)
    grad_x: Tensor | None = None
    for tokens, (stokens, weights, mass) in zip(reversed(rounds), reversed(saved), strict=True):
        dlogit, grad_tokens = empty_weights(x), torch.empty_like(tokens)
        pixels_to_tokens(
            DIFFERENTIATE, x, grad, weights, grad_tokens, h, w,
            scale=scale, out=dlogit, mass=mass, offset=offsets(grad, stokens, mass), grad=grad_weights,
        )  # fmt: skip
        means = grad_tokens.permute(0, 2, 3, 1).contiguous() if tokens is rounds[0] else None
        part = empty_pixels(x, *x.shape[1:], is_channels_last(x))
        tokens_to_pixels(weights, grad, part, h, w, mass=mass, second=(dlogit, tokens, scale), means=means)
        grad_x = part if grad_x is None else grad_x.add_(part)
        grad, grad_weights = grad_tokens, None
    assert grad_x is not None
    return grad_x
