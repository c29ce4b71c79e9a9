"""Networks that stvit.accelerate meets: classes with the structure of the authors' code, and variants found in copies.

What identifies the authors' classes is kept: names of attributes, parameters and submodules, their shapes, the order
of operations, the gradient. Class names and the wording are our own, so nothing here can be found by name. Shapes:
B images, C channels, T = gh * gw tiles of P = h * w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        channels_at_the_end = x.permute(0, 2, 3, 1).contiguous()
        return self.norm(channels_at_the_end).permute(0, 3, 1, 2).contiguous()


class Position(nn.Module):
    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.dim, self.kernel_size = dim, kernel_size
        self.conv = nn.Conv2d(dim, dim, kernel_size, 1, kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class ConvMlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act_layer: type[nn.Module] = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.hidden_features, self.out_features = dim, hidden, dim
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act1 = act_layer()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)
        self.conv = Position(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.drop(self.act1(self.fc1(x))))
        return self.drop(self.fc2(hidden))


class HeadAttention(nn.Module):
    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_scale: float | None = None,
        attn_drop: float = 0.0, proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.num_heads, self.window_size = dim, num_heads, None
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        by_head = self.qkv(x).reshape(x.shape[0], self.num_heads, -1, x.shape[2] * x.shape[3])
        q, k, v = by_head.chunk(3, dim=2)  # (B, heads, head_dim, N)
        shares = self.attn_drop((k.mT @ q * self.scale).softmax(dim=-2))  # (B, heads, keys, queries)
        return self.proj_drop(self.proj((v @ shares).reshape(x.shape))), shares

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)[0]


class Gather(nn.Module):
    """(B, C, gh, gw) -> (B, 9 C, T): the 3 x 3 neighbours of each super token."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_size = 3
        self.weights = nn.Parameter(torch.eye(9).reshape(9, 1, 3, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, gh, gw = x.shape
        near = F.conv2d(x.reshape(batch * channels, 1, gh, gw), self.weights, padding=1)
        return near.reshape(batch, 9 * channels, gh * gw)


class Scatter(nn.Module):
    """(B, 9, gh, gw) -> (B, 1, gh, gw): adds up what each tile holds for its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel_size = 3
        self.weights = nn.Parameter(torch.eye(9).reshape(9, 1, 3, 3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weights, padding=1)


class TokenAttention(nn.Module):
    association_grad = False  # the authors hold the association constant
    constant_mass = True

    def __init__(
        self, dim: int, stoken_size: Any, n_iter: int = 1, refine: bool = True, refine_attention: bool = True,
        num_heads: int = 8, qkv_bias: bool = False, qk_scale: float | None = None, attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_iter, self.stoken_size = n_iter, stoken_size
        self.refine, self.refine_attention = refine, refine_attention
        self.scale = dim**-0.5
        self.unfold, self.fold = Gather(), Scatter()
        if refine and refine_attention:
            self.stoken_refine = HeadAttention(dim, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop)
        elif refine:
            self.stoken_refine = nn.Sequential(
                nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.Conv2d(dim, dim, 1)
            )

    def tile(self) -> tuple[int, int]:
        size = self.stoken_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def rounds(self) -> int:
        return self.n_iter

    def forward(self, x: Tensor) -> Tensor:
        if self.tile() == (1, 1):
            return self.refined(x)
        height, width = x.shape[2:]
        pixels, stokens, grid = self.split(x)
        with torch.set_grad_enabled(self.association_grad and torch.is_grad_enabled()):
            for step in range(self.rounds()):
                shares = self.associate(pixels, stokens)
                mass = self.fold(shares.sum(2).mT.reshape(x.shape[0], 9, *grid))
                if step < self.rounds() - 1:
                    stokens = self.sums(pixels, shares, grid) / (mass + 1e-12)
        mass = mass.detach() if self.constant_mass else mass
        stokens = self.refined(self.sums(pixels, shares, grid) / (mass + 1e-12))
        return self.joined(self.near(stokens) @ shares.mT, grid)[:, :, :height, :width]

    def refined(self, stokens: Tensor) -> Tensor:
        return self.stoken_refine(stokens) if self.refine else stokens

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Pixels (B, T, P, C), pooled super tokens (B, C, gh, gw) and the grid (gh, gw)."""
        h, w = self.tile()
        x = F.pad(x, (0, -x.shape[3] % w, 0, -x.shape[2] % h))
        batch, channels, height, width = x.shape
        gh, gw = height // h, width // w
        pixels = x.reshape(batch, channels, gh, h, gw, w).permute(0, 2, 4, 3, 5, 1)
        return pixels.reshape(batch, gh * gw, h * w, channels), F.adaptive_avg_pool2d(x, (gh, gw)), (gh, gw)

    def near(self, stokens: Tensor) -> Tensor:
        """(B, T, C, 9)."""
        batch, channels, gh, gw = stokens.shape
        return self.unfold(stokens).mT.reshape(batch, gh * gw, channels, 9)

    def associate(self, pixels: Tensor, stokens: Tensor) -> Tensor:
        """(B, T, P, 9)."""
        return (pixels @ self.near(stokens) * self.scale).softmax(-1)

    def sums(self, pixels: Tensor, shares: Tensor, grid: tuple[int, int]) -> Tensor:
        parts = (pixels.mT @ shares).permute(0, 2, 3, 1)  # (B, C, 9, T)
        return self.fold(parts.reshape(-1, 9, *grid)).reshape(pixels.shape[0], -1, *grid)

    def joined(self, tiles: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, T, C, P) -> (B, C, gh h, gw w)."""
        (gh, gw), (h, w) = grid, self.tile()
        batch, _, channels, _ = tiles.shape
        tiles = tiles.reshape(batch, gh, gw, channels, h, w).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(batch, channels, gh * h, gw * w)


class Block(nn.Module):
    def __init__(
        self, dim: int, stoken_size: Any, num_heads: int, drop: float = 0.0, attn_drop: float = 0.0,
        drop_path: float = 0.0, layerscale: bool = False, init_values: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layerscale = layerscale
        self.pos_embed = Position(dim, 3)
        self.norm1 = PixelNorm(dim)
        self.attn = TokenAttention(
            dim, stoken_size, num_heads=num_heads, qkv_bias=True, attn_drop=attn_drop, proj_drop=drop
        )
        self.drop_path = DropSamples(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp2 = ConvMlp(dim, 4 * dim, drop=drop)
        if layerscale:
            self.gamma_1 = nn.Parameter(init_values * torch.ones(1, dim, 1, 1))
            self.gamma_2 = nn.Parameter(init_values * torch.ones(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(self.gamma_1 * y if self.layerscale else y)
        y = self.mlp2(self.norm2(x))
        return x + self.drop_path(self.gamma_2 * y if self.layerscale else y)


class DropSamples(nn.Module):
    """Stochastic depth as timm draws it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)


class Join(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, out, 3, 2, 1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stem(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        half = dim // 2
        for wide, narrow, stride in ((half, in_chans, 2), (half, half, 1), (dim, half, 2), (dim, dim, 1)):
            parts += [nn.Conv2d(narrow, wide, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(wide)]
        self.proj = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stage(nn.Module):
    def __init__(self, blocks: list[Block], downsample: Join | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Network(nn.Module):
    """The whole model."""

    def __init__(
        self, embed_dim: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], stoken_size: Sequence[Any],
        layerscale: Sequence[bool], num_classes: int, projection: int, drop: float = 0.0, attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch_embed = Stem(3, embed_dim[0])
        self.pos_drop = nn.Dropout(drop)
        self.layers = nn.ModuleList()
        rates = iter(torch.linspace(0, drop_path, sum(depths)).tolist())
        for i, depth in enumerate(depths):
            tile = (stoken_size[i],) * 2 if isinstance(stoken_size[i], int) else stoken_size[i]
            blocks = [
                Block(embed_dim[i], tile, num_heads[i], drop, attn_drop, next(rates), layerscale[i])
                for _ in range(depth)
            ]
            self.layers.append(Stage(blocks, Join(*embed_dim[i : i + 2]) if i < len(depths) - 1 else None))
        self.proj = nn.Conv2d(embed_dim[-1], projection, 1)
        self.norm = nn.BatchNorm2d(projection)
        self.swish = nn.SiLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(projection, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_drop(self.patch_embed(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.avgpool(self.swish(self.norm(self.proj(x)))).flatten(1))


SMALL: dict[str, Any] = {
    "embed_dim": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 3), "stoken_size": (4, 2, 1, 1),
    "layerscale": (False, False, True, True), "num_classes": 5, "projection": 20,
}  # fmt: skip


def small_network(**options: Any) -> Network:
    """One of every case: tiles of 4, 2 and 1, LayerScale, and padding with 40 x 40 images."""
    return Network(**{**SMALL, **options})


# Variants found in copies of the authors' code.


class TrainedAssociation(TokenAttention):
    """The gradient flows through the association, as where torch.no_grad and detach have been taken out."""

    association_grad = True
    constant_mass = False


class HalfTrainedAssociation(TokenAttention):
    """torch.no_grad taken out, detach of the mass left in: neither of our two gradients."""

    association_grad = True


class OtherNames(TokenAttention):
    """`kernel_size` and `layers` for `stoken_size` and `n_iter`."""

    def __init__(self, dim: int, stoken_size: Any, n_iter: int = 1, **options: Any) -> None:
        super().__init__(dim, stoken_size, n_iter, **options)
        self.kernel_size, self.layers = self.stoken_size, self.n_iter
        del self.stoken_size, self.n_iter

    def tile(self) -> tuple[int, int]:
        return self.kernel_size

    def rounds(self) -> int:
        return self.layers


class TupleTokenAttention(TokenAttention):
    """Returns a tuple, for visualisation."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class TupleHeadAttention(HeadAttention):
    def forward(self, x: Tensor) -> Any:
        return self.attend(x)


class PositionedTokenAttention(TokenAttention):
    """A parameter more, which starts at zero: the same numbers until it is trained."""

    def __init__(self, dim: int, stoken_size: Any, **options: Any) -> None:
        super().__init__(dim, stoken_size, **options)
        self.position = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.position


class ResizedTokenAttention(TokenAttention):
    """Resizes the image where the authors pad it."""

    def forward(self, x: Tensor) -> Tensor:
        (h, w), size = self.tile(), x.shape[2:]
        whole = (-(-size[0] // h) * h, -(-size[1] // w) * w)
        return F.interpolate(super().forward(F.interpolate(x, whole)), size)


class MaskedTokenAttention(TokenAttention):
    """Out-of-grid neighbours are masked."""

    def associate(self, pixels: Tensor, stokens: Tensor) -> Tensor:
        there = self.near(torch.ones_like(stokens)).transpose(2, 3)[..., :1].mT
        return (pixels @ self.near(stokens) * self.scale).masked_fill(there == 0, -torch.inf).softmax(-1)


class UnpaddedTokenAttention(TokenAttention):
    """Takes whole tiles only."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.tile()
        if x.shape[2] % h or x.shape[3] % w:
            raise ValueError("not a whole number of tiles")
        return super().forward(x)


class GroupedHeadAttention(HeadAttention):
    """All heads' q, then all k, then all v, as in timm."""

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).reshape(x.shape[0], 3, self.num_heads, -1, x.shape[2] * x.shape[3]).unbind(1)
        shares = self.attn_drop((k.mT @ q * self.scale).softmax(dim=-2))
        return self.proj_drop(self.proj((v @ shares).reshape(x.shape))), shares


class NoisyPosition(Position):
    """Differs in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.1 if self.training else 0.0)
