"""The stateless interface: super token sampling, token upsampling, and the rest of the block."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .backends import dispatch
from .backends.batch_norm import BatchNormAndSkip
from .backends.batch_norm_conv import BatchNormConvAndSkip
from .backends.channel_layer_norm import NormAndSkip
from .backends.registry import ops
from .checks import (
    check_attention,
    check_batch_norm,
    check_branch,
    check_conv,
    check_depthwise,
    check_norm,
    check_sampling,
    check_upsampling,
)
from .geometry import Association
from .tensors import autocast, autocast_dtype, is_channels_last, without_autocast

# Steps of their own to torch.fx, whose proxies have neither shape nor dtype to choose a kernel by.
for _name in (
    "super_token_sampling",
    "token_upsampling",
    "residual_depthwise",
    "batch_norm_and_skip",
    "batch_norm_conv_and_skip",
    "channel_layer_norm",
    "channel_layer_norm_and_skip",
    "residual_branch",
    "multi_head_attention",
):
    torch.fx.wrap(_name)


def super_token_sampling(
    x: Tensor,  # (B, C, H, W)
    stoken_size: int | tuple[int, int],
    n_iter: int = 1,
    scale: float | None = None,
    association_grad: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Association]:
    """Samples super tokens from an image (Huang et al., CVPR 2023, section 3.2).

    Args:
        x: pixels (B, C, H, W) in float16, bfloat16, float32 or float64, in either memory format (channels_last is
            the fast one), contiguous or not. C, H and W at least 1, of any size; B may be 0.
        stoken_size: pixels a super token covers, (h, w) or one int for both. H and W need not be multiples: x is
            padded right and bottom with zeros, which take part in the means and the mass. A side is at most 1024, or
            the image's.
        n_iter: rounds of association and sampling, 1 to 1000.
        scale: factor of the association's logits; None is C ** -0.5.
        association_grad: False (as the authors train) holds the association constant in the backward, which then
            needs only the association and its mass, not x. True differentiates everything, the pooling included.
        backend: "auto", "triton", "cuda" or "reference".

    Returns:
        stokens (B, C, gh, gw) with gh = ceil(H / h), gw = ceil(W / w), in x's dtype and memory format, and the
        `Association` for `token_upsampling`. Under autocast x is first cast to autocast's dtype (float64 is not).

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed.
        BackendError: the backend named can't run; every reason is listed.
    """
    (h, w), n_iter, scale = check_sampling(x, stoken_size, n_iter, scale, association_grad)
    x = autocast(x)
    name = dispatch.choose(backend, x)
    if name == "reference":
        with without_autocast(x):
            stokens, weights, mass = reference.sampling(x, (h, w), n_iter, scale, association_grad)
    else:
        stokens, weights, mass, _ = ops.sampling(x, h, w, n_iter, scale, association_grad, name)
    return stokens, Association(weights, mass, (h, w), is_channels_last(x))


def token_upsampling(
    stokens: Tensor,  # (B, C, gh, gw)
    association: Association,
    backend: str = "auto",
    *,
    residual: Tensor | None = None,  # (B, C, H, W)
) -> Tensor:
    """Gives every pixel the mixture of its 3 x 3 neighbouring super tokens (Huang et al., CVPR 2023, eq. 8).

    Args:
        stokens: super tokens (B, C, gh, gw) on the association's grid, device and batch; C may differ from the C of
            the sampled tensor.
        association: what `super_token_sampling` returned. Its weights get a gradient where they require one, that is
            after sampling with ``association_grad=True``.
        backend: "auto", "triton", "cuda" or "reference".
        residual: pixels (B, C, H, W) to add, in any floating dtype: the sum is written once, and nothing is read again.

    Returns:
        Pixels (B, C, H, W) in the dtype of stokens (autocast's dtype under autocast), promoted with that of residual,
        and in the memory format of the tensor that was sampled.

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed.
        BackendError: the backend named can't run; every reason is listed.
    """
    check_upsampling(stokens, association, residual)
    stokens = autocast(stokens)
    weights: Any = association.weights.to(stokens.dtype)
    (h, w), channels_last = association.stoken_size, association.channels_last
    name = dispatch.choose(backend, stokens)
    if name == "reference":
        with without_autocast(stokens):
            y = reference.upsampling(stokens, weights, (h, w), channels_last)
            return y if residual is None else y + residual
    return ops.upsampling(stokens, weights, residual, h, w, channels_last, name)


def residual_depthwise(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (C, 1, 3, 3)
    bias: Tensor | None = None,  # (C,)
    gelu: bool = False,
    backend: str = "auto",
    *,
    x_bias: Tensor | None = None,  # (C,)
) -> Tensor:
    """h + depthwise3x3(h) + bias, where h = gelu(x + x_bias) (exact to rounding) or x + x_bias: the position embedding
    (Huang et al., eq. 1) and the middle of the MLP.

    Args:
        x: pixels (B, C, H, W), as for `super_token_sampling`; not cast under autocast.
        weight, bias: (C, 1, 3, 3) and (C,) of a depthwise convolution with padding 1, on x's device, any float dtype.
        gelu: whether GELU comes first. Only x is saved for the backward, either way.
        backend: "auto", "triton", "cuda" or "reference".
        x_bias: (C,), added to x first: the bias of the 1x1 convolution that x comes from, or None. Kernels sum its
            gradient over that of x as it is rounded.

    Returns:
        (B, C, H, W) in x's dtype and memory format.

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed.
        BackendError: the backend named can't run; every reason is listed.
    """
    check_depthwise(x, weight, bias, gelu, x_bias)
    name = dispatch.choose_for_block(backend, x)
    if name == "reference":
        return reference.residual_depthwise(x, weight, bias, gelu, x_bias)
    return ops.residual_depthwise(x, weight, bias, gelu, x_bias, name)


def channel_layer_norm(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm over the channels of each pixel, without permuting or copying.

    Args:
        x: pixels (B, C, H, W), as for `super_token_sampling`.
        weight, bias: (C,), in any floating dtype on x's device.
        eps: added to the variance.
        backend: "auto", "triton", "cuda" or "reference".

    Returns:
        (B, C, H, W) in x's memory format and dtype; under autocast in autocast's dtype (PyTorch's own layer_norm
        answers in float32 there), so that the branch behind it runs in half precision. Mean and variance are taken in
        float32 (float64 for float64) either way.

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed.
        BackendError: the backend named can't run; every reason is listed.
    """
    eps = check_norm(x, weight, bias, eps)
    name = dispatch.choose_for_block(backend, x)
    if name == "reference":
        return autocast(reference.channel_layer_norm(x, weight, bias, eps))
    return ops.channel_layer_norm(x, weight, bias, eps, autocast_dtype(x), name)[0]


def channel_layer_norm_and_skip(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(channel_layer_norm(x, ...), x), for the start of a residual branch.

    Use the x that is given back for the skip connection: the backward then adds its gradient where it writes that of
    the norm, which saves a pass of 3 X. Arguments and errors are those of `channel_layer_norm`.
    """
    eps = check_norm(x, weight, bias, eps)
    name = dispatch.choose_for_block(backend, x)
    if name == "reference":
        return autocast(reference.channel_layer_norm(x, weight, bias, eps)), x
    return NormAndSkip.apply(x, weight, bias, eps, autocast_dtype(x), name)


def batch_norm_and_skip(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(BatchNorm of x in training, x), for the start of a residual branch.

    PyTorch's own batch_norm with the batch's statistics. Use the x that is given back for the skip connection: the
    backward then adds its gradient where it writes that of the norm, which saves a pass of 3 X, and reads x and dy once
    less.

    Args:
        x: pixels (B, C, H, W), as for `super_token_sampling`.
        weight, bias, running_mean, running_var: (C,), as `torch.nn.BatchNorm2d` holds them; the last two are updated.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        backend: "auto", "triton", "cuda" or "reference", of the backward.

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed; where a channel
            has a single value, as PyTorch does.
        BackendError: the backend named can't run; every reason is listed.
    """
    eps = check_batch_norm(x, weight, bias, running_mean, running_var, eps)
    name = dispatch.choose_for_block(backend, x)
    if name == "reference" or x.numel() <= x.shape[1]:  # one value of each channel is an error of PyTorch
        return F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps), x
    with torch.no_grad():
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
    return BatchNormAndSkip.apply(x, weight, bias, y, mean, rstd, name)


def batch_norm_conv_and_skip(
    x: Tensor,  # (B, C, H, W)
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str = "auto",
    *,
    conv: tuple[Tensor, Tensor],  # (K, C, 1, 1) and (K,)
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, rest, x): BatchNorm of x in training and the 1x1 convolution behind it, for the start of a residual branch.

    The convolution is y + rest; whoever reads y next adds `rest`, as `residual_depthwise` does (`x_bias`). Kernels fold
    the norm into the convolution's weight for this batch, so that its output is neither written nor saved: 4 X less
    than `batch_norm_and_skip` and a convolution move, X being the bytes of x.

    Args:
        x: pixels (B, C, H, W), as for `super_token_sampling`. The norm is folded where x is contiguous in channels_last
            and of the dtype that products run in.
        weight, bias, running_mean, running_var: (C,), as `torch.nn.BatchNorm2d` holds them; the last two are updated.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        backend: "auto", "triton", "cuda" or "reference", of the fold and of the backward.
        conv: weight (K, C, 1, 1) and bias (K,) of the convolution.

    Returns:
        y (B, K, H, W); `rest` (K,), whose gradient has to be that of the whole bias, as it is where it is added to y;
        and x, for the skip connection: the backward adds its gradient where it writes that of the norm.

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed; where a channel
            has a single value, as PyTorch does.
        BackendError: the backend named can't run; every reason is listed.
    """
    eps = check_batch_norm(x, weight, bias, running_mean, running_var, eps)
    conv_weight, conv_bias = check_conv(x, conv)
    name = dispatch.choose_for_block(backend, x)
    whole = x.is_contiguous(memory_format=torch.channels_last) and x.dtype == autocast_dtype(x)
    whole = whole and running_mean.is_contiguous() and running_var.is_contiguous()  # they are written in place
    if name == "reference" or not whole or x.numel() <= x.shape[1]:
        y, skip = batch_norm_and_skip(x, weight, bias, running_mean, running_var, momentum, eps, backend)
        return F.conv2d(y, conv_weight.to(y.dtype)), conv_bias, skip
    with torch.no_grad():
        mean, rstd = ops.batch_norm_statistics(x, running_mean, running_var, momentum, eps, name)
    return BatchNormConvAndSkip.apply(x, weight, bias, conv_weight, conv_bias, mean, rstd, name)


def multi_head_attention(
    tokens: Tensor,  # (B, N, 3C)
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Multi-head attention over N tokens by PyTorch's fused scaled_dot_product_attention: the refinement (Huang et al.,
    CVPR 2023, eq. 6-7), and the attention of stages whose super tokens are pixels.

    Args:
        tokens: the product of the 1x1 convolution qkv, (B, N, 3C), its channels grouped by head: for each head its q,
            then its k, then its v. Contiguous tokens are not copied.
        num_heads: heads, a divisor of C.
        scale: factor of the logits.
        dropout: probability with which a weight is dropped.

    Returns:
        (B, N, C), the heads one after the other.

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed.
    """
    check_attention(tokens, num_heads, scale, dropout)
    # Split before the heads are moved: the backward then stacks the gradients of q, k and v right into the layout of
    # the product. After a permute of all three at once it would copy the whole of them once more.
    heads = tokens.unflatten(2, (num_heads, 3, -1)).unbind(3)  # three of (B, N, heads, head_dim)
    q, k, v = (part.transpose(1, 2) for part in heads)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return y.transpose(1, 2).flatten(2)


def residual_branch(
    x: Tensor,  # (B, C, H, W)
    y: Tensor,  # (B, C, H, W)
    gamma: Tensor | None = None,  # (C,)
    keep: Tensor | None = None,  # (B,)
    backend: str = "auto",
    *,
    bias: Tensor | None = None,  # (C,)
) -> Tensor:
    """x + keep * gamma * (y + bias): the end of a branch, with LayerScale and drop-path (stochastic depth).

    Args:
        x, y: pixels (B, C, H, W) of the stream and of the branch, as for `super_token_sampling`.
        gamma: LayerScale (C,), or None.
        keep: each sample's drop-path factor (B,), 0 or 1 / (1 - drop probability), or None. Gets no gradient.
        backend: "auto", "triton", "cuda" or "reference".
        bias: (C,), added to y first: that of the 1x1 convolution that y comes from, or None.

    Returns:
        (B, C, H, W) in x's memory format and the dtype that PyTorch promotes x, y and gamma to.

    Raises:
        TypeError, ValueError: naming the argument and what was expected, before anything is computed.
        BackendError: the backend named can't run; every reason is listed.
    """
    check_branch(x, y, gamma, keep, bias)
    keep = None if keep is None else keep.detach()
    name = dispatch.choose_for_block(backend, x)
    if name == "reference" or (gamma is None and keep is None and bias is None):
        return reference.residual_branch(x, y, gamma, keep, bias)
    return ops.residual_branch(x, y, gamma, keep, bias, name)
