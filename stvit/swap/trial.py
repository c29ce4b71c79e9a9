"""Whether a foreign module computes what its structure promises: its forward against ours, before it is swapped.

Both run on a copy of the module, in float64 and with random parameters, so that nothing hides behind a value that
starts at zero. The module itself, its buffers, its hooks and the random state are not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import dispatch
from .kinds import INTERNALS, Accelerated, is_one_hot

HOOKS = tuple(name for name in INTERNALS if "hooks" in name)
SIZES = 3  # images a module is tried with
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class _Unlike(Exception):
    """The original forward can't be compared with ours; says why."""


def trial(kind: type[Accelerated], module: nn.Module) -> tuple[dict[str, Any], str | None]:
    """The settings with which our forward agrees with the module's own, and None; or no settings and the reason.

    Compared on small images of several sizes, since a foreign forward may take another way for each: the output in
    evaluation and in training mode (without dropout), and the gradient of the input and of every parameter. With the
    settings goes whether the original answers images in channels_last in the other format.
    """
    try:
        return _trial(kind, module)
    except _Unlike as unlike:
        return {}, str(unlike)
    except Exception as error:  # whatever foreign code raises
        line = str(error).split("\n")[0]
        return {}, f"it can't be tried: {type(error).__name__}: {line}"


def _trial(kind: type[Accelerated], module: nn.Module) -> tuple[dict[str, Any], str | None]:
    settings, reasons = kind.settings(module), []
    with undisturbed(module):
        double: Any = random_double(module)
        theirs = _theirs(double, kind.trial_sizes(module))
        for changes in kind.variants:
            tried = {**settings, **changes}
            for name, value in tried.items():
                setattr(double, name, value)
            differences = (_difference(outcome, _ours(kind, double, x)) for x, outcome in theirs)
            reason = next(filter(None, differences), None)
            if reason is None:
                return {**tried, "_stvit_answers_nchw": _answers_nchw(double, theirs[0][0])}, None
            reasons.append(reason)
    outputs_agree = all("gradient" in reason for reason in reasons)
    return {}, kind.unlike if kind.unlike and outputs_agree else reasons[0]


def random_double(module: nn.Module) -> nn.Module:
    """A copy in float64 (float32 where there is none): random parameters and statistics, idle dropout, no hooks.

    Hooks are left out while copying: one may hold on to anything, a whole trainer for instance.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name in HOOKS:
            hooks = vars(part).get(name)
            if hooks is not None:
                memo[id(hooks)] = type(hooks)()
    double = copy.deepcopy(module, memo)
    double.to(exact_dtype(device_of(double)))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in double.parameters():
            if not is_one_hot(parameter) and parameter.is_floating_point():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.copy_(_normal(tuple(parameter.shape), random) * fan_in**-0.5)
                parameter.requires_grad_()
        parts: list[Any] = list(double.modules())
        for part in parts:
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
            elif getattr(part, "running_mean", None) is not None:
                part.running_mean.copy_(_normal(tuple(part.running_mean.shape), random))
                part.running_var.copy_(_normal(tuple(part.running_mean.shape), random).square() + 0.5)
    return double


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")


def device_of(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), torch.device("cpu"))


def exact_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # the one device without


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Where `module` is: autograd on, autocast off, and no kernels. Semantics are tried here, not backends.

    One thread: on images this small more only wait for one another, for a minute where other processes want the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.enable_grad(), dispatch.use_backend("reference"):
            with torch.autocast(device_of(module).type, enabled=False):
                yield
    finally:
        torch.set_num_threads(threads)


def _ours(kind: type[Accelerated], double: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return _outcome(double, lambda x: kind.compute(double, x, "reference"), x)


def _theirs(double: nn.Module, sizes: list[tuple[int, int]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Images of the first sizes that the module's own forward accepts, and the outcome of each."""
    device, refused = device_of(double), None
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for size in sizes:
        image = _normal((1 if found else 2, _channels(double), *size), torch.Generator().manual_seed(1))
        x = image.to(device, exact_dtype(device)).requires_grad_()
        try:
            found.append((x, _outcome(double, double.forward, x)))
        except _Unlike:
            raise
        except Exception as error:
            refused = error
        if len(found) == SIZES:
            break
    if refused is not None and not found:
        raise refused
    return found


def _answers_nchw(double: nn.Module, x: Tensor) -> bool:
    """Whether the module's own forward gives contiguous memory for an image in channels_last."""
    with torch.no_grad():
        y = double.forward(x.detach().contiguous(memory_format=torch.channels_last))
    return y.dim() == 4 and y.is_contiguous() and not y.is_contiguous(memory_format=torch.channels_last)


def _channels(module: nn.Module) -> int:
    """Of the module's input: of its first convolution or norm. Without any (no refinement) every number will do."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
        if isinstance(part, nn.LayerNorm):
            return part.normalized_shape[0]
    return 4


def _outcome(module: nn.Module, forward: Callable[[Tensor], Any], x: Tensor) -> dict[str, Tensor]:
    """The output in evaluation and in training mode and, in the latter, the gradients of a random weighting of it."""
    leaves = {"x": x, **{name: value for name, value in module.named_parameters() if value.requires_grad}}
    found = {}
    for mode in ("evaluation", "training"):
        module.train(mode == "training")
        y = forward(x)
        if not isinstance(y, Tensor):
            raise _Unlike(f"its forward returns a {type(y).__name__}, not a tensor")
        found[f"output in {mode}"] = y.detach()
        if mode == "evaluation":
            continue
        direction = _normal(tuple(y.shape), torch.Generator().manual_seed(2)).to(y)
        grads = torch.autograd.grad(y, list(leaves.values()), direction, allow_unused=True, materialize_grads=True)
        found.update({f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return found


def _difference(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> str | None:
    for what, expected in theirs.items():
        got = ours[what]
        if got.shape != expected.shape:
            return f"its {what} has shape {tuple(expected.shape)}, ours {tuple(got.shape)}"
        size = max(1.0, expected.abs().max().item())
        gap = (got - expected).abs().max().item()
        if not gap <= TOLERANCE[expected.dtype] * size:
            return f"its {what} differs from ours by {gap:.1e} (largest value {size:.1e})"
    return None


def signature(module: nn.Module) -> Hashable:
    """What the outcome of a trial depends on: classes, shapes and plain attributes, down the tree. Not the weights."""
    plain = (bool, int, float, str, type(None))

    def value(item: Any) -> Hashable:
        if isinstance(item, plain):
            return (type(item), item)
        return tuple(map(value, item)) if type(item) in (tuple, list) else id(item)

    attributes = tuple((name, value(item)) for name, item in vars(module).items() if name not in INTERNALS)
    tensors = tuple(
        (name, None if tensor is None else (tuple(tensor.shape), tensor.device))
        for name, tensor in chain(module._parameters.items(), module._buffers.items())
    )
    parts = tuple((name, part and signature(part)) for name, part in module._modules.items())
    return (type(module), attributes, tensors, parts)
