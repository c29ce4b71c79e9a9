"""Everything that a resumed run needs, and its checkpoint file.

Random states are not part of it: `seed_epoch` sets them from seed, epoch and rank at the start of each epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.utils import NativeScaler
from timm.utils.model_ema import ModelEmaV3
from torch import nn

import stvit
from stvit.checkpoint import read_checkpoint
from stvit.train.errors import UserError


@dataclass
class State:
    """A training run between two epochs."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any  # timm's; None where the learning rate stays as it is
    scaler: NativeScaler | None  # only for fp16
    epoch: int = 0  # the next one
    step: int = 0  # steps done in all
    best: float = 0.0  # best test accuracy so far, percent

    def save(self, path: Path, args: argparse.Namespace) -> None:
        """Write the state after epoch ``self.epoch - 1``, atomically, in the published script's layout."""
        contents: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "max_accuracy": self.best,
            "args": vars(args),
        }
        if self.scheduler is not None:
            contents["lr_scheduler"] = self.scheduler.state_dict()
        if self.ema is not None:
            contents["model_ema"] = self.ema.module.state_dict()
        if self.scaler is not None:
            contents["scaler"] = self.scaler.state_dict()
        stvit.save_checkpoint(path, **contents)

    def restore(self, path: Path, args: argparse.Namespace) -> None:
        """Load what `save` wrote; of a file with weights only, such as a published one, load those.

        Raises:
            UserError: for a file that can't be read, or is of another model or optimizer.
        """
        contents = load_weights(self.model, path, args)
        if self.ema is not None:
            self.ema.module.load_state_dict(contents.get("model_ema") or self.model.state_dict())
        if "optimizer" not in contents or "epoch" not in contents:
            return
        opt = _saved_flag(contents, "opt", args.opt)
        if opt != args.opt:
            raise UserError(f"{path}: its run used --opt {opt}, not {args.opt}; start from it with --finetune instead")
        try:
            self.optimizer.load_state_dict(contents["optimizer"])
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: its optimizer state doesn't fit this model ({error})") from error
        if self.scaler is not None and "scaler" in contents:
            self.scaler.load_state_dict(contents["scaler"])
        self.epoch = int(contents["epoch"]) + 1
        self.step = int(contents.get("step", 0))
        self.best = float(contents.get("max_accuracy", 0.0))
        self._restore_scheduler(contents.get("lr_scheduler"))

    def _restore_scheduler(self, saved: dict[str, Any] | None) -> None:
        """Take up the schedule where it was.

        All of timm's schedules but one are functions of the epoch or step and the flags: computed afresh, they also
        follow flags that were changed for the rest of the run, such as a larger ``--epochs``.
        """
        if isinstance(self.scheduler, PlateauLRScheduler):
            if saved is not None:
                self.scheduler.load_state_dict(saved)
        elif self.scheduler is not None:
            self.scheduler.step(self.epoch)
            self.scheduler.step_update(self.step)


def load_weights(model: nn.Module, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Load the weights of ``path`` (with ``--eval-ema`` and ``--eval`` the averaged ones); returns the file's contents.

    Raises:
        UserError: for a file that can't be read or is of another model.
    """
    with _user_errors():
        contents = read_checkpoint(path)
        name = _saved_flag(contents, "model", args.model)
        if name != args.model:
            raise UserError(
                f"{path}: holds a {name}, not --model {args.model}; change --model, --resume or --output_dir"
            )
        stvit.load_checkpoint(model, path, use_ema=args.eval and args.eval_ema)
    return contents


def _saved_flag(contents: dict[str, Any], name: str, default: Any) -> Any:
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
        classes = _file_classes(model, contents.get("model", contents))
        if classes is None or classes == num_classes:
            stvit.load_checkpoint(model, path)
            return None
        model.reset_classifier(classes)
        stvit.load_checkpoint(model, path)
        model.reset_classifier(num_classes)
        return classes


def _file_classes(model: Any, weights: dict[str, Any]) -> int | None:
    """The number of rows of the classifier's weight in a state dict; None where it can't be told."""
    if not hasattr(model, "get_classifier") or not hasattr(model, "reset_classifier"):
        return None
    head = model.get_classifier()
    name = next((name for name, module in model.named_modules() if module is head), None)
    weight = weights.get(f"{name}.weight", weights.get(f"module.{name}.weight"))
    return weight.shape[0] if isinstance(weight, torch.Tensor) and weight.ndim else None


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except stvit.CheckpointError as error:
        raise UserError(str(error)) from error
