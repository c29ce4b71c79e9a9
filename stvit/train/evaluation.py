"""Accuracy on a test set."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stvit.train.console import Task
from stvit.train.distributed import Process
from stvit.train.engine import Precision
from stvit.train.errors import UserError
from stvit.train.loader import UNREADABLE, Feeder


class Accuracy(NamedTuple):
    """Evaluation of a whole test set, over all processes; accuracies in percent."""

    loss: float
    acc1: float
    acc5: float
    images: int
    images_per_s: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    feeder: Feeder,
    process: Process,
    precision: Precision,
    task: Task,
    after_batch: Callable[[], None] = lambda: None,
) -> Accuracy:
    """Cross entropy and top-1, top-5 accuracy; each process takes its share of the images and counts are summed.

    ``after_batch`` is called equally often in every process, whose shares may differ by a batch.

    Raises:
        UserError: where there is no image to evaluate.
    """
    began = time.perf_counter()
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=process.device)  # loss, right at 1, right within 5, images
    for done, (images, targets) in enumerate(feeder, 1):
        with precision.autocast():
            outputs = model(images)
        outputs = (outputs if isinstance(outputs, Tensor) else outputs[0]).float()
        hits = outputs.topk(min(5, outputs.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(outputs, targets, reduction="sum", ignore_index=UNREADABLE)
        counted = (targets != UNREADABLE).sum()
        sums += torch.stack([value.double() for value in (loss, hits[:, 0].sum(), hits.sum(), counted)])
        task.show(done, "evaluating")
        if done <= feeder.common:
            after_batch()
    loss_sum, right1, right5, total = process.sum(sums.tolist())
    if not total:
        raise UserError("none of the test images could be read")
    seconds = max(1e-9, time.perf_counter() - began)
    return Accuracy(loss_sum / total, 100 * right1 / total, 100 * right5 / total, int(total), total / seconds)
