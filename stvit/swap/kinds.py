"""The classes that `stvit.accelerate` puts in front of the authors' classes, and of copies of them.

Modules are found by structure (attribute names, kinds of submodules, shapes), never by class name or import path. The
original forward is there, as super().forward, for every call that ours doesn't cover: see fronts.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..backends import dispatch
from ..bypass import silent
from ..checks import stoken_pair
from ..tensors import DTYPES, is_channels_last, memory_format, transformed
from .fronts import Subclassed

logger = logging.getLogger("stvit")
INTERNALS = frozenset(vars(nn.Module()))
PLAIN = (bool, int, float, str, type(None))


def _idle(drop: nn.Module) -> bool:
    """Whether this nn.Dropout (or nn.Identity) passes its input on."""
    return not drop.training or getattr(drop, "p", 0.0) == 0.0


def _not_pointwise(module: nn.Module, name: str) -> str | None:
    """Why the submodule `name` isn't a plain 1x1 convolution, or None. It is called, so a subclass is fine."""
    conv = module._modules[name]
    if not isinstance(conv, nn.Conv2d):
        return f"{name} is a {type(conv).__name__}, expected a 1x1 nn.Conv2d"
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1 and conv.padding in ((0, 0), 0)
    return None if plain else f"{name} isn't a plain 1x1 convolution: {conv}"


class Accelerated(Subclassed):
    """Our forward for one 4-D tensor where `covers` says so; the original's for every other call.

    `compute` is what a swapped module computes, as a function of any module of the structure that `misfit` accepts.
    """

    prefix = "Accelerated"
    does: str
    # Values of settings to try, and what to say when each agrees in its output and none in its gradient.
    variants: tuple[dict[str, Any], ...] = ({},)
    unlike: str | None = None
    # Plain attributes that `compute` reads at each call, so that they may change.
    reads: frozenset[str] = frozenset()
    _stvit_backend: str
    _stvit_answers_nchw = False  # whether the original's output isn't in channels_last when the input is
    _stvit_keep_format = False  # whether ours is then put in that format too
    _stvit_changed: str | None = None  # which attribute was set since, if any
    _stvit_told = False
    _stvit_parameters: tuple[Tensor | None, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith(("_stvit_", "__")) and name not in INTERNALS | self.reads and isinstance(value, PLAIN):
            if name not in vars(self) or vars(self)[name] != value:
                vars(self)["_stvit_changed"] = f"its attribute {name} was set"
        super().__setattr__(name, value)

    def changed(self) -> str | None:
        """Why the module may compute something else than when it was tried, or None.

        Its parameters, where ours are used without a call, are held to be the same objects: a tool that folds the
        identity into a convolution gives it new ones. (Not looked up while compiling.)
        """
        if self._stvit_changed is None and not torch.compiler.is_compiling():
            now = self.used(self)
            if len(now) != len(self._stvit_parameters) or any(
                a is not b for a, b in zip(now, self._stvit_parameters, strict=True)
            ):
                return "its parameters were replaced"
        return self._stvit_changed

    def _as_tried(self) -> bool:
        reason = self.changed()
        if reason and not self._stvit_told and not torch.compiler.is_compiling():
            self._stvit_told = True
            logger.warning(
                "accelerate: %s since, so a %s runs its own forward; stvit.accelerate tries it again",
                reason, vars(type(self))["stvit_original"].__name__,
            )  # fmt: skip
        return reason is None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not transformed() and self.covers(self):
            x = args[0]
            if x.dim() == 4 and x.dtype in DTYPES and self._as_tried():
                y = self.compute(self, x, self._stvit_backend)
                return y.contiguous() if self._stvit_keep_format and self._stvit_answers_nchw else y
        return super().forward(*args, **kwargs)

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        """Whether the module has the tell-tale submodules, so that leaving it needs a reason."""
        raise NotImplementedError

    @staticmethod
    def misfit(module: Any) -> str | None:
        """Why the structure is another than the authors', or None."""
        raise NotImplementedError

    @staticmethod
    def covers(module: Any) -> bool:
        raise NotImplementedError

    @staticmethod
    def compute(module: Any, x: Tensor, backend: str) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def used(module: Any) -> tuple[Tensor | None, ...]:
        """Parameters of submodules that `compute` uses without calling them."""
        return ()

    @staticmethod
    def settings(module: Any) -> dict[str, Any]:
        """Attributes that `compute` needs beside the module's own; their names start with _stvit_."""
        return {}

    @staticmethod
    def trial_sizes(module: Any) -> list[tuple[int, int]]:
        """Images (H, W) to try the module with, the first few that its own forward accepts."""
        return [(5, 6), (1, 1), (9, 7)]

    def remark(self) -> str:
        """What runs in the place of what, for reports."""
        return f"{self.does} in place of {vars(type(self))['stvit_original'].__name__}, backend={self._stvit_backend!r}"


class AcceleratedNorm(Accelerated):
    """LayerNorm over channels, without permutes. Structure: `norm`, an nn.LayerNorm, and nothing else."""

    does = "LayerNorm over channels"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return set(module._modules) == {"norm"} and isinstance(module._modules["norm"], nn.LayerNorm)

    @staticmethod
    def misfit(module: Any) -> str | None:
        if type(module.norm) is not nn.LayerNorm or len(module.norm.normalized_shape) != 1:
            return "norm isn't an nn.LayerNorm over one dimension"
        return None if module.norm.bias is not None else "norm has no weight or no bias"

    @staticmethod
    def covers(module: Any) -> bool:
        return type(module.norm) is nn.LayerNorm and silent(module.norm)

    @staticmethod
    def used(module: Any) -> tuple[Tensor | None, ...]:
        return module.norm.weight, module.norm.bias

    @staticmethod
    def compute(module: Any, x: Tensor, backend: str) -> Tensor:
        norm = module.norm
        return functional.channel_layer_norm(x, norm.weight, norm.bias, norm.eps, backend)


class AcceleratedDepthwise(Accelerated):
    """x + depthwise3x3(x) in one pass. Structure: `conv`, a depthwise 3x3 nn.Conv2d, and nothing else."""

    does = "residual depthwise convolution"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        conv = module._modules.get("conv")
        return set(module._modules) == {"conv"} and isinstance(conv, nn.Conv2d) and conv.groups > 1

    @staticmethod
    def misfit(module: Any) -> str | None:
        conv = module.conv
        if type(conv) is not nn.Conv2d:
            return f"conv is a {type(conv).__name__}, expected nn.Conv2d"
        geometry = (conv.kernel_size, conv.stride, conv.dilation, conv.padding_mode)
        padded = conv.padding in ("same", (1, 1))
        if geometry != ((3, 3), (1, 1), (1, 1), "zeros") or not padded or conv.weight.shape[:2] != (conv.groups, 1):
            return f"conv isn't depthwise 3x3 with stride 1 and padding 1: {conv}"
        return None

    @staticmethod
    def covers(module: Any) -> bool:
        return type(module.conv) is nn.Conv2d and silent(module.conv)

    @staticmethod
    def used(module: Any) -> tuple[Tensor | None, ...]:
        return module.conv.weight, module.conv.bias

    @staticmethod
    def compute(module: Any, x: Tensor, backend: str) -> Tensor:
        return functional.residual_depthwise(x, module.conv.weight, module.conv.bias, False, backend)


class AcceleratedMlp(Accelerated):
    """The MLP with GELU inside the depthwise op, so that its output is never written.

    Structure: 1x1 convolutions `fc1` and `fc2`, nn.GELU `act1` or `act`, `conv` with the structure of
    `AcceleratedDepthwise`, nn.Dropout `drop`, and nothing else. With dropout active the original runs, with the
    depthwise op inside it swapped.
    """

    does = "MLP with fused GELU"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return {"fc1", "fc2", "conv"} <= set(module._modules)

    @staticmethod
    def misfit(module: Any) -> str | None:
        act = _activation(module)
        if set(module._modules) != {"fc1", act, "fc2", "drop", "conv"}:
            return f"submodules are {', '.join(module._modules)}; expected fc1, act1 or act, fc2, drop and conv"
        if type(getattr(module, act)) is not nn.GELU or getattr(module, act).approximate != "none":
            return f"{act} is {getattr(module, act)}; expected exact GELU"
        if type(module.drop) is not nn.Dropout:
            return f"drop is a {type(module.drop).__name__}, expected nn.Dropout"
        if not AcceleratedDepthwise.resembles(module.conv):
            return "conv isn't a module with one depthwise convolution, conv"
        reason = _not_pointwise(module, "fc1") or _not_pointwise(module, "fc2")
        return reason or AcceleratedDepthwise.misfit(module.conv)

    @staticmethod
    def covers(module: Any) -> bool:
        act, drop, conv = getattr(module, module._stvit_act), module.drop, module.conv
        swapped = isinstance(conv, AcceleratedDepthwise) and conv.covers(conv) and conv._as_tried()
        return swapped and type(act) is nn.GELU and _idle(drop) and silent(act, drop, module.conv)

    @staticmethod
    def compute(module: Any, x: Tensor, backend: str) -> Tensor:
        conv = module.conv.conv
        hidden = functional.residual_depthwise(module.fc1(x), conv.weight, conv.bias, True, backend)
        return module.drop(module.fc2(hidden))

    @staticmethod
    def settings(module: Any) -> dict[str, Any]:
        return {"_stvit_act": _activation(module)}


class AcceleratedAttention(Accelerated):
    """Multi-head attention by scaled_dot_product_attention on strided views of one product.

    Structure: 1x1 convolutions `qkv` (3 dim outputs, grouped by head) and `proj`, `num_heads`, `scale`, dropouts
    `attn_drop` and `proj_drop` or neither. With attn_drop active the original runs, with its random numbers; so it
    does on the reference backend, whose softmax is explicit.
    """

    does = "scaled_dot_product_attention"
    reads = frozenset(("num_heads", "scale"))

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        return {"qkv", "proj"} <= set(module._modules)

    @staticmethod
    def misfit(module: Any) -> str | None:
        if not set(module._modules) <= {"qkv", "proj", "attn_drop", "proj_drop"}:
            return f"submodules are {', '.join(module._modules)}; expected qkv, proj, attn_drop and proj_drop"
        reason = _not_pointwise(module, "qkv") or _not_pointwise(module, "proj")
        if reason:
            return reason
        drop = module._modules.get("attn_drop")
        if drop is not None and type(drop) not in (nn.Dropout, nn.Identity):
            return f"attn_drop is a {type(drop).__name__}, expected nn.Dropout"
        heads, scale = getattr(module, "num_heads", None), getattr(module, "scale", None)
        if not isinstance(heads, int) or not isinstance(scale, (int, float)):
            return f"num_heads and scale are {heads!r} and {scale!r}; expected an int and a float"
        if module.qkv.out_channels != 3 * module.proj.in_channels or module.proj.in_channels % heads:
            return f"qkv has {module.qkv.out_channels} outputs for proj's {module.proj.in_channels} and {heads} heads"
        return None

    @staticmethod
    def covers(module: Any) -> bool:
        backend = dispatch.default_backend() if module._stvit_backend == "auto" else module._stvit_backend
        drop = module._modules.get("attn_drop")
        return backend != "reference" and (drop is None or (_idle(drop) and silent(drop)))

    @staticmethod
    def trial_sizes(module: Any) -> list[tuple[int, int]]:
        return [(5, 6), (1, 1), (15, 17)]  # the last one larger than windows of 7 or 14 pixels

    @staticmethod
    def compute(module: Any, x: Tensor, backend: str) -> Tensor:
        tokens = module.qkv(x).flatten(2).transpose(1, 2).contiguous()  # (B, N, 3C): no copy in channels_last
        y = functional.multi_head_attention(tokens, module.num_heads, module.scale)
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])
        y = module.proj(y.contiguous(memory_format=memory_format(is_channels_last(x))))
        return module.proj_drop(y) if "proj_drop" in module._modules else y


class AcceleratedStokenAttention(Accelerated):
    """Super token attention by `super_token_sampling` and `token_upsampling`.

    Structure: `unfold` and `fold`, each with a constant one-hot (9, 1, 3, 3) tensor or without tensors, or neither of
    them but a `stoken_refine`, which is any module or missing otherwise; attributes
    `stoken_size` or `kernel_size`, `n_iter` or `layers` (1 if neither), `scale` (C ** -0.5 if missing), `refine`
    (true if missing). All are read at each call, except a tile held in a tensor, which is read once.
    """

    does = "super token sampling and upsampling"
    reads = frozenset(("stoken_size", "kernel_size", "n_iter", "layers", "scale", "refine"))
    variants = ({"_stvit_association_grad": False}, {"_stvit_association_grad": True})
    unlike = "its gradient is neither that of a constant association nor the whole one"

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        names = set(module._modules)
        return {"unfold", "fold"} <= names or (names == {"stoken_refine"} and hasattr(module, "stoken_size"))

    @staticmethod
    def misfit(module: Any) -> str | None:
        if not set(module._modules) <= {"unfold", "fold", "stoken_refine"}:
            return f"submodules are {', '.join(module._modules)}; expected unfold, fold and stoken_refine"
        for name in {"unfold", "fold"} & set(module._modules):
            part: Any = module._modules[name]
            for key, tensor in (*part.named_parameters(), *part.named_buffers()):
                if tensor.requires_grad or not is_one_hot(tensor):
                    return f"{name}.{key} aren't constant one-hot kernels (9, 1, 3, 3)"
        try:
            _pair(getattr(module, _tile_name(module)))
        except (AttributeError, TypeError, ValueError) as error:
            return str(error)
        n_iter = _rounds(module)
        if type(n_iter) is not int or n_iter < 1:
            return f"n_iter is {n_iter!r}, expected a positive int"
        if not isinstance(getattr(module, "scale", 1.0), (int, float)):
            return f"scale is {module.scale!r}, expected a float"
        return None

    @staticmethod
    def covers(module: Any) -> bool:
        return silent(*(module._modules[name] for name in ("unfold", "fold") if name in module._modules))

    @staticmethod
    def compute(module: Any, x: Tensor, backend: str) -> Tensor:
        refine = module.stoken_refine if _refines(module) else None
        held = getattr(module, module._stvit_tile_name)
        tile = module._stvit_tile if isinstance(held, Tensor) else _pair(held)
        if tile == (1, 1):
            return x if refine is None else refine(x)
        stokens, association = functional.super_token_sampling(
            x, tile, _rounds(module), getattr(module, "scale", None), module._stvit_association_grad, backend
        )
        return functional.token_upsampling(stokens if refine is None else refine(stokens), association, backend)

    @staticmethod
    def settings(module: Any) -> dict[str, Any]:
        name = _tile_name(module)
        tile = _pair(getattr(module, name))
        return {"_stvit_tile_name": name, "_stvit_tile": tile, "_stvit_association_grad": False}

    @staticmethod
    def trial_sizes(module: Any) -> list[tuple[int, int]]:
        # 3 x 3 tiles, so that there is one with all its neighbours, the last ones padded; less than a tile, which some
        # copies shrink to the image; an odd size larger than windows that a refinement may have; whole, for copies
        # that don't pad.
        h, w = _pair(getattr(module, _tile_name(module)))
        padded = [(3 * h - h // 2, 3 * w - w // 2), ((h + 1) // 2, (w + 1) // 2), (max(15, 4 * h + 1), 5 * w + 2)]
        return [*padded, (3 * h, 3 * w), (5 * h, 4 * w)]

    def remark(self) -> str:
        return f"{super().remark()}, association_grad={self._stvit_association_grad}"


KINDS = (AcceleratedStokenAttention, AcceleratedAttention, AcceleratedMlp, AcceleratedDepthwise, AcceleratedNorm)


def is_one_hot(tensor: Tensor) -> bool:
    """Whether a tensor is the constant by which the authors' convolutions unfold: nine one-hot 3 x 3 kernels."""
    one_hot = torch.eye(9, dtype=tensor.dtype).reshape(9, 1, 3, 3)
    return tensor.shape == one_hot.shape and torch.equal(tensor.detach().cpu(), one_hot)


def _pair(size: Any) -> tuple[int, int]:
    return stoken_pair(size.tolist() if isinstance(size, Tensor) else size)


def _tile_name(module: nn.Module) -> str:
    for name in ("stoken_size", "kernel_size"):
        if hasattr(module, name):
            return name
    raise AttributeError("it has no attribute stoken_size or kernel_size")


def _rounds(module: Any) -> Any:
    return getattr(module, "n_iter", None) or getattr(module, "layers", 1)


def _refines(module: Any) -> bool:
    return "stoken_refine" in module._modules and bool(getattr(module, "refine", True))


def _activation(module: nn.Module) -> str:
    return "act1" if "act1" in module._modules else "act"
