"""One call that speeds up the authors' own model, or any network that holds copies of its classes; and its undoing.

What is swapped for what is in swaps.py. Structure can't prove what a foreign forward computes, so both are tried first
(trial.py), and only what agrees is swapped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .. import model, modules
from ..backends import dispatch
from .folding import FoldedDepthwise
from .fronts import front_of, put_in_front, take_away
from .kinds import KINDS, Accelerated
from .trial import signature, trial

logger = logging.getLogger("stvit")
Model = TypeVar("Model", bound=nn.Module)

# Our own modules have a backend of their own to set.
OURS: tuple[type, ...] = (
    FoldedDepthwise,
    *(value for value in vars(modules).values() if isinstance(value, type) and value.__module__ == modules.__name__),
    *(value for value in vars(model).values() if isinstance(value, type) and value.__module__ == model.__name__),
)
OURS_BEFORE = "_stvit_backend_before"
NOT_YET = "not swapped yet"


class Report(NamedTuple):
    """What of a model is accelerated: each of the two maps a submodule's name ("" is the model itself) to a remark.

    swapped: what runs instead of its forward. left: why something that resembles a part of STViT was left alone.
    """

    swapped: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} modules, left {len(self.left)}"]
        for word, remarks in (("swapped", self.swapped), ("left", self.left)):
            for remark, count in Counter(remarks.values()).items():
                names = [name or "the model itself" for name, other in remarks.items() if other == remark]
                more = f" and {count - 1} more" if count > 1 else ""
                lines.append(f"{word} {names[0]}{more}: {remark}")
        return "\n".join(lines)


def accelerate(model: Model, backend: str = "auto", *, verify: bool = True, keep_format: bool | None = None) -> Model:
    """Makes the parts of STViT in `model` run on this package's kernels, in place, and returns it.

    Super token attention, multi-head attention by 1x1 convolutions, the convolutional MLP, residual depthwise
    convolutions and LayerNorm over channels are found by structure, whatever their classes are called and wherever
    they come from. Parameters, buffers, state dict, submodules, hooks and isinstance stay as they are; calls that the
    swap doesn't cover (other arguments, hooks on a submodule that would be passed over, active dropout inside) run the
    original forward. Modules of this package get their `backend` set. A second call sets another backend.

    Args:
        model: any nn.Module; wrapped in DistributedDataParallel or torch.compile is fine.
        backend: "auto", "triton", "cuda" or "reference".
        verify: try each kind of module before it is swapped: the original forward and ours, in evaluation and in
            training mode without dropout, on a copy with random parameters in float64, outputs and all gradients.
            What differs or raises is left alone. Decides whether the association gets a gradient, too. False trusts
            structure, and takes the association for a constant. The model, its buffers and the random state are not
            touched either way. Takes some seconds on one CPU core for a published STViT.
        keep_format: whether a swapped module whose original answers images in channels_last in the other memory format
            (as the authors' norm does) goes on doing so, for code behind it that asks for a `view`. None: where some
            part was left as it is. True costs a copy for each. Known from the trial.

    What was swapped, and what was left and why, is logged by the logger "stvit" (level INFO) and told by
    `accelerate_report(model)`. `restore(model)` undoes it.

    Raises TypeError or ValueError naming the argument.
    """
    _check(model)
    dispatch.check_backend(backend)
    for part in model.modules():
        if isinstance(part, Accelerated) and part.changed():
            take_away(part)
    findings = list(_examine(model, verify))
    if keep_format is None:
        keep_format = any(finding.reason for finding in findings)
    for finding in findings:
        module = finding.module
        if finding.kind and not finding.reason and not isinstance(module, Accelerated):
            put_in_front(finding.kind, module)
            for name, value in finding.settings.items():
                setattr(module, name, value)
            module._stvit_parameters = module.used(module)
        if isinstance(module, Accelerated):
            module._stvit_backend, module._stvit_keep_format = backend, keep_format
        elif not finding.kind:
            vars(module).setdefault(OURS_BEFORE, module.backend)
            module.backend = backend
    report = _report(findings)
    logger.log(logging.INFO if report.swapped else logging.WARNING, "accelerate: %s", report)
    return model


def restore(model: Model) -> Model:
    """Undoes `accelerate`: every module gets its own class back, and modules of this package their own backend.

    Raises RuntimeError, before anything is changed, when another tool has put its own class in front of ours since.
    """
    _check(model)
    parts: list[tuple[str, Any]] = list(model.named_modules())
    swapped = [(name, part) for name, part in parts if isinstance(part, Accelerated)]
    for name, part in swapped:
        front = front_of(part)
        if front is None or not issubclass(front, Accelerated):
            raise RuntimeError(f"{name or 'the model'}: can't restore, its class is now {type(part).__name__}")
    for _, part in swapped:
        take_away(part)
    for _, part in parts:
        if OURS_BEFORE in vars(part):
            part.backend = vars(part).pop(OURS_BEFORE)
    return model


def accelerate_report(model: nn.Module, *, verify: bool = True) -> Report:
    """What `accelerate` has swapped in `model`, and what it left and why. Before the call: what it would do.

    Changes nothing. With `verify`, what isn't swapped is tried again, which costs as much as it does in `accelerate`.
    """
    _check(model)
    return _report(_examine(model, verify))


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


class _Finding(NamedTuple):
    name: str
    module: Any
    kind: type[Accelerated] | None  # None: one of OURS
    settings: dict[str, Any]
    reason: str | None


def _examine(model: nn.Module, verify: bool) -> Iterator[_Finding]:
    trials: dict[Hashable, tuple[dict[str, Any], str | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if isinstance(module, OURS):
            if hasattr(module, "backend"):
                yield _Finding(name, module, None, {}, None)
            continue
        kind = next((kind for kind in KINDS if kind.resembles(module)), None)
        if kind is None:
            continue
        if isinstance(module, Accelerated):
            yield _Finding(name, module, kind, {}, None)
            continue
        reason = _foreign(module) or kind.misfit(module)
        if reason:
            yield _Finding(name, module, kind, {}, reason)
            continue
        if not verify:
            yield _Finding(name, module, kind, kind.settings(module), None)
            continue
        key = (kind, signature(module))
        if key not in trials:
            trials[key] = trial(kind, module)
        yield _Finding(name, module, kind, *trials[key])


def _report(findings: Iterable[_Finding]) -> Report:
    report = Report({}, {})
    for name, module, kind, _, reason in findings:
        if kind is None:
            report.swapped[name] = f"{type(module).__name__} of this package, backend={module.backend!r}"
        elif isinstance(module, Accelerated) and not module.changed():
            report.swapped[name] = module.remark()
        elif isinstance(module, Accelerated):
            report.left[name] = f"{module.changed()} since it was swapped"
        else:
            report.left[name] = reason or NOT_YET
    return report


def _foreign(module: nn.Module) -> str | None:
    """Why a module of the right structure may compute something else all the same, or None."""
    if "forward" in vars(module):
        return "its forward is replaced on the object"
    own = [name for name, value in (*module._parameters.items(), *module._buffers.items()) if value is not None]
    if own:
        return f"it has parameters or buffers of its own: {', '.join(own)}"
    if any(is_lazy(tensor) or tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return "its weights aren't there yet (lazy, or on the meta device), so it can't be tried"
    return None
