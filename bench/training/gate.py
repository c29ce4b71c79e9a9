"""What the correctness gate (bench/harness/gate.py) holds a whole model to.

Truth is `reference_model` on the very batch that is timed, in float32, or in float64 where float32 is measured; for
training the loss and the gradient of every parameter, for inference the logits. In the Euclidean norm the slack is
tolerance * (|truth| + |all gradients| / 50), whose last term is for parameters with a true gradient of 0 (a bias in
front of BatchNorm): theirs is rounding alone. Models and formulations that are right reach 0.1 to 0.5 of what the rule
allows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.harness import record
from bench.harness.gate import Named, Verdict, distances, judge
from bench.training.contenders import CONTENDERS, Batch, reference_model, step_of

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Truth(NamedTuple):
    """What is right ("loss" and "d NAME" for every parameter, or "logits"), on the CPU, and how far the yardstick is
    from it."""

    values: dict[str, Tensor]
    errors: dict[str, float]
    dtype: torch.dtype


def outcome(mode: str, returned: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """What a step returned and left behind, copied to the CPU."""
    if mode == "inference":
        return {"logits": returned.detach().float().cpu()}
    left = {f"d {name}": p.grad.detach().float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": returned.detach().float().cpu(), **left}


def truth(model_name: str, mode: str, batch: Batch, dtype: torch.dtype, shared: Path | None) -> Truth:
    """Truth and yardstick; kept in the folder `shared`, since every contender of a model asks for the same."""
    images = batch.images
    name = f"{model_name}-{images.shape[3]}-{images.shape[0]}-{mode}-{str(dtype).removeprefix('torch.')}.pt"
    path = shared / name if shared else None
    if path and path.exists():
        return Truth(**torch.load(path, weights_only=True), dtype=dtype)
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    values = _run(model_name, mode, batch, exact, torch.float32)
    found = Truth(values, distances(_run(model_name, mode, batch, torch.float32, dtype), values, 2), dtype)
    if path:
        with record.written(path) as part:  # a case that is stopped half way leaves nothing that looks whole
            torch.save({"values": found.values, "errors": found.errors}, part)
    return found


def _run(name: str, mode: str, batch: Batch, dtype: torch.dtype, autocast: torch.dtype) -> dict[str, Tensor]:
    model = reference_model(name).to(batch.images.device, dtype).train(mode == "train")
    if mode == "train":
        model.set_grad_checkpointing()  # type: ignore[operator]  # the exact run is wide; time doesn't matter
    images = batch.images.to(dtype)
    step = step_of(model, model, batch._replace(images=images), autocast, CONTENDERS["ours-reference"], mode)
    return outcome(mode, step(), model)


def check(got: Named, right: Truth) -> Verdict:
    """Holds a contender's outcome against the truth."""
    noise = math.hypot(*(float(value.norm()) for name, value in right.values.items() if name.startswith("d "))) / 50
    slack = {
        name: TOLERANCE[right.dtype] * (float(value.norm()) + (noise if name.startswith("d ") else 0.0))
        for name, value in right.values.items()
    }
    return judge(distances(got, right.values, 2), right.errors, slack)
