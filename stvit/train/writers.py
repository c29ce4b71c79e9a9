"""TensorBoard and Weights & Biases: where a run's rows go beside its own files."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from stvit.train.errors import UserError

Row = dict[str, Any]


class Writer(Protocol):
    def add_steps(self, rows: list[Row]) -> None: ...
    def add_epoch(self, row: Row) -> None: ...
    def close(self) -> None: ...


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within names ``path``: that of a failed write names nothing."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


class TensorBoard:
    """``OUTPUT_DIR/tensorboard``; what a killed run wrote after ``step`` is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.folder = folder
        with naming(folder):
            self.board = SummaryWriter(str(folder), purge_step=step + 1)

    def add_steps(self, rows: list[Row]) -> None:
        with naming(self.folder):
            for row in rows:
                self.board.add_scalar("train/loss", row["loss"], row["step"])
                self.board.add_scalar("train/lr", row["lr"], row["step"])

    def add_epoch(self, row: Row) -> None:
        with naming(self.folder):
            for name, value in row.items():
                if name != "epoch":
                    self.board.add_scalar(name, value, row["epoch"])
            self.board.flush()

    def close(self) -> None:
        with naming(self.folder):
            self.board.close()


class Wandb:
    """A run of Weights & Biases, the same one after resuming in the same folder."""

    def __init__(self, args: argparse.Namespace, folder: Path | None) -> None:
        """Raises UserError where the package is missing."""
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError("--wandb needs wandb: pip install wandb") from error
        place = str(folder.resolve()) if folder else None
        self.run = wandb.init(
            project=args.wandb,
            dir=place,
            name=args.output_dir or None,
            id=hashlib.sha256(place.encode()).hexdigest()[:16] if place else None,
            resume="allow",
            config=vars(args),
        )

    def add_steps(self, rows: list[Row]) -> None:
        for row in rows:
            self.run.log({"train/loss": row["loss"], "train/lr": row["lr"]}, step=row["step"])

    def add_epoch(self, row: Row) -> None:
        self.run.log({name: value for name, value in row.items() if name != "epoch"}, step=row["steps"])

    def close(self) -> None:
        self.run.finish()


def build_writers(args: argparse.Namespace, folder: Path | None, step: int) -> list[Writer]:
    """What the flags ask for; TensorBoard needs a folder.

    Raises:
        UserError: where a package is missing.
    """
    writers: list[Writer] = []
    if folder and args.tensorboard:
        writers.append(TensorBoard(folder / "tensorboard", step))
    if args.wandb:
        writers.append(Wandb(args, folder))
    return writers
