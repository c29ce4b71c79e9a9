"""BatchNorm folded into the 1x1 convolution behind it, with Triton: the small work on the convolution's weight.

With s = rstd * weight of a channel, conv(norm(x)) = W' x + b', where W' = W s and b' = b + W bias - W' mean. W' is
rounded to the dtype of x before b' is taken from it, so the mean's share cancels exactly, whatever its size. b' is
split into what the product adds in that dtype and the rest, float32, for who reads the product next. No pixel is moved
here: W is (K, C), at most a few megabytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import channel_block
from .partial_sums import add_parts

ELEMENTS = 1024  # numbers of W that a program of 4 warps holds at a time
ROWS = 64  # of W that a program of the backward sums


@triton.jit
def batch_norm_conv_kernel(
    conv,  # (K, C), the convolution's weight W
    conv_bias,  # (K,)
    weight, bias, mean, rstd,  # (C,), of the norm
    folded,  # (K, C), written
    near, rest,  # (K,), written: b' in the dtype of `folded`, and what that leaves
    K, C, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS outputs, all channels."""
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    shift = tl.zeros([ROWS, CHANNELS], ACCUMULATOR)
    for start in range(0, C, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        seen = (k < K)[:, None] & (c < C)[None, :]
        at = k[:, None] * C + c[None, :]
        scale = tl.load(rstd + c, mask=c < C, other=0.0) * tl.load(weight + c, mask=c < C, other=0.0).to(ACCUMULATOR)
        w = tl.load(conv + at, mask=seen, other=0.0).to(ACCUMULATOR)
        scaled = (w * scale[None, :]).to(folded.dtype.element_ty)
        tl.store(folded + at, scaled, mask=seen)
        beta = tl.load(bias + c, mask=c < C, other=0.0).to(ACCUMULATOR)
        m = tl.load(mean + c, mask=c < C, other=0.0)
        shift += w * beta[None, :] - scaled.to(ACCUMULATOR) * m[None, :]
    whole = tl.load(conv_bias + k, mask=k < K, other=0.0).to(ACCUMULATOR) + tl.sum(shift, axis=1)
    part = whole.to(near.dtype.element_ty)
    tl.store(near + k, part, mask=k < K)
    tl.store(rest + k, whole - part.to(ACCUMULATOR), mask=k < K)


@triton.jit
def batch_norm_conv_backward_kernel(
    dfolded,  # (K, C), the gradient of W'
    dshift,  # (K,), that of b'
    conv,  # (K, C)
    weight, bias, mean, rstd,  # (C,), of the norm
    dconv,  # (K, C), written
    partial,  # (parts, 2, C), written
    K, C, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS outputs, STEP at a time, CHANNELS channels. Sums W dW' and W db' over outputs: with dy the
    gradient of the norm's output, those are the sums of dy x and of dy over pixels."""
    blocks = tl.cdiv(C, CHANNELS)
    part = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    gamma = tl.load(weight + c, mask=c < C, other=0.0).to(ACCUMULATOR)
    beta = tl.load(bias + c, mask=c < C, other=0.0).to(ACCUMULATOR)[None, :]
    m = tl.load(mean + c, mask=c < C, other=0.0)[None, :]
    scale = (tl.load(rstd + c, mask=c < C, other=0.0) * gamma)[None, :]
    products = tl.zeros([STEP, CHANNELS], ACCUMULATOR)
    sums = tl.zeros([STEP, CHANNELS], ACCUMULATOR)
    for i in range(0, ROWS, STEP):
        k = part * ROWS + i + tl.arange(0, STEP)
        seen = (k < K)[:, None] & (c < C)[None, :]
        at = k[:, None] * C + c[None, :]
        slope = tl.load(dfolded + at, mask=seen, other=0.0)
        shift = tl.load(dshift + k, mask=k < K, other=0.0).to(ACCUMULATOR)[:, None]
        w = tl.load(conv + at, mask=seen, other=0.0).to(ACCUMULATOR)
        products += w * slope
        sums += w * shift
        tl.store(dconv + at, ((slope - shift * m) * scale + beta * shift).to(dconv.dtype.element_ty), mask=seen)
    partial += part * 2 * C + c
    tl.store(partial, tl.sum(products, axis=0), mask=c < C)
    tl.store(partial + C, tl.sum(sums, axis=0), mask=c < C)


def batch_norm_conv(
    conv: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(W' (K, C) in `dtype`, b' (K,) rounded to it, what the rounding left (K,) in float32) of a convolution's weight
    (K, C) and bias (K,) and a norm's parameters and statistics (C,)."""
    outputs, channels = conv.shape
    folded, near = conv.new_empty(conv.shape, dtype=dtype), conv.new_empty(outputs, dtype=dtype)
    rest = mean.new_empty(outputs)
    block = channel_block(channels)
    rows = ELEMENTS // block
    with torch.cuda.device_of(conv):
        batch_norm_conv_kernel[(-(-outputs // rows),)](
            conv.contiguous(), conv_bias.contiguous(), weight.contiguous(), bias.contiguous(), mean, rstd, folded, near,
            rest, outputs, channels, ACCUMULATOR=configs.accumulator(mean), ROWS=rows, CHANNELS=block, num_warps=4,
        )  # fmt: skip
    return folded, near, rest


def batch_norm_conv_backward(
    grad_folded: Tensor,
    grad_shift: Tensor,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dW (K, C) in W's dtype, sums (2, C)) of the gradients of W' (K, C) and b' (K,), float32 or wider; the sums are
    over pixels, of dy x and of dy, dy being the gradient of the norm's output."""
    outputs, channels = conv.shape
    grad_conv = torch.empty_like(conv, memory_format=torch.contiguous_format)
    block = channel_block(channels)
    parts = -(-outputs // ROWS)
    partial = mean.new_empty((parts, 2, channels))
    sums = mean.new_empty((2, channels))
    with torch.cuda.device_of(conv):
        batch_norm_conv_backward_kernel[(parts * -(-channels // block),)](
            grad_folded, grad_shift.contiguous(), conv.contiguous(), weight.contiguous(), bias.contiguous(), mean, rstd,
            grad_conv, partial, outputs, channels, ACCUMULATOR=configs.accumulator(mean), ROWS=ROWS,
            STEP=min(ROWS, ELEMENTS // block), CHANNELS=block, num_warps=4,
        )  # fmt: skip
        add_parts(partial, sums[0], sums[1])
    return grad_conv, sums
