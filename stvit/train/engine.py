"""The training step, and an epoch of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from stvit.train import seeds
from stvit.train.distributed import Process
from stvit.train.errors import UserError
from stvit.train.graph import GraphedStep
from stvit.train.loader import Batch, Feeder
from stvit.train.meter import Meter
from stvit.train.state import State


class Precision(NamedTuple):
    """Mixed precision: ``dtype`` None means fp32 throughout."""

    device_type: str
    dtype: torch.dtype | None

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)


class Trainer:
    """Does the steps of one training run.

    A step takes ``--grad-accum-steps`` batches, and the mean of their gradients.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        process: Process,
        precision: Precision,
        network: nn.Module,
        state: State,
        loss: nn.Module,
        mixup: Mixup | None,
    ) -> None:
        """``network`` is ``state.model``, wrapped for DDP and torch.compile as the run needs it."""
        self.args, self.process, self.precision, self.network = args, process, precision, network
        self.state, self.loss, self.mixup = state, loss, mixup
        self.graphed: GraphedStep | None = None  # set where steps are replayed from a recording
        self.accumulated: int = args.grad_accum_steps
        self.erase = None
        if args.reprob > 0:
            self.erase = RandomErasing(
                args.reprob, mode=args.remode, max_count=args.recount, device=str(process.device)
            )

    def epoch(self, feeder: Feeder, last_step: int, meter: Meter, after_step: Callable[[], None]) -> None:
        """Train until ``feeder`` is exhausted or ``last_step`` steps were done in all.

        Raises:
            LossNotFinite: naming the step.
            UserError: for batches that are too small for BatchNorm.
        """
        state = self.state
        self.network.train(not self.args.finetune or self.args.finetune_mode == "train")
        groups = _groups(iter(feeder), self.accumulated)
        while state.step < last_step:
            waited = feeder.waited
            batches = next(groups, None)
            if batches is None:
                break
            lr = state.lr
            loss = self.step(batches)
            meter.add(loss, lr, sum(len(batch.images) for batch in batches), feeder.waited - waited)
            after_step()

    def step(self, batches: list[Batch]) -> Tensor:
        """Forward, backward and update; returns the mean loss, still on the device."""
        state = self.state
        seeds.set_all(self.args.seed, seeds.STEP, state.step, self.process.rank)
        state.optimizer.zero_grad()
        if self.graphed is not None:
            return self._stepped(batches, self.graphed(*self._augmented(batches[0])))
        total = torch.zeros((), device=self.process.device)
        for i, batch in enumerate(batches):
            with self._gradients_shared(last := i == len(batches) - 1):
                total += self.forward_backward(*self._augmented(batch), update=last)
        return self._stepped(batches, total)

    def _stepped(self, batches: list[Batch], loss: Tensor) -> Tensor:
        """What follows the optimizer's step."""
        state = self.state
        if state.ema is not None:
            state.ema.update(state.model)
        state.step += 1
        state.batch += len(batches)
        if state.scheduler is not None:
            state.scheduler.step_update(state.step)
        return loss

    def _gradients_shared(self, last: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients once a step, with those of its last batch."""
        no_sync = getattr(self.network, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    def _augmented(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, targets = batch
        if self.erase is not None:
            images = self.erase(images)
        return (images, targets) if self.mixup is None else self.mixup(images, targets)

    def forward_backward(self, images: Tensor, targets: Tensor, update: bool = True) -> Tensor:
        """The loss, as its share of the step's; adds its gradients, and with ``update`` the optimizer does its step."""
        optimizer, clip = self.state.optimizer, self.args.clip_grad
        try:
            with self.precision.autocast():
                loss = self.loss(images, self.network(images), targets) / self.accumulated
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"--batch-size {len(images)} at --input-size {images.shape[-1]} leaves BatchNorm one value a channel "
                "in the last stage: raise either"
            ) from error
        second_order = getattr(optimizer, "is_second_order", False)
        parameters = self.state.model.parameters()
        if self.state.scaler is not None:
            self.state.scaler(
                loss, optimizer, clip, parameters=parameters, create_graph=second_order, need_update=update
            )
            return loss.detach()
        loss.backward(create_graph=second_order)
        if update:
            if clip is not None:
                dispatch_clip_grad(parameters, clip)
            optimizer.step()
        return loss.detach()


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of ``size`` batches; what is left at the end is dropped."""
    while len(group := list(islice(batches, size))) == size:
        yield group
