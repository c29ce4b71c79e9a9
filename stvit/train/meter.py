"""The figures of an epoch under way: losses, learning rate, speed, the wait for data."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from stvit.train.console import Task
from stvit.train.distributed import Process
from stvit.train.errors import LossNotFinite
from stvit.train.log import Log
from stvit.train.state import State, Sums

FLUSH_STEPS = 10  # reading a loss waits for the GPU, so losses are read together


class Trained(NamedTuple):
    """One epoch of training, over all processes."""

    loss: float
    lr: float  # mean over the steps
    images_per_s: float
    waited: float  # part of the time that went into waiting for data, 0 to 1


class Meter:
    """Losses that were computed but not read yet; once read they are in the log and in ``state.sums``."""

    def __init__(self, state: State, process: Process, log: Log, task: Task, epochs: int, note: str) -> None:
        self.state, self.process, self.log, self.task = state, process, log, task
        self.epochs, self.note = epochs, note
        self.waiting: list[tuple[int, float, Tensor]] = []
        self.flush_steps = FLUSH_STEPS if process.device.type == "cuda" else 1
        self.clock = time.perf_counter()

    def add(self, loss: Tensor, lr: float, images: int, waited: float) -> None:
        """A step of this process: its loss, still on the GPU, its images, seconds spent waiting for them."""
        self.waiting.append((self.state.step, lr, loss))
        self.state.sums.images += images
        self.state.sums.waited += waited
        if len(self.waiting) >= self.flush_steps:
            self.flush()

    def flush(self) -> None:
        """Read the losses.

        Raises:
            LossNotFinite: naming the step.
        """
        now = time.perf_counter()
        sums = self.state.sums
        sums.seconds += now - self.clock
        self.clock = now
        if not self.waiting:
            return
        losses = torch.stack([loss for _, _, loss in self.waiting]).tolist()
        for (step, lr, _), loss in zip(self.waiting, losses, strict=True):
            if not math.isfinite(loss):
                raise LossNotFinite(f"the loss is {loss} at step {step} (epoch {self.state.epoch + 1})")
            sums.loss += loss
            sums.lr += lr
        sums.steps += len(losses)
        rows = [
            {"step": step, "epoch": self.state.epoch, "loss": round(loss, 6), "lr": lr}
            for (step, lr, _), loss in zip(self.waiting, losses, strict=True)
        ]
        if self.process.main:
            self.log.add_steps(rows)
        self.waiting.clear()
        self._show(rows[-1]["loss"], rows[-1]["lr"], sums)

    def _show(self, loss: float, lr: float, sums: Sums) -> None:
        figures = [f"loss {loss:.3f}", f"lr {lr:.2e}", f"{_rate(sums, self.process.world_size):,.0f} images/s"]
        if sums.waited > 0.01 * sums.seconds:
            figures.append(f"{100 * sums.waited / sums.seconds:.0f} % of the time waiting for data")
        if self.process.device.type == "cuda":
            figures.append(f"{torch.cuda.max_memory_allocated(self.process.device) / 2**30:.1f} GiB")
        if self.note:
            figures.append(self.note)
        self.task.show(self.state.step, f"epoch {self.state.epoch + 1}/{self.epochs}", ", ".join(figures))

    def finish(self) -> Trained:
        """The epoch over all processes."""
        self.flush()
        every = [Sums(*values) for values in self.process.gather(self.state.sums.as_list())]
        steps = max(1.0, sum(sums.steps for sums in every))
        seconds = max(1e-9, max(sums.seconds for sums in every))
        return Trained(
            loss=sum(sums.loss for sums in every) / steps,
            lr=sum(sums.lr for sums in every) / steps,
            images_per_s=sum(sums.images for sums in every) / seconds,
            waited=max(sums.waited for sums in every) / seconds,
        )


def _rate(sums: Sums, world_size: int) -> float:
    return sums.images * world_size / max(1e-9, sums.seconds)
