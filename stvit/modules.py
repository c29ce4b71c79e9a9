"""The parts of a Super Token Vision Transformer that hold parameters (Huang et al., CVPR 2023, section 3).

Parameter names and their order are those of the published checkpoints, so files and optimizer states carry over.
Every module takes (B, C, H, W) in either memory format and answers in the same one; channels_last is the fast one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from .backends import dispatch
from .bypass import bias_apart, by_kernels, idle, norm_apart, plain, silent
from .checks import check_pixels, stoken_pair
from .tensors import autocast, autocast_dtype, is_channels_last, laid_out, transformed

FOLDED = (torch.bfloat16,)  # dtypes in which the MLP's norm is folded into its first convolution

# Steps of their own to torch.fx, whose proxies have neither shape nor strides.
for _name in ("_check_channels", "_drop_factors", "_in_format_of", "autocast"):
    torch.fx.wrap(_name)


def _check_channels(x: Tensor, dim: int) -> None:
    check_pixels(x)
    if x.shape[1] != dim:
        raise ValueError(f"x: expected {dim} channels (dim), got shape {tuple(x.shape)}")


def _drop_factors(x: Tensor, gamma: Tensor | None, keep: float) -> Tensor:
    """A factor (B,) for each sample of x, 0 or 1 / keep, in the dtype of gamma * x."""
    dtype = x.dtype if gamma is None else torch.promote_types(x.dtype, gamma.dtype)
    return x.new_empty(x.shape[0], 1, 1, 1, dtype=dtype).bernoulli_(keep).div_(keep).view(-1)


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format of x; no copy where it is already."""
    return laid_out(y, is_channels_last(x))


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel, eps 1e-6. (B, C, H, W) -> the same shape."""

    def __init__(self, dim: int, *, backend: str = "auto") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.backend = dispatch.check_backend(backend)

    def forward(self, x: Tensor, and_skip: bool = False) -> Any:
        """y, or with `and_skip` (y, x), the latter for the skip connection: the norm's backward adds its gradient."""
        if not plain(self.norm, nn.LayerNorm):
            y = autocast(_in_format_of(x, self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
            return (y, x) if and_skip else y
        run = functional.channel_layer_norm_and_skip if and_skip else functional.channel_layer_norm
        return run(x, self.norm.weight, self.norm.bias, self.norm.eps, self.backend)


class ResidualDepthwise(nn.Module):
    """h + depthwise 3x3 convolution of h, where h = gelu(x) if `gelu`, else x. (B, C, H, W) -> the same shape.

    The position embedding (paper, eq. 1), and with GELU the middle of the MLP.
    """

    takes_bias = True  # of the 1x1 convolution in front; a subclass, whose forward is its own, says so itself

    def __init__(self, dim: int, *, gelu: bool = False, backend: str = "auto") -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.gelu = gelu
        self.backend = dispatch.check_backend(backend)

    def forward(self, x: Tensor, x_bias: Tensor | None = None) -> Tensor:
        """Of x, or of x + x_bias, (C,): the bias that the 1x1 convolution in front has left to this one."""
        if not plain(self.conv, nn.Conv2d):
            x = x if x_bias is None else x + x_bias.to(x.dtype).view(1, -1, 1, 1)
            h = F.gelu(x) if self.gelu else x
            return _in_format_of(x, h + self.conv(h).to(h.dtype))
        conv = self.conv
        return functional.residual_depthwise(x, conv.weight, conv.bias, self.gelu, self.backend, x_bias=x_bias)


class Mlp(nn.Module):
    """1x1 convolution, activation, h + depthwise3x3(h), 1x1 convolution. (B, C, H, W) -> the same shape.

    Exact GELU runs inside the depthwise op where no dropout comes between, so that h is never written.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        act = act_layer()
        fused = isinstance(act, nn.GELU) and act.approximate == "none" and drop == 0.0
        self.act = nn.Identity() if fused else act
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.drop = nn.Dropout(drop)
        self.conv = ResidualDepthwise(hidden_dim, gelu=fused, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self._hidden(x)))

    def without_bias(self, x: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        """(y, bias): the MLP of x before fc2's bias (dim,) is added, or all of it and None where that can't wait."""
        return self._second(self._hidden(x), backend)

    def behind_fc1(self, product: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        """As `without_bias`, of fc1's output product + bias; only where `takes_norm`."""
        return self._second(self.conv(product, bias), backend)

    def takes_norm(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """fc1's weight and bias, where a norm of x may be folded into it and part of a bias left to the depthwise op.

        float16 can't hold the fold's bias where means are large; float32 products would have to be TF32's to be fast.
        """
        ready = x.dtype == autocast_dtype(x) and x.is_contiguous(memory_format=torch.channels_last)
        if not (ready and x.dtype in FOLDED and self._depthwise_follows() and by_kernels(self.conv.backend, x)):
            return None
        bias = bias_apart(self.fc1)
        return None if bias is None else (self.fc1.weight, bias)

    def _second(self, hidden: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        bias = bias_apart(self.fc2) if idle(self.drop) and by_kernels(backend, hidden) else None
        if bias is None:
            return self.drop(self.fc2(hidden)), None
        return F.conv2d(hidden, self.fc2.weight), bias

    def _hidden(self, x: Tensor) -> Tensor:
        """What fc2 takes, (B, hidden_dim, H, W). fc1's bias goes into the depthwise op where nothing lies between."""
        bias = bias_apart(self.fc1)
        if bias is None or not self._depthwise_follows() or not by_kernels(self.conv.backend, x):
            return self.conv(self.drop(self.act(self.fc1(x))))
        return self.conv(F.conv2d(x, self.fc1.weight), bias)

    def _depthwise_follows(self) -> bool:
        between = plain(self.act, nn.Identity) and idle(self.drop)
        return between and "takes_bias" in vars(type(self.conv)) and silent(self.conv) and self.conv.gelu


class DropPath(nn.Module):
    """Stochastic depth: in training drops whole samples with probability drop_prob and scales the rest by 1 / keep.

    Draws from the random stream exactly as timm's does, so a run with a given seed drops the same samples.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, 1, 1, 1)

    def factors(self, x: Tensor, gamma: Tensor | None = None) -> Tensor | None:
        """Each sample's factor (B,), 0 or 1 / keep, or None where nothing is dropped; in the dtype of gamma * x."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        return _drop_factors(x, gamma, 1.0 - self.drop_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class Attention(nn.Module):
    """Multi-head attention over all positions: the refinement of super tokens (paper, eq. 6-7).

    The output channels of `qkv` are grouped by head: for each head its q, then its k, then its v channels. The
    reference backend keeps the softmax explicit; every other one runs PyTorch's fused scaled_dot_product_attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.backend = dispatch.check_backend(backend)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self._attended(x)))

    def without_bias(self, x: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        """(y, bias): the attention of x before the projection's bias (dim,), or all of it and None."""
        bias = bias_apart(self.proj) if idle(self.proj_drop) and by_kernels(backend, x) else None
        if bias is None:
            return self(x), None
        return F.conv2d(self._attended(x), self.proj.weight), bias

    def _attended(self, x: Tensor) -> Tensor:
        """What the projection takes, (B, dim, H, W)."""
        tokens = self._product(x)
        backend = dispatch.default_backend() if self.backend == "auto" else self.backend
        if backend == "reference" or transformed() or not plain(self.attn_drop, nn.Dropout):
            y = self._explicit(tokens)
        else:
            drop = self.attn_drop.p if self.training else 0.0
            y = functional.multi_head_attention(tokens.contiguous(), self.num_heads, self.scale, drop)
        return _in_format_of(x, y.transpose(1, 2).unflatten(2, x.shape[2:]))

    def _product(self, x: Tensor) -> Tensor:
        """The output of qkv as tokens (B, N, 3C): contiguous as it is in channels_last.

        There, in 16 bits, it is one product of matrices, whose epilogue adds the bias. Not in float32, where PyTorch
        lets convolutions run in TF32 and products of matrices not.
        """
        bias = bias_apart(self.qkv)
        if bias is None or not by_kernels(self.backend, x) or autocast_dtype(x).itemsize > 2 or not is_channels_last(x):
            return self.qkv(x).flatten(2).transpose(1, 2)
        return F.linear(x.flatten(2).transpose(1, 2), self.qkv.weight.flatten(1), bias)

    def weights(self, x: Tensor) -> Tensor:
        """How much each position attends to each other: (B, C, H, W) -> (B, heads, N, N), N = H * W, for looking at."""
        q, k, _ = self._heads(self.qkv(x).flatten(2).transpose(1, 2))
        return (q @ k.transpose(2, 3) * self.scale).softmax(-1)

    def _heads(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Views q, k, v of the one product, each (B, heads, N, head_dim)."""
        parts = tokens.unflatten(2, (self.num_heads, 3, -1)).unbind(3)
        return tuple(parts[i].transpose(1, 2) for i in range(3))  # by index: torch.fx can't iterate

    def _explicit(self, tokens: Tensor) -> Tensor:
        q, k, v = self._heads(tokens)
        weights = self.attn_drop((q @ k.transpose(2, 3) * self.scale).softmax(-1))
        y = v.transpose(2, 3) @ weights.transpose(2, 3)  # (B, heads, head_dim, N): the way NCHW wants it
        return y.flatten(1, 2).transpose(1, 2)


class _NeighbourhoodKernel(nn.Module):
    """The constant that published files hold for each block's unfold and fold: nine one-hot 3 x 3 kernels.

    Nothing here computes with it; it is kept so that state dicts match key for key in both directions.
    """

    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.eye(9).reshape(9, 1, 3, 3))

    def reset_parameters(self) -> None:
        """Fills the constant in again, after `to_empty`; the name is the one that PyTorch's tools look for."""
        self.weights.copy_(torch.eye(9).reshape(9, 1, 3, 3))


class StokenAttention(nn.Module):
    """Super token attention (paper, section 3.2): sample super tokens, refine them, give them back to the pixels.

    A drop-in for the authors' class of the same name: same arguments, same state dict, same numbers.

    Args:
        dim: channels C.
        stoken_size: pixels a super token covers, (h, w) or one int for both. 1 or (1, 1): every pixel is its own
            super token, nothing is sampled and the refinement runs over all pixels.
        n_iter: rounds of association and sampling.
        refine: whether super tokens are refined at all.
        refine_attention: refine by multi-head attention; False: 1x1, depthwise 5x5 and 1x1 convolution.
        num_heads, qkv_bias, qk_scale, attn_drop, proj_drop: of the refinement by attention. qk_scale None is
            head_dim ** -0.5.
        association_grad: False (as the authors train) holds the association constant in the backward.
        backend: "auto", "triton", "cuda" or "reference".

    Shape: (B, dim, H, W) -> the same, any H and W, in float16, bfloat16, float32 or float64. `forward` raises
    TypeError or ValueError naming x and what was expected, BackendError where a backend named explicitly can't run.
    """

    def __init__(
        self,
        dim: int,
        stoken_size: int | tuple[int, int],
        n_iter: int = 1,
        refine: bool = True,
        refine_attention: bool = True,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        association_grad: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.stoken_size = stoken_pair(stoken_size)
        self.n_iter = n_iter
        self.scale = dim**-0.5
        self.refine = refine
        self.refine_attention = refine_attention
        self.association_grad = association_grad
        self.backend = dispatch.check_backend(backend)
        self.unfold = _NeighbourhoodKernel()
        self.fold = _NeighbourhoodKernel()
        self.stoken_refine: nn.Module = nn.Identity()
        if refine and refine_attention:
            self.stoken_refine = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, backend=backend)
        elif refine:
            self.stoken_refine = nn.Sequential(
                nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.Conv2d(dim, dim, 1)
            )

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        drop_path: DropPath | None = None,
    ) -> Tensor:
        """Attention of x; with a residual the whole branch of a block, residual + drop_path(gamma * attention of x).

        Upsampling is linear, so drop-path scales the super tokens, few as they are, and the residual is added where the
        pixels are written. Not so with LayerScale (gamma (C,)), which may make the sum float32 under autocast.
        """
        _check_channels(x, self.dim)
        if residual is not None and (gamma is not None or self.stoken_size == (1, 1)):
            refine = self.stoken_refine
            if self.stoken_size == (1, 1) and isinstance(refine, Attention) and plain(refine, Attention):
                y, bias = refine.without_bias(x, self.backend)
            else:
                y, bias = self._attend(x), None
            keep = None if drop_path is None else drop_path.factors(y, gamma)
            return functional.residual_branch(residual, y, gamma, keep, self.backend, bias=bias)
        return self._attend(x, residual, drop_path)

    def _attend(self, x: Tensor, residual: Tensor | None = None, drop_path: DropPath | None = None) -> Tensor:
        if self.stoken_size == (1, 1):
            return self.stoken_refine(x)
        stokens, association = functional.super_token_sampling(
            x, self.stoken_size, self.n_iter, self.scale, self.association_grad, self.backend
        )
        stokens = self.stoken_refine(stokens)
        if drop_path is not None:
            stokens = drop_path(stokens)
        return functional.token_upsampling(stokens, association, self.backend, residual=residual)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, stoken_size={self.stoken_size}, n_iter={self.n_iter}, "
            f"association_grad={self.association_grad}, backend={self.backend!r}"
        )


class SuperTokenBlock(nn.Module):
    """One block (paper, figure 2): position embedding, super token attention, convolutional MLP.

    x = x + depthwise3x3(x); x = x + drop_path(gamma_1 * attention(LayerNorm(x)));
    x = x + drop_path(gamma_2 * mlp(BatchNorm(x))); gamma_1 and gamma_2 only with layerscale.

    Shape: (B, dim, H, W) -> the same, any H and W.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        stoken_size: int | tuple[int, int],
        n_iter: int = 1,
        num_heads: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        layerscale: bool = False,
        init_values: float = 1e-6,
        *,
        association_grad: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.backend = dispatch.check_backend(backend)
        self.pos_embed = ResidualDepthwise(dim, backend=backend)
        self.norm1 = LayerNorm2d(dim, backend=backend)
        self.attn = StokenAttention(
            dim,
            stoken_size,
            n_iter,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=drop,
            association_grad=association_grad,
            backend=backend,
        )
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = Mlp(dim, int(dim * mlp_ratio), act_layer, drop, backend=backend)
        for name in ("gamma_1", "gamma_2"):
            gamma = nn.Parameter(torch.full((1, dim, 1, 1), init_values)) if layerscale else None
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        y, x = self.norm1(x, and_skip=True) if plain(self.norm1, LayerNorm2d) else (self.norm1(x), x)
        gamma_1, gamma_2 = (None if g is None else g.view(-1) for g in (self.gamma_1, self.gamma_2))
        if plain(self.attn, StokenAttention) and plain(self.drop_path, DropPath):
            x = self.attn(y, x, gamma_1, self.drop_path)
        else:
            x = self._joined(x, self.attn(y), None, gamma_1)
        given = norm_apart(self.norm2, self.backend, x)
        apart = plain(self.mlp2, Mlp) and plain(self.drop_path, DropPath)
        conv = self.mlp2.takes_norm(x) if apart and given is not None else None
        if given is not None and conv is not None:
            y, rest, x = functional.batch_norm_conv_and_skip(x, *given, self.backend, conv=conv)
            return self._joined(x, *self.mlp2.behind_fc1(y, rest, self.backend), gamma_2)
        y, x = (self.norm2(x), x) if given is None else functional.batch_norm_and_skip(x, *given, self.backend)
        y, bias = self.mlp2.without_bias(y, self.backend) if apart else (self.mlp2(y), None)
        return self._joined(x, y, bias, gamma_2)

    def _joined(self, x: Tensor, y: Tensor, bias: Tensor | None, gamma: Tensor | None) -> Tensor:
        """x + drop_path(gamma * (y + bias))."""
        if plain(self.drop_path, DropPath):
            keep = self.drop_path.factors(y, gamma)
            return functional.residual_branch(x, y, gamma, keep, self.backend, bias=bias)
        return x + self.drop_path(y if gamma is None else gamma.view(1, -1, 1, 1) * y)
