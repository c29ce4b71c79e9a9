"""What a run says of an epoch and of itself: the log's rows, lines and tables."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from torch import nn

from stvit.train import saving
from stvit.train.evaluation import Accuracy
from stvit.train.loader import BadImages
from stvit.train.meter import Trained
from stvit.train.state import State

Row = dict[str, Any]


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def epoch_row(
    state: State,
    epoch: int,
    trained: Trained,
    tested: Accuracy,
    averaged: Accuracy | None,
    seconds: float,
    bad: BadImages,
) -> Row:
    """The line of log.txt of an epoch that is over; ``state`` is at the next one."""
    row: Row = {
        "epoch": epoch,
        "n_parameters": count_parameters(state.model),
        "train_loss": trained.loss,
        "train_lr": trained.lr,
        "test_loss": tested.loss,
        "test_acc1": tested.acc1,
        "test_acc5": tested.acc5,
        "steps": state.step,
        "lr": state.lr,
        "images_per_s": round(trained.images_per_s, 2),
        "waited": round(trained.waited, 4),
        "seconds": round(seconds, 3),
    }
    if averaged is not None:
        row |= {
            "test_loss_ema": averaged.loss,
            "test_acc1_ema": averaged.acc1,
            "test_acc5_ema": averaged.acc5,
        }
    if bad.seen:
        row["bad_images"] = len(bad.seen)
    return row


def epoch_line(row: Row, state: State, epochs: int) -> str:
    """The same for the screen."""
    averaged = ""
    if "test_acc1_ema" in row:
        averaged = f", averaged {row['test_acc1_ema']:.2f} % (best {state.best_ema:.2f} %)"
    waiting = f", {100 * row['waited']:.0f} % of it waiting for data" if row["waited"] > 0.01 else ""
    bad = row.get("bad_images", 0)
    skipped = f", {bad} unreadable image{'s' if bad > 1 else ''} skipped" if bad else ""
    return (
        f"epoch {row['epoch'] + 1}/{epochs}: loss {row['train_loss']:.4f}, test loss {row['test_loss']:.4f}, "
        f"accuracy {row['test_acc1']:.2f} % (best {state.best:.2f} %){averaged}, {row['images_per_s']:,.0f} "
        f"images/s, {row['seconds']:.1f} s{waiting}{skipped}"
    )


def final_table(state: State, last: Row, seconds: float, folder: Path | None) -> list[tuple[str, str]]:
    """What to say when training ends."""
    rows = [("test accuracy", f"{last['test_acc1']:.2f} %"), ("best test accuracy", f"{state.best:.2f} %")]
    if state.ema is not None:
        rows += [
            ("averaged weights", f"{last['test_acc1_ema']:.2f} %"),
            ("best averaged weights", f"{state.best_ema:.2f} %"),
        ]
    rows += [
        ("training loss", f"{last['train_loss']:.4f}"),
        ("steps", f"{state.step:,}"),
        ("time", f"{seconds:.1f} s"),
        ("speed", f"{last['images_per_s']:,.0f} images/s"),
    ]
    if folder:
        best = saving.BEST + (f", {saving.BEST_EMA}" if state.ema is not None else "")
        rows += [
            ("last and best weights", f"{folder}/{saving.LAST}, {best}"),
            ("log and curve", f"{folder}/log.txt, steps.jsonl, curve.png"),
        ]
    return rows


def finished_table(args: argparse.Namespace, state: State, folder: Path | None, own: bool) -> list[tuple[str, str]]:
    """What to say of a run that had ended before; ``own``: its checkpoint lies in the output folder."""
    longer = f"the same command with a larger --epochs (now {args.epochs})"
    longer += f" or --max-steps (now {args.max_steps})" if args.max_steps else ""
    rows = [
        ("done", f"{state.epoch} of {args.epochs} epochs, {state.step} steps"),
        ("best test accuracy", f"{state.best:.2f} %"),
        ("evaluate again", "the same command with --eval"),
        ("train longer", longer),
    ]
    if folder and own:
        rows.append(("start over", f"rm -r {shlex.quote(str(folder))}, or another --output_dir"))
    return rows
