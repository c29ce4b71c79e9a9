"""The correctness gate of `bench.training`: a contender that computes something else gets no speed.

Truth is `reference_model` on the very batch that is timed, in float32, or in float64 where float32 is measured; for
training the loss and the gradient of every parameter, for inference the logits. The yardstick is the same model in
the dtype that is measured. A contender passes when, for each of these tensors, in the Euclidean norm,

    |got - truth|  <=  2 |yardstick - truth|  +  tolerance * (|truth| + |all gradients| / 50)

The last term is for parameters whose true gradient is 0 (a bias in front of BatchNorm): theirs is rounding alone.
Models and formulations that are right reach 0.1 to 0.5 of what the rule allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.training.contenders import Batch, reference_model

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
Outcome = Mapping[str, Tensor]  # "loss" and "d NAME" for every parameter, or "logits"


@dataclass
class Truth:
    """What is right, on the CPU, and how far the yardstick is from it, by name."""

    values: dict[str, Tensor]
    errors: dict[str, float]
    dtype: torch.dtype

    @property
    def gradient_norm(self) -> float:
        return gradient_norm(self.values)


@dataclass
class Verdict:
    """`worst`: the largest share of what the rule allows, reached by `worst_name`; above 1 the contender fails."""

    worst: float
    worst_name: str

    @property
    def passed(self) -> bool:
        return self.worst <= 1

    def as_row(self) -> dict[str, Any]:
        worst = self.worst if math.isfinite(self.worst) else None  # JSON has no infinity
        return {"passed": self.passed, "worst": worst, "worst_name": self.worst_name}


def outcome(mode: str, returned: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """What a step returned and left behind, copied to the CPU."""
    if mode == "inference":
        return {"logits": returned.detach().float().cpu()}
    found = {"loss": returned.detach().float().cpu()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"d {name}"] = parameter.grad.detach().float().cpu()
    return found


def truth(model_name: str, mode: str, batch: Batch, dtype: torch.dtype, shared: Path | None) -> Truth:
    """Truth and yardstick; kept in the folder `shared`, since every contender of a model asks for the same."""
    images = batch.images
    name = f"{model_name}-{images.shape[3]}-{images.shape[0]}-{mode}-{str(dtype).removeprefix('torch.')}.pt"
    path = shared / name if shared else None
    if path and path.exists():
        kept = torch.load(path, weights_only=True)
        return Truth(kept["values"], kept["errors"], dtype)
    model = reference_model(model_name).train(mode == "train")
    if mode == "train":
        model.set_grad_checkpointing()  # type: ignore[operator]  # the exact run is wide; time doesn't matter
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    values = _run(model.to(images.device, exact), mode, batch, torch.float32)
    model.zero_grad()
    near = _run(model.to(torch.float32), mode, batch, dtype)
    found = Truth(values, {key: _distance(near[key], value) for key, value in values.items()}, dtype)
    if path:
        part = path.with_suffix(".part")  # a case that is stopped half way leaves nothing that looks whole
        torch.save({"values": found.values, "errors": found.errors}, part)
        part.rename(path)
    return found


def _run(model: nn.Module, mode: str, batch: Batch, autocast: torch.dtype) -> dict[str, Tensor]:
    device, dtype = batch.images.device, next(model.parameters()).dtype
    with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
        if mode == "inference":
            with torch.no_grad():
                return outcome(mode, model(batch.images.to(dtype)), model)
        loss = F.cross_entropy(model(batch.images.to(dtype)), batch.labels)
    loss.backward()
    return outcome(mode, loss, model)


def check(got: Outcome, right: Truth) -> Verdict:
    """Holds a contender's outcome against the truth."""
    tolerance, noise = TOLERANCE[right.dtype], right.gradient_norm / 50
    worst = Verdict(-1.0, "")
    for name, value in right.values.items():
        slack = noise if name.startswith("d ") else 0.0
        limit = 2 * right.errors[name] + tolerance * (float(value.norm()) + slack)
        error = _distance(got[name], value) if name in got else math.inf
        share = error / limit if limit > 0 else (0.0 if error == 0 else math.inf)
        if share > worst.worst:
            worst = Verdict(share, name)
    return worst


def gradient_norm(values: Outcome) -> float:
    """Euclidean norm of all gradients together; 0 without."""
    return math.sqrt(sum(float(value.norm()) ** 2 for name, value in values.items() if name.startswith("d ")))


def _distance(got: Tensor, right: Tensor) -> float:
    """Euclidean; infinite for another shape or NaN."""
    distance = float((got - right).norm()) if got.shape == right.shape else math.inf
    return math.inf if math.isnan(distance) else distance
