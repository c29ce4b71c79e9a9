"""Super Token Vision Transformers: the published models S, B, L and a tiny one (Huang et al., CVPR 2023, table 1)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .checks import check_images
from .modules import SuperTokenBlock
from .tensors import laid_out

# Steps of their own to torch.fx, whose proxies have neither shape nor strides.
for _name in ("check_images", "laid_out"):
    torch.fx.wrap(_name)

# What tells the models apart. Everywhere: tiles of 8, 4, 1, 1 pixels a side, one iteration, MLP ratio 4.
CONFIGS: dict[str, dict[str, Any]] = {
    "stvit_tiny": {"embed_dim": (32, 64, 160, 256), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 5, 8)},
    "stvit_small": {"embed_dim": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)},
    "stvit_base": {
        "embed_dim": (96, 192, 384, 512),
        "depths": (4, 6, 14, 6),
        "num_heads": (2, 3, 6, 8),
        "layerscale": (False, False, True, True),
    },
    "stvit_large": {
        "embed_dim": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (2, 3, 7, 10),
        "layerscale": (False, False, True, True),
    },
}


class PatchEmbed(nn.Module):
    """3x3 convolutions of stride 2, 1, 2, 1, each with GELU, then BatchNorm: (B, in, H, W) -> (B, dim, H/4, W/4)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        channels = in_chans
        for width, stride in ((dim // 2, 2), (dim // 2, 1), (dim, 2), (dim, 1)):
            parts += [nn.Conv2d(channels, width, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(width)]
            channels = width
        self.proj = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """Joins two stages: 3x3 convolution of stride 2 and BatchNorm. (B, in, H, W) -> (B, out, H/2, W/2)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_dim, out_dim, 3, 2, 1), nn.BatchNorm2d(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Stage(nn.Module):
    """Blocks at one resolution, and what leads to the next, which the model calls: returns this stage's feature map."""

    def __init__(self, blocks: Sequence[SuperTokenBlock], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = _recomputed(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), keeping only x for the backward, which runs the block again."""
    if torch.compiler.is_compiling():  # the compiler recomputes values only, never the update of the statistics
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=partial(_recomputation_contexts, block))


def _recomputation_contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_held(block)


@contextmanager
def _statistics_held(block: nn.Module) -> Iterator[None]:
    """Keeps BatchNorm from counting a batch a second time when the backward runs the block again."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def _average(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _maximum(x: Tensor) -> Tensor:
    return F.adaptive_max_pool2d(x, 1).flatten(1)


def _both(x: Tensor) -> Tensor:
    return 0.5 * (_average(x) + _maximum(x))


# (B, C, h, w) -> (B, C), under timm's names; "" leaves the features as they are.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {"avg": _average, "max": _maximum, "avgmax": _both}


class STViT(nn.Module):
    """Super Token Vision Transformer (paper, section 3.1 and table 1).

    Args:
        num_classes: outputs of the head; 0 for none (the model then returns pooled features).
        in_chans: channels of the image.
        embed_dim, depths, num_heads: channels, blocks and heads of each stage.
        n_iter, stoken_size: iterations and pixels a super token (an int or a pair) of each stage.
        mlp_ratio, qkv_bias, qk_scale: of every block.
        projection: channels of the 1x1 convolution before the head; None for none.
        layerscale, init_values: which stages have LayerScale, and what it starts from.
        drop_rate: dropout after the patch embedding, of the refinement's projection and in the MLP.
        attn_drop_rate: dropout of attention weights. drop_path_rate: stochastic depth of the last block; it grows
            linearly from 0 at the first.
        global_pool: "avg", "max", "avgmax" (their mean), or "" to leave features unpooled (only with num_classes=0).
        backend: "auto", "triton", "cuda" or "reference".
        association_grad: False (as the authors train) holds the association constant in the backward.
        device, dtype: of the parameters and buffers; None for PyTorch's defaults.

    Shape: (B, in_chans, H, W) -> (B, num_classes), any H and W, in float16, bfloat16, float32 or float64, in either
    memory format; everything inside runs in channels_last, images in the other format are converted once.
    Parameters are contiguous; `model.to(memory_format=torch.channels_last)` saves a copy of seven small weights a step.

    Raises TypeError or ValueError naming the argument; `forward` does so for images of a wrong rank, channel count or
    dtype. The methods are those that timm's tools call; `forward_stages` serves detection and segmentation.
    """

    num_classes: int
    global_pool: str
    head: nn.Module

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        embed_dim: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        n_iter: Sequence[int] = (1, 1, 1, 1),
        stoken_size: Sequence[int | tuple[int, int]] = (8, 4, 1, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        projection: int | None = 1024,
        layerscale: Sequence[bool] = (False, False, False, False),
        init_values: float = 1e-6,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        global_pool: str = "avg",
        backend: str = "auto",
        association_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        per_stage = {
            "embed_dim": embed_dim, "num_heads": num_heads, "n_iter": n_iter, "stoken_size": stoken_size,
            "layerscale": layerscale,
        }  # fmt: skip
        for name, values in per_stage.items():
            if len(values) != len(depths):
                raise ValueError(f"{name}: expected {len(depths)} values, one a stage, got {values!r}")
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = projection or embed_dim[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}.blocks.{depths[i] - 1}"}
            for i, dim in enumerate(embed_dim)
        ]
        self.feature_info[-1]["num_chs_norm"] = self.num_features
        self.pruned: tuple[str, ...] = ()  # prefixes of what prune_intermediate_layers took away
        self.patch_embed = PatchEmbed(in_chans, embed_dim[0])
        self.pos_drop = nn.Dropout(drop_rate)
        # On the CPU whatever the default device is, and rounded to float32 as the authors' schedule is.
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            blocks = [
                SuperTokenBlock(
                    embed_dim[i],
                    stoken_size[i],
                    n_iter[i],
                    num_heads[i],
                    mlp_ratio,
                    qkv_bias,
                    qk_scale,
                    drop_rate,
                    attn_drop_rate,
                    next(drop_paths),
                    act_layer,
                    layerscale[i],
                    init_values,
                    association_grad=association_grad,
                    backend=backend,
                )
                for _ in range(depth)
            ]
            last = i == len(depths) - 1
            self.layers.append(Stage(blocks, None if last else Downsample(embed_dim[i], embed_dim[i + 1])))
        self.proj: nn.Module = nn.Conv2d(embed_dim[-1], projection, 1) if projection else nn.Identity()
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features)
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a fresh one (0 classes: none) and, if named, the pooling."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in (*POOLS, ""):
            raise ValueError(f"global_pool: expected {', '.join(map(repr, POOLS))} or '', got {pool!r}")
        if num_classes < 0 or (num_classes > 0 and not pool):
            raise ValueError(f"num_classes: expected 0 or more, and 0 with global_pool='', got {num_classes}")
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Identity()
        if num_classes:
            place = next(self.parameters())  # where the rest of the model is, and its dtype
            self.head = nn.Linear(self.num_features, num_classes, device=place.device, dtype=place.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward recomputes each block from its input instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay beside the vectors, which timm exempts by itself: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for timm's layer-wise learning rates: a group a stage if coarse, else a group a block."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)"}
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99998,)),
            (r"^(?:proj|norm)\.", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def forward_stages(self, x: Tensor, stages: int | None = None) -> list[Tensor]:
        """The feature maps of all stages, or the first few: (B, embed_dim[i], H / 4 / 2**i, W / 4 / 2**i)."""
        check_images(x, self.in_chans)
        x = self.pos_drop(self.patch_embed(laid_out(x, True)))
        maps: list[Tensor] = []
        downsample: Any = None
        for stage in list(self.layers)[:stages]:
            x = stage(x if downsample is None else downsample(x))
            downsample = stage.downsample
            maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Features before pooling: (B, in_chans, H, W) -> (B, num_features, H / 32, W / 32)."""
        return self._finish(self.forward_stages(x)[-1])

    def _finish(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.proj(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """timm's way to feature maps: (what `forward_features` returns, [maps]), or the maps alone.

        Args:
            indices: which stages, negative ones counted from the end; an int for the last so many, None for all.
            norm: pass the last stage's map through the projection and norm before the head.
            stop_early: run no stage behind the last one wanted (with `intermediates_only`).
            output_fmt: "NCHW" alone.

        Raises IndexError for a stage that there isn't, ValueError for another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        last = len(self.layers) - 1
        wanted = _stage_indices(indices, len(self.layers))
        early = stop_early and intermediates_only
        maps = self.forward_stages(x, max(wanted, default=-1) + 1 if early else None)
        finished = self._finish(maps[-1]) if len(maps) == last + 1 and (norm or not intermediates_only) else None
        chosen = [finished if norm and index == last else maps[index] for index in wanted]
        return chosen if intermediates_only else (finished, chosen)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Takes away what the stages `indices` don't need, for use as a backbone; returns them as plain indices.

        Without it DistributedDataParallel would wait for gradients that never come. Raises IndexError as above.
        """
        wanted = _stage_indices(indices, len(self.layers))
        end = max(wanted, default=-1) + 1
        self.pruned += tuple(f"layers.{index}." for index in range(end, len(self.layers)))
        self.layers = self.layers[:end]
        if end:
            last: Any = self.layers[-1]
            last.downsample = None
            self.pruned += (f"layers.{end - 1}.downsample.",)
        if prune_norm:
            self.proj = self.norm = nn.Identity()
            self.pruned += ("proj.", "norm.")
        if prune_head:
            self.reset_classifier(0, "")
            self.pruned += ("head.",)
        return wanted

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools features and classifies them: (B, num_features, h, w) -> (B, num_classes), or pooled if pre_logits."""
        if self.global_pool:
            x = POOLS[self.global_pool](x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script takes in the model's place."""
        return Scriptable(self)


class Scriptable(nn.Module):
    """The model for torch.jit.script, which can't read this package's source: a trace of the reference, for evaluation.

    (B, in_chans, H, W) -> what the model returns, of any batch and size: where the trace is recorded every tile is
    padded, so padding is a step of it, by nothing where nothing is missing. Raises RuntimeError in training mode.
    """

    def __init__(self, model: STViT) -> None:
        super().__init__()
        copied = copy.deepcopy(model).eval()
        parts: list[Any] = [part for part in copied.modules() if hasattr(part, "backend")]
        for part in parts:
            part.backend = "reference"
        height, width = unpadded_steps(model)
        x = next(copied.parameters()).new_zeros(2, model.in_chans, height + 1, width + 1)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are looked at, by the checks
            self.traced = torch.jit.trace(copied, x, check_trace=False)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("a scripted STViT is for evaluation: call eval(), or train the model itself")
        return self.traced(x)


def unpadded_steps(model: STViT) -> tuple[int, int]:
    """What height and width are multiples of where no stage pads a tile, nor the convolutions in front: 32, 32 for
    tiles of 8, 4, 1 and 1 pixels at strides 4, 8, 16 and 32."""
    stages: list[Any] = list(model.layers)
    strides = [4 * 2**i for i in range(len(stages))]
    tiles = [stage.blocks[-1].attn.stoken_size for stage in stages]
    height, width = (
        math.lcm(*strides, *(stride * tile[side] for stride, tile in zip(strides, tiles, strict=True)))
        for side in (0, 1)
    )
    return height, width


def _stage_indices(indices: int | Sequence[int] | None, stages: int) -> list[int]:
    """0 <= index < stages of the chosen stages: the last so many of an int, all of None; IndexError otherwise."""
    if isinstance(indices, int) and not 0 < indices <= stages:
        raise IndexError(f"out_indices: expected the last 1 to {stages} stages, got {indices}")
    if indices is None or isinstance(indices, int):
        return list(range(stages - (stages if indices is None else indices), stages))
    if not all(-stages <= index < stages for index in indices):
        raise IndexError(f"out_indices: expected stages from {-stages} to {stages - 1}, got {tuple(indices)}")
    return [index % stages for index in indices]


def stvit_tiny(**options: Any) -> STViT:
    """A small STViT for CPUs and tests, not in the paper; takes STViT's arguments."""
    return STViT(**{**CONFIGS["stvit_tiny"], **options})


def stvit_small(**options: Any) -> STViT:
    """STViT-S: 25,495,624 parameters, 4.4 GMACs at 224, 83.6 % top-1; takes STViT's arguments."""
    return STViT(**{**CONFIGS["stvit_small"], **options})


def stvit_base(**options: Any) -> STViT:
    """STViT-B: 51,691,288 parameters, 9.9 GMACs at 224, 84.8 % top-1; takes STViT's arguments."""
    return STViT(**{**CONFIGS["stvit_base"], **options})


def stvit_large(**options: Any) -> STViT:
    """STViT-L: 94,971,096 parameters, 15.6 GMACs at 224, 85.3 % top-1; takes STViT's arguments."""
    return STViT(**{**CONFIGS["stvit_large"], **options})
