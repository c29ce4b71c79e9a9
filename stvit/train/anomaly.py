"""``--detect-anomaly``: which layer brings the first value that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stvit.train.errors import LossNotFinite


def watch(model: nn.Module, gradients: bool) -> None:
    """End the run at the first module whose output, or (``gradients``) parameter whose gradient, has NaN or Inf.

    Each look waits for the GPU, so a step takes longer. With a loss scaler gradients overflow in the normal course.
    """
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(_Output(name))
    for name, parameter in model.named_parameters():
        if gradients and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_Gradient(name))


class _Output:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                _check(tensor, f"the output of {self.name} ({type(module).__name__})")


class _Gradient:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        _check(parameter.grad, f"the gradient of {self.name}")


def _check(tensor: Tensor, what: str) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = int((~finite).sum())
        raise LossNotFinite(f"{what}, shape {tuple(tensor.shape)}, has {bad} values that are NaN or infinite")
