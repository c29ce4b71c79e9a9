"""Everything that a resumed run needs, as a checkpoint holds it.

Random states are not part of it: they are functions of seed, step and place (seeds.py). Nor are the running statistics
of other processes than the first: DistributedDataParallel hands those of process 0 round before each step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import NativeScaler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

import stvit
from stvit.checkpoint import load_contents, read_checkpoint, without_prefixes
from stvit.train.distributed import Process
from stvit.train.errors import UserError
from stvit.train.saving import Contents, Saved

WAYS = ("fused", "foreach", "capturable")  # how an optimizer computes: by today's flags, not by the file's


@dataclass
class Sums:
    """This process's part of the epoch so far."""

    loss: float = 0.0
    lr: float = 0.0
    steps: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0  # of them, for data

    def as_list(self) -> list[float]:
        return [self.loss, self.lr, self.steps, self.images, self.seconds, self.waited]


@dataclass
class State:
    """A training run between two steps."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's; None where the learning rate stays as it is
    scaler: NativeScaler | None  # only for fp16
    lag_lr: bool = False  # the authors' schedule: an epoch behind
    epoch: int = 0  # the one that is under way, or next
    batch: int = 0  # batches of it that are done, in this process
    step: int = 0  # steps done in all
    best: float = 0.0  # best test accuracy so far, percent
    best_ema: float = 0.0  # and of the averaged weights
    sums: Sums = field(default_factory=Sums)

    @property
    def lr(self) -> float:
        """The learning rate of the head; layer decay lowers those of other layers."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def next_epoch(self, accuracy: float) -> None:
        """The epoch is done: begin the next one, at its learning rate."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()
        if self.scheduler is not None:
            self.scheduler.step(self._scheduled_epoch(), accuracy)

    def _scheduled_epoch(self) -> int:
        return max(0, self.epoch - 1) if self.lag_lr else self.epoch

    def contents(self, args: argparse.Namespace, process: Process, classes: list[str] | None) -> Contents:
        """What a checkpoint holds, in the published script's layout; every process has to call it."""
        contents: Contents = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,  # the last whole one
            "batch": self.batch,
            "batch_images": args.batch_size * process.world_size,
            "sums": process.gather(self.sums.as_list()),
            "step": self.step,
            "max_accuracy": self.best,
            "args": vars(args),
        }
        if classes is not None:
            contents["classes"] = classes
        if self.scheduler is not None:
            contents["lr_scheduler"] = self.scheduler.state_dict()
        if self.ema is not None:
            contents |= {"model_ema": self.ema.module.state_dict(), "max_accuracy_ema": self.best_ema}
        if self.scaler is not None:
            contents["scaler"] = self.scaler.state_dict()
        return contents

    def ema_contents(self, contents: Contents) -> Contents:
        """A file of the averaged weights alone."""
        kept = ("epoch", "step", "args", "classes")
        averaged = {name: contents[name] for name in kept if name in contents}
        return averaged | {"model": contents["model_ema"], "max_accuracy": self.best_ema}

    def restore(self, saved: Saved, args: argparse.Namespace, process: Process, steps: int) -> None:
        """Load what `contents` gave; of a file with weights only, such as a published one, load those.

        ``steps``: steps of an epoch now.

        Raises:
            UserError: for a file of another model or optimizer.
        """
        path, contents = saved.path, saved.contents
        load_weights(self.model, saved, args)
        if self.ema is not None:
            with _user_errors():
                load_contents(self.ema.module, contents, path, use_ema=bool(contents.get("model_ema")))
        if "optimizer" not in contents or "epoch" not in contents:
            return
        opt = saved_flag(contents, "opt", args.opt)
        if opt != args.opt:
            raise UserError(f"{path}: its run used --opt {opt}, not {args.opt}; start from it with --finetune instead")
        ways = [{k: group[k] for k in WAYS if k in group} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(contents["optimizer"])
            for group, way in zip(self.optimizer.param_groups, ways, strict=True):
                group |= way
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: its optimizer state doesn't fit this model ({error})") from error
        if self.scaler is not None and "scaler" in contents:
            self.scaler.load_state_dict(contents["scaler"])
        self.epoch = int(contents["epoch"]) + 1
        self.step = int(contents.get("step", self.epoch * steps))  # other programs' files don't say
        self.best = float(contents.get("max_accuracy", 0.0))
        self.best_ema = float(contents.get("max_accuracy_ema", 0.0))
        self._restore_batch(contents, args, process, steps)
        self._restore_scheduler(contents.get("lr_scheduler"))

    def _restore_batch(self, contents: Contents, args: argparse.Namespace, process: Process, steps: int) -> None:
        """Where in the epoch; with other batches or another number of processes, after as many images as were seen."""
        self.batch = int(contents.get("batch", 0))
        now = args.batch_size * process.world_size
        before = int(contents.get("batch_images", now))
        if self.batch and before != now:
            accumulated = args.grad_accum_steps
            self.batch = min(self.batch * before // now // accumulated, steps) * accumulated
            self.step = self.epoch * steps + self.batch // accumulated
        sums = contents.get("sums") or [Sums().as_list()]
        if len(sums) == process.world_size:
            self.sums = Sums(*sums[process.rank])
        elif process.main:
            self.sums = Sums(*(sum(column) for column in zip(*sums, strict=True)))

    def _restore_scheduler(self, saved: dict[str, Any] | None) -> None:
        """Take up the schedule where it was.

        All of timm's schedules but one are functions of the epoch or step and the flags: computed afresh, they also
        follow flags that were changed for the rest of the run, such as a larger ``--epochs``.
        """
        if isinstance(self.scheduler, PlateauLRScheduler):
            if saved is not None:
                self.scheduler.load_state_dict(saved)
        elif self.scheduler is not None:
            self.scheduler.step(self._scheduled_epoch())
            self.scheduler.step_update(self.step)


def load_weights(model: nn.Module, saved: Saved, args: argparse.Namespace) -> None:
    """Load a checkpoint's weights, with ``--eval-ema`` and ``--eval`` the averaged ones.

    Raises:
        UserError: for a file of another model.
    """
    name = saved_flag(saved.contents, "model", args.model)
    if name != args.model:
        raise UserError(
            f"{saved.path}: holds a {name}, not --model {args.model}; change --model, --resume or --output_dir"
        )
    with _user_errors():
        load_contents(model, saved.contents, saved.path, use_ema=args.eval and args.eval_ema)


def saved_flag(contents: Contents, name: str, default: Any) -> Any:
    """A flag of the run of ours that wrote the file; ``default`` for other files, whose names may mean other things."""
    saved = contents.get("args")
    return saved.get(name, default) if isinstance(saved, dict) else default


def load_finetune(model: Any, path: Path, num_classes: int) -> int | None:
    """Load the weights of ``path`` to start from; a head for another number of classes is replaced by a fresh one.

    Returns:
        The file's number of classes where the head was replaced, otherwise None.

    Raises:
        UserError: for a file that can't be read or differs in more than the head.
    """
    with _user_errors():
        contents = read_checkpoint(path)
        classes = _file_classes(model, without_prefixes(contents.get("model") or contents))
        if classes is None or classes == num_classes:
            load_contents(model, contents, path)
            return None
        model.reset_classifier(classes)
        load_contents(model, contents, path)
        model.reset_classifier(num_classes)
        return classes


def _file_classes(model: Any, weights: dict[str, Any]) -> int | None:
    """The number of rows of the classifier's weight in a state dict; None where it can't be told."""
    if not hasattr(model, "get_classifier") or not hasattr(model, "reset_classifier"):
        return None
    head = model.get_classifier()
    name = next((name for name, module in model.named_modules() if module is head), None)
    weight = weights.get(f"{name}.weight")
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.ndim else None


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except stvit.CheckpointError as error:
        raise UserError(str(error)) from error
