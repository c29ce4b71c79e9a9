"""Training one epoch, and evaluating."""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn
from torch.nn import functional as F

from stvit.train.console import Task
from stvit.train.distributed import Process
from stvit.train.errors import LossNotFinite
from stvit.train.log import Log
from stvit.train.state import State

FLUSH_STEPS = 10  # reading a loss waits for the GPU, so losses are read together


class Trained(NamedTuple):
    """One epoch of training, over all processes."""

    loss: float
    lr: float  # mean over the steps
    steps: int
    images_per_s: float


class Accuracy(NamedTuple):
    """Evaluation of a whole test set, over all processes; accuracies in percent."""

    loss: float
    acc1: float
    acc5: float
    images: int


class Precision(NamedTuple):
    """Mixed precision: ``dtype`` None means fp32 throughout."""

    device_type: str
    dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Set every random state as a function of seed, epoch and rank: a resumed epoch repeats the numbers exactly."""
    value = int(np.random.SeedSequence([seed % 2**32, epoch, rank]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


class Trainer:
    """Runs the epochs of one training run."""

    def __init__(
        self,
        args: argparse.Namespace,
        process: Process,
        precision: Precision,
        network: nn.Module,
        state: State,
        loss: nn.Module,
        mixup: Mixup | None,
        log: Log,
    ) -> None:
        """``network`` is ``state.model``, wrapped for DDP and torch.compile as the run needs it."""
        self.args, self.process, self.precision, self.network = args, process, precision, network
        self.state, self.loss, self.mixup, self.log = state, loss, mixup, log

    def epoch(self, loader: Iterable[Any], epoch: int, last_step: int, task: Task) -> Trained:
        """Train until the loader is exhausted or ``last_step`` steps were done in all.

        Raises:
            LossNotFinite: naming the step.
        """
        seed_epoch(self.args.seed, epoch, self.process.rank)
        self.network.train(not self.args.finetune or self.args.finetune_mode == "train")
        pending = _Pending(self, epoch, task)
        for images, targets in loader:
            lr = self.state.optimizer.param_groups[0]["lr"]
            loss = self._step(*_to(self.process.device, self.args.channels_last, images, targets))
            pending.add(loss, lr, len(images))
            if self.state.step >= last_step:
                break
        return pending.finish()

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        optimizer, scheduler = self.state.optimizer, self.state.scheduler
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self.precision.autocast():
            loss = self.loss(images, self.network(images), targets)
        optimizer.zero_grad()
        second_order = getattr(optimizer, "is_second_order", False)
        parameters = self.state.model.parameters()
        if self.state.scaler is not None:
            self.state.scaler(loss, optimizer, self.args.clip_grad, parameters=parameters, create_graph=second_order)
        else:
            loss.backward(create_graph=second_order)
            if self.args.clip_grad is not None:
                dispatch_clip_grad(parameters, self.args.clip_grad)
            optimizer.step()
        if self.state.ema is not None:
            self.state.ema.update(self.state.model)
        self.state.step += 1
        if scheduler is not None:
            scheduler.step_update(self.state.step)
        return loss.detach()


class _Pending:
    """Losses that were computed but not read yet, and the sums of the epoch so far."""

    def __init__(self, trainer: Trainer, epoch: int, task: Task) -> None:
        self.trainer, self.epoch, self.task = trainer, epoch, task
        self.waiting: list[tuple[int, float, Tensor]] = []
        self.loss_sum = self.lr_sum = 0.0
        self.steps = self.images = 0
        self.began = time.perf_counter()
        self.flush_steps = FLUSH_STEPS if trainer.process.device.type == "cuda" else 1

    def add(self, loss: Tensor, lr: float, images: int) -> None:
        self.waiting.append((self.trainer.state.step, lr, loss))
        self.images += images
        if len(self.waiting) >= self.flush_steps:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        losses = torch.stack([loss for _, _, loss in self.waiting]).tolist()
        for (step, lr, _), loss in zip(self.waiting, losses, strict=True):
            if not math.isfinite(loss):
                raise LossNotFinite(
                    f"the loss is {loss} at step {step} (epoch {self.epoch + 1}): training stops here, "
                    "and saved checkpoints are from before; try a lower --lr, --clip-grad 1, or "
                    "--amp-dtype bf16"
                )
            self.loss_sum += loss
            self.lr_sum += lr
        self.steps += len(self.waiting)
        if self.trainer.process.main:
            rows = [
                {"step": step, "epoch": self.epoch, "loss": round(loss, 6), "lr": lr}
                for (step, lr, _), loss in zip(self.waiting, losses, strict=True)
            ]
            self.trainer.log.add_steps(rows)
        self.waiting.clear()
        speed = self.images * self.trainer.process.world_size / (time.perf_counter() - self.began)
        what = f"epoch {self.epoch + 1}/{self.trainer.args.epochs}"
        self.task.show(self.trainer.state.step, what, f"loss {losses[-1]:.3f}, {speed:,.0f} images/s")

    def finish(self) -> Trained:
        self.flush()
        seconds = time.perf_counter() - self.began
        loss, lr, steps, images = self.trainer.process.sum([self.loss_sum, self.lr_sum, self.steps, self.images])
        return Trained(loss / max(1, steps), lr / max(1, steps), self.steps, images / seconds)


def _to(device: torch.device, channels_last: bool, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = images.to(device, non_blocking=True).contiguous(memory_format=memory_format)
    return images, targets.to(device, non_blocking=True)


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Any, process: Process, precision: Precision, channels_last: bool, task: Task
) -> Accuracy:
    """Cross entropy and top-1, top-5 accuracy; each process takes its share of the images and counts are summed."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)  # loss, right at 1, right within 5
    images_seen = 0
    for done, batch in enumerate(loader, 1):
        images, targets = _to(process.device, channels_last, *batch)
        with precision.autocast():
            outputs = model(images)
        outputs = (outputs if isinstance(outputs, Tensor) else outputs[0]).float()
        hits = outputs.topk(min(5, outputs.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(outputs, targets, reduction="sum")
        sums += torch.stack([loss.double(), hits[:, 0].sum().double(), hits.sum().double()])
        images_seen += len(images)
        task.show(done, "evaluating")
    loss_sum, right1, right5, total = process.sum([*sums.tolist(), images_seen])
    total = max(1, total)
    return Accuracy(loss_sum / total, 100 * right1 / total, 100 * right5 / total, int(total))
