"""A copy of a model for inference only: what evaluation computes, with fewer passes over memory.

What is folded, all of it exact up to rounding, computed in float64:
  * BatchNorm behind a convolution into that convolution (between stages, and before the head);
  * BatchNorm in front of a 1x1 convolution without padding into that one (the MLP's);
  * LayerScale into the last 1x1 convolution of its branch;
  * the identity of a residual depthwise convolution into its centre tap, where a convolution runs. The kernels add the
    identity for free, and in half precision 1 + w would lose the digits of a small w: there it stays as it is.

What isn't: the BatchNorms of the patch embedding. Each stands behind a GELU and in front of a 3x3 convolution, whose
padding puts zeros around the *normalised* map, so a shift moved into that convolution's bias would be wrong along the
border; and moving the scale alone would leave as many passes as before.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .. import functional
from ..backends import dispatch
from ..bypass import plain, silent
from ..model import STViT
from ..modules import Attention, Mlp, ResidualDepthwise, SuperTokenBlock
from .fronts import Subclassed, put_in_front
from .kinds import AcceleratedAttention, AcceleratedDepthwise, AcceleratedMlp
from .trial import TOLERANCE, device_of, exact_dtype, random_double, undisturbed

logger = logging.getLogger("stvit")
Model = TypeVar("Model", bound=nn.Module)

TRAIN = (
    "this copy was made by stvit.optimize_for_inference and can't be trained: its BatchNorms are folded into "
    "convolutions. Train the model it was made from"
)
LOAD = (
    "this copy was made by stvit.optimize_for_inference: its weights are folded, so it takes the state dicts of such "
    "copies only. Load the checkpoint into the model it was made from and optimise that again"
)


class InferenceOnly(Subclassed):
    """Put in front of the class of an optimised model: refuses training mode and foreign weights."""

    prefix = "Inference"

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(TRAIN)
        return super().train(False)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if set(state_dict) != set(self.state_dict()):
            raise RuntimeError(LOAD)
        return super().load_state_dict(state_dict, strict, assign)


class FoldedDepthwise(nn.Module):
    """h + depthwise3x3(h), h = gelu(x) or x, as one convolution where PyTorch runs it; else by the kernels.

    conv: the convolution as it was. folded: its weights plus the identity, (C, 1, 3, 3).
    """

    takes_bias = True
    folded: Tensor

    def __init__(self, conv: nn.Conv2d, gelu: bool, backend: str) -> None:
        super().__init__()
        self.conv = conv
        self.gelu = gelu
        self.backend = backend
        folded = conv.weight.detach().clone()
        folded[:, :, 1, 1] += 1.0
        self.register_buffer("folded", folded)

    def forward(self, x: Tensor, x_bias: Tensor | None = None) -> Tensor:
        """Of x, or of x + x_bias, (C,): the bias that the 1x1 convolution in front has left to this one."""
        whole = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
        if whole and dispatch.choose_for_block(self.backend, x) == "reference":
            x = x if x_bias is None else x + x_bias.view(1, -1, 1, 1)
            h = F.gelu(x) if self.gelu else x
            return F.conv2d(h, self.folded, self.conv.bias, padding=1, groups=x.shape[1])
        conv = self.conv
        return functional.residual_depthwise(x, conv.weight, conv.bias, self.gelu, self.backend, x_bias=x_bias)


def optimize_for_inference(model: Model) -> Model:
    """A copy of `model` in evaluation mode that computes the same, up to rounding, with fewer passes over memory.

    For models of this package, and for the authors' own or copies of it after `accelerate`; of any other network only
    what stands as convolution, BatchNorm in an nn.Sequential is folded. Where the order of a foreign model's parts
    can't be known, folding is tried first on a copy with random parameters in float64, and left out where results
    differ.

    The copy shares no memory with `model`, which stays as it is, and its parameters require no gradient. It is of a
    subclass of the model's class: `train()` raises RuntimeError, and so does `load_state_dict` with weights of an
    unfolded model. Checkpoints are for `model`; make the copy anew after loading one. What was folded is logged
    (logger "stvit", level INFO).

    Raises TypeError if `model` isn't an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    bare: Any = model
    while hasattr(bare, "_orig_mod") or isinstance(bare, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        bare = bare._orig_mod if hasattr(bare, "_orig_mod") else bare.module
    result = copy.deepcopy(bare).eval().requires_grad_(False)
    counts = _fold_affine(result) + _fold_residuals(result)
    left = sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in result.modules())
    put_in_front(InferenceOnly, result)
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    logger.info("optimize_for_inference: folded %s; left %d BatchNorms", told or "nothing", left)
    return result


def _fold_affine(model: nn.Module) -> Counter[str]:
    """Folds every BatchNorm and LayerScale that can be, in place; how many, by kind."""
    users = Counter(id(child) for part in model.modules() for child in part._modules.values())
    counts: Counter[str] = Counter()
    for part in list(model.modules()):
        names = {name for name, child in part._modules.items() if child is not None}
        if type(part) is nn.Sequential:
            counts += _fold_sequence(part, users)
        elif {"attn", "norm2", "mlp2"} <= names and isinstance(part.mlp2, (Mlp, AcceleratedMlp)):
            counts += _fold_if_equal(part, _fold_block, (9, 10))
        elif {"proj", "norm"} <= names:
            counts += _fold_if_equal(part, _fold_head, (64, 64))
    return counts


def _fold_if_equal(part: nn.Module, fold: Callable[[Any], Counter[str]], size: tuple[int, int]) -> Counter[str]:
    """Folds in `part`; for classes other than ours only if a random copy computes the same on an image of this size."""
    if type(part) not in (SuperTokenBlock, STViT):
        try:
            device = device_of(part)
            channels = next(conv.in_channels for conv in part.modules() if isinstance(conv, nn.Conv2d))
            x = torch.randn((2, channels, *size), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            with undisturbed(part), torch.no_grad():
                double, x = random_double(part).eval(), x.to(device, exact_dtype(device))
                before = double(x)
                if not fold(double):
                    return Counter()
                tolerance = TOLERANCE[before.dtype]
                torch.testing.assert_close(double(x), before, rtol=tolerance, atol=tolerance)
        except Exception as error:  # whatever foreign code raises, besides a difference
            why = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.info("optimize_for_inference: left %s as it is: %s", type(part).__name__, why)
            return Counter()
    return fold(part)


def _fold_sequence(sequence: Any, users: Counter[int]) -> Counter[str]:
    """Convolution, BatchNorm -> convolution, identity."""
    counts: Counter[str] = Counter()
    parts: list[tuple[str, Any]] = list(sequence._modules.items())
    for (_, conv), (name, norm) in zip(parts, parts[1:], strict=False):
        if _foldable(conv, norm) and users[id(conv)] == users[id(norm)] == 1:
            _fold_behind(conv, norm)
            sequence._modules[name] = nn.Identity()
            counts["BatchNorms"] += 1
    return counts


def _fold_block(block: Any) -> Counter[str]:
    """x + gamma_1 * attn(norm1(x)), then x + gamma_2 * mlp2(norm2(x)): norm2 into mlp2.fc1, each gamma into the end."""
    counts: Counter[str] = Counter()
    fc1 = block.mlp2.fc1
    if _foldable(fc1, block.norm2) and fc1.kernel_size == (1, 1) and fc1.padding == (0, 0) and fc1.groups == 1:
        _fold_before(block.norm2, fc1)
        block.norm2 = nn.Identity()
        counts["BatchNorms"] += 1
    gammas: list[Any] = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
    refinement = getattr(block.attn, "stoken_refine", None)
    if all(isinstance(gamma, Tensor) for gamma in gammas) and isinstance(refinement, (Attention, AcceleratedAttention)):
        ends = (refinement.proj, block.mlp2.fc2)
        if all(type(conv) is nn.Conv2d and silent(conv) for conv in ends):
            for conv, gamma in zip(ends, gammas, strict=True):
                _scale_outputs(conv, gamma)
            block.gamma_1 = block.gamma_2 = None
            block.layerscale = False  # what the authors' block asks
            counts["LayerScales"] += 2
    return counts


def _fold_head(part: Any) -> Counter[str]:
    """norm(proj(x)) -> proj(x)."""
    if not _foldable(part.proj, part.norm):
        return Counter()
    _fold_behind(part.proj, part.norm)
    part.norm = nn.Identity()
    return Counter({"BatchNorms": 1})


def _fold_residuals(model: nn.Module) -> Counter[str]:
    """Replaces the residual depthwise convolutions of `model` by `FoldedDepthwise`; how many."""
    counts: Counter[str] = Counter()
    parts: list[Any] = list(model.modules())
    for part in parts:
        for name, child in list(part._modules.items()):
            folded: Any = None
            if type(child) is ResidualDepthwise and silent(child) and plain(child.conv, nn.Conv2d):
                folded = FoldedDepthwise(child.conv, child.gelu, child.backend)
            elif isinstance(child, AcceleratedDepthwise) and child.covers(child) and silent(child):
                gelu = isinstance(part, AcceleratedMlp) and part.covers(part)
                if gelu:
                    part._modules[part._stvit_act] = nn.Identity()  # it runs inside now
                conv: Any = child.conv
                folded = FoldedDepthwise(conv, gelu, child._stvit_backend)
            if folded is not None:
                part._modules[name] = folded.eval()
                counts["residual depthwise convolutions"] += 1
    return counts


def _foldable(conv: Any, norm: Any) -> bool:
    plain = type(conv) is nn.Conv2d and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    return plain and norm.running_mean is not None and silent(conv, norm)


def _fold_behind(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """conv becomes norm(conv(x))."""
    mean, var, weight, bias = _statistics(norm)
    old = None if conv.bias is None else conv.bias.double()
    _assign(conv, *fuse_conv_bn_weights(conv.weight.double(), old, mean, var, norm.eps, weight, bias))


def _fold_before(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> None:
    """conv, 1x1, becomes conv(norm(x))."""
    mean, var, weight, bias = _statistics(norm)
    scale = weight * (var + norm.eps).rsqrt()
    matrix = conv.weight.double()  # (out, in, 1, 1)
    shift = matrix.flatten(1) @ (bias - mean * scale)
    _assign(conv, matrix * scale[:, None, None], shift if conv.bias is None else shift + conv.bias.double())


def _scale_outputs(conv: nn.Conv2d, gamma: Tensor) -> None:
    """conv becomes gamma * conv(x)."""
    scale = gamma.double().flatten()
    bias = None if conv.bias is None else scale * conv.bias.double()
    _assign(conv, scale[:, None, None, None] * conv.weight.double(), bias)


def _statistics(norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance, weight and bias in float64, 1 and 0 where BatchNorm has no weight and bias."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    weight = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    return mean, var, weight, torch.zeros_like(mean) if norm.bias is None else norm.bias.double()


def _assign(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> None:
    like = conv.weight
    conv.weight = nn.Parameter(torch.empty_like(like).copy_(weight.detach()), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(like), requires_grad=False)
