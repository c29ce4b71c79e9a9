"""The authors' formulation of a whole model, in our own words: the baseline of bench.training and bench.traffic.

It is our STViT with every part changed whose formulation makes the cost: depthwise convolution, GELU, LayerScale,
drop-path and sums as separate operations, LayerNorm over channels between two contiguous copies, attention as batched
products of (B, heads, d, N) tensors with the softmax written out, super token attention by attention.py beside this
file. State dict, arguments and numbers are those of our model. It runs in the memory format of its weights and images,
NCHW unless the caller changes both. Its SiLU is PyTorch's single op where the authors' is written out: in the
baseline's favour, by 0.2 % of the traffic.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stvit
from bench.baselines.attention import AuthorsStokenAttention
from stvit.model import CONFIGS, STViT
from stvit.modules import Attention, LayerNorm2d, ResidualDepthwise, StokenAttention, SuperTokenBlock

Module = TypeVar("Module", bound=nn.Module)


class AuthorsSTViT(STViT):
    """The stages in the memory format that the images come in."""

    def forward_stages(self, x: Tensor, stages: int | None = None) -> list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        maps: list[Tensor] = []
        for stage in list(self.layers)[:stages]:
            x = stage(x)
            maps.append(x)
            if isinstance(stage.downsample, nn.Module):
                x = stage.downsample(x)
        return maps


class SeparateBlock(SuperTokenBlock):
    """A block whose LayerScale, drop-path and sums are operations of their own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        x = x + self._scaled(self.attn(self.norm1(x)), self.gamma_1)
        return x + self._scaled(self.mlp2(self.norm2(x)), self.gamma_2)

    def _scaled(self, y: Tensor, gamma: Tensor | None) -> Tensor:
        return self.drop_path(y if gamma is None else gamma * y)


class SeparateDepthwise(ResidualDepthwise):
    """GELU where there is one, convolution and sum, each written out."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # fc1 keeps its bias
        h = F.gelu(x) if self.gelu else x
        return h + self.conv(h)


class CopyingLayerNorm2d(LayerNorm2d):
    """LayerNorm over channels between two contiguous copies."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


class SeparateAttention(Attention):
    """Attention whose weights (B, heads, keys, queries) are written out, before and after the softmax."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(x.shape[0], self.num_heads, -1, x.shape[2] * x.shape[3])
        q, k, v = qkv.chunk(3, dim=2)  # each (B, heads, d, N)
        weights = (k.transpose(2, 3) @ q * self.scale).softmax(2)
        y = v @ self.attn_drop(weights)
        return self.proj_drop(self.proj(y.reshape(x.shape)))


class SeparateStokenAttention(StokenAttention):
    """Super token attention by the authors' operations; `core` samples and upsamples."""

    core: AuthorsStokenAttention

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.stoken_size == (1, 1):
            return self.stoken_refine(x)
        stokens, association = self.core.sampling(x)
        return self.core.upsampling(self.stoken_refine(stokens), association, (x.shape[2], x.shape[3]))


FORMULATIONS: dict[type[nn.Module], type[nn.Module]] = {
    STViT: AuthorsSTViT,
    SuperTokenBlock: SeparateBlock,
    ResidualDepthwise: SeparateDepthwise,
    LayerNorm2d: CopyingLayerNorm2d,
    Attention: SeparateAttention,
    StokenAttention: SeparateStokenAttention,
}


def authors_model(name: str, **options: Any) -> STViT:
    """The authors' formulation of `name` ("stvit_small", ...), freshly initialised; `options` are those of STViT.

    Raises ValueError for an unknown name, and for options that the authors' formulation doesn't have.
    """
    if name not in CONFIGS:
        raise ValueError(f"name: expected one of {', '.join(CONFIGS)}, got {name!r}")
    for option in ("backend", "association_grad"):
        if option in options:
            raise ValueError(f"{option}: the authors' formulation has no such option")
    return formulated(getattr(stvit, name)(backend="reference", **options))


def formulated(model: Module) -> Module:
    """The same module, its parts changed to the authors' formulations."""
    for module in list(model.modules()):
        formulation = FORMULATIONS.get(type(module))
        if formulation is not None:
            module.__class__ = formulation  # keeps parameters, buffers and their names
        if isinstance(module, SeparateStokenAttention) and module.stoken_size != (1, 1):
            module.core = AuthorsStokenAttention(module.stoken_size, module.n_iter)
            module.core.register_buffer("shifts", module.core.shifts, persistent=False)  # not in the state dict
    return model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]
