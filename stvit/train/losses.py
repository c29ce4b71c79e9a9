"""The training loss: label smoothing or soft targets, and a teacher's share where there is one."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F


class DistillationLoss(nn.Module):
    """(1 - alpha) * base(outputs, targets) + alpha * distance of the outputs from the teacher's (DeiT, section 3).

    "soft": KL divergence of the distributions at temperature tau, times tau^2 (the gradient's scale does not depend on
    tau). "hard": cross entropy against the class that the teacher finds most likely. A model with a distillation head
    returns (outputs, distillation outputs); one without is compared by its only outputs.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module, kind: str, alpha: float, tau: float) -> None:
        super().__init__()
        self.base, self.teacher, self.kind, self.alpha, self.tau = base, teacher, kind, alpha, tau

    def forward(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        outputs, distilled = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        with torch.no_grad():
            taught = self.teacher(images)
        if self.kind == "soft":
            student = F.log_softmax(distilled.float() / self.tau, dim=1)
            teacher = F.log_softmax(taught.float() / self.tau, dim=1)
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            distance = divergence * self.tau**2 / distilled.numel()
        else:
            distance = F.cross_entropy(distilled, taught.argmax(dim=1))
        return (1 - self.alpha) * self.base(outputs, targets) + self.alpha * distance


class PlainLoss(nn.Module):
    """The base loss, called as DistillationLoss is."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, images: Tensor, outputs: Any, targets: Tensor) -> Tensor:
        return self.base(outputs if isinstance(outputs, Tensor) else outputs[0], targets)


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's Mixup, which also smooths the labels; None with mixup and cutmix both off."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def build_loss(args: argparse.Namespace, mixup: Mixup | None, teacher: nn.Module | None) -> nn.Module:
    """The loss as a module called with (images, outputs, targets)."""
    base: nn.Module
    if mixup is not None:
        base = SoftTargetCrossEntropy()
    elif args.smoothing > 0:
        base = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        base = nn.CrossEntropyLoss()
    if teacher is None:
        return PlainLoss(base)
    return DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
