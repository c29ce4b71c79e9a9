"""The published model as plain functions of its state dict: what every checkpoint key is called, its shape and its use.

Written from the paper's equations with einsum, and apart from the package: it shares no code with `stvit`. The sums
over 3 x 3 neighbourhoods are convolutions with the constant kernels that published files hold, so those are used too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def published_shapes(
    embed_dim: Sequence[int],
    depths: Sequence[int],
    layerscale: Sequence[bool] = (False,) * 4,
    num_classes: int = 1000,
    projection: int = 1024,
) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a published state dict."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def add_batch_norm(name: str, dim: int) -> None:
        add(name, dim)
        shapes.update({f"{name}.running_mean": (dim,), f"{name}.running_var": (dim,)})
        shapes[f"{name}.num_batches_tracked"] = ()

    half, first = embed_dim[0] // 2, embed_dim[0]
    for index, (wide, narrow) in enumerate([(half, 3), (half, half), (first, half), (first, first)]):
        add(f"patch_embed.proj.{3 * index}", wide, narrow, 3, 3)
        add_batch_norm(f"patch_embed.proj.{3 * index + 2}", wide)
    for stage, (dim, depth) in enumerate(zip(embed_dim, depths, strict=True)):
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}."
            if layerscale[stage]:
                shapes.update({f"{at}gamma_1": (1, dim, 1, 1), f"{at}gamma_2": (1, dim, 1, 1)})
            add(f"{at}pos_embed.conv", dim, 1, 3, 3)
            add(f"{at}norm1.norm", dim)
            shapes.update({f"{at}attn.unfold.weights": (9, 1, 3, 3), f"{at}attn.fold.weights": (9, 1, 3, 3)})
            add(f"{at}attn.stoken_refine.qkv", 3 * dim, dim, 1, 1)
            add(f"{at}attn.stoken_refine.proj", dim, dim, 1, 1)
            add_batch_norm(f"{at}norm2", dim)
            add(f"{at}mlp2.fc1", 4 * dim, dim, 1, 1)
            add(f"{at}mlp2.fc2", dim, 4 * dim, 1, 1)
            add(f"{at}mlp2.conv.conv", 4 * dim, 1, 3, 3)
        if stage + 1 < len(depths):
            add(f"layers.{stage}.downsample.proj.0", embed_dim[stage + 1], dim, 3, 3)
            add_batch_norm(f"layers.{stage}.downsample.proj.1", embed_dim[stage + 1])
    add("proj", projection, embed_dim[-1], 1, 1)
    add_batch_norm("norm", projection)
    add("head", num_classes, projection)
    return shapes


def published_forward(
    weights: Weights,
    x: Tensor,
    depths: Sequence[int],
    num_heads: Sequence[int],
    tiles: Sequence[int] = (8, 4, 1, 1),
    training: bool = False,
) -> Tensor:
    """Logits of images x (B, 3, H, W); `training` normalises by the batch, and leaves running statistics alone."""

    def conv(name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv2d(x, kernel, weights[f"{name}.bias"], stride, kernel.shape[-1] // 2, groups=groups)

    def batch_norm(name: str, x: Tensor) -> Tensor:
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        scaled = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    for index, stride in enumerate((2, 1, 2, 1)):
        x = F.gelu(conv(f"patch_embed.proj.{3 * index}", x, stride))
        x = batch_norm(f"patch_embed.proj.{3 * index + 2}", x)
    for stage, depth in enumerate(depths):
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}."
            x = x + conv(f"{at}pos_embed.conv", x, groups=x.shape[1])
            y = x - x.mean(1, keepdim=True)
            y = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
            y = y * weights[f"{at}norm1.norm.weight"][:, None, None] + weights[f"{at}norm1.norm.bias"][:, None, None]
            y = stoken_attention(weights, f"{at}attn.", y, (tiles[stage], tiles[stage]), num_heads[stage])
            x = x + weights.get(f"{at}gamma_1", 1.0) * y
            y = F.gelu(conv(f"{at}mlp2.fc1", batch_norm(f"{at}norm2", x)))
            y = y + conv(f"{at}mlp2.conv.conv", y, groups=y.shape[1])
            x = x + weights.get(f"{at}gamma_2", 1.0) * conv(f"{at}mlp2.fc2", y)
        if stage + 1 < len(depths):
            at = f"layers.{stage}.downsample.proj."
            x = batch_norm(f"{at}1", conv(f"{at}0", x, 2))
    x = batch_norm("norm", conv("proj", x))
    x = x * x.sigmoid()
    return F.linear(x.mean((2, 3)), weights["head.weight"], weights["head.bias"])


def stoken_attention(
    weights: Weights, at: str, x: Tensor, tile: tuple[int, int], num_heads: int, n_iter: int = 1
) -> Tensor:
    """Super token attention with the weights whose names start with `at`; the association is a constant."""
    if tile == (1, 1):
        return refine(weights, at, x, num_heads)
    batch, channels, height, width = x.shape
    (h, w), eps = tile, 1e-12
    padded = F.pad(x, (0, -width % w, 0, -height % h))
    gh, gw = padded.shape[2] // h, padded.shape[3] // w
    pixels = padded.reshape(batch, channels, gh, h, gw, w)  # indices b c i y j x

    def unfold(stokens: Tensor) -> Tensor:
        parts = F.conv2d(stokens.reshape(-1, 1, gh, gw), weights[f"{at}unfold.weights"], padding=1)
        return parts.reshape(batch, -1, 9, gh, gw)  # b c k i j

    def fold(parts: Tensor) -> Tensor:
        sums = F.conv_transpose2d(parts.reshape(-1, 9, gh, gw), weights[f"{at}fold.weights"], padding=1)
        return sums.reshape(batch, -1, gh, gw)

    stokens = pixels.mean((3, 5))
    for _ in range(n_iter):
        with torch.no_grad():
            logits = torch.einsum("bciyjx,bckij->biyjxk", pixels, unfold(stokens)) * channels**-0.5
            shares = logits.softmax(-1)
            mass = fold(torch.einsum("biyjxk->bkij", shares)[:, None])
        stokens = fold(torch.einsum("bciyjx,biyjxk->bckij", pixels, shares)) / (mass + eps)
    stokens = refine(weights, at, stokens, num_heads)
    y = torch.einsum("bckij,biyjxk->bciyjx", unfold(stokens), shares)
    return y.reshape(padded.shape)[:, :, :height, :width]


def refine(weights: Weights, at: str, x: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention over all positions; qkv's channels hold each head's q, then its k, then its v."""
    batch, channels, height, width = x.shape
    bias = weights.get(f"{at}stoken_refine.qkv.bias")
    qkv = F.conv2d(x, weights[f"{at}stoken_refine.qkv.weight"], bias).reshape(batch, num_heads, -1, height * width)
    q, k, v = qkv.split(channels // num_heads, 2)
    shares = (torch.einsum("bhdq,bhdk->bhqk", q, k) * (channels // num_heads) ** -0.5).softmax(-1)
    y = torch.einsum("bhqk,bhdk->bhdq", shares, v).reshape(x.shape)
    return F.conv2d(y, weights[f"{at}stoken_refine.proj.weight"], weights[f"{at}stoken_refine.proj.bias"])
