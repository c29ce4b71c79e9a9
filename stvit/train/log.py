"""What a run leaves behind for reading: JSON lines and the curve."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stvit.checkpoint import whole_file
from stvit.train.writers import Writer, build_writers, naming

Row = dict[str, Any]


class JsonLines:
    """A file of one JSON object a line, also kept in memory."""

    def __init__(self, path: Path | None, keep: Callable[[Row], bool]) -> None:
        """Take over what ``path`` holds as far as ``keep`` says; None keeps rows in memory only."""
        self.path = path
        self.rows: list[Row] = []
        if path is not None:
            self.rows = [row for row in _read(path) if keep(row)]
            with whole_file(path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, *rows: Row) -> None:
        """Add rows; each is on the disk when this returns."""
        self.rows += rows
        if self.path is None:
            return
        with naming(self.path), self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _read(path: Path) -> list[Row]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line cut short when the process was killed
            continue
    return [row for row in rows if isinstance(row, dict) and "epoch" in row]


class Log:
    """``log.txt`` (a line an epoch), ``steps.jsonl`` (a line a step), ``curve.png`` and, if wanted, tensorboard."""

    def __init__(self, folder: Path | None, epoch: int, step: int, args: argparse.Namespace, main: bool = True) -> None:
        """Continue a log after ``epoch`` epochs and ``step`` steps; what a killed run wrote after them is dropped."""
        self.folder = folder
        self.epochs = JsonLines(folder / "log.txt" if folder else None, lambda row: int(row["epoch"]) < epoch)
        self.steps = JsonLines(folder / "steps.jsonl" if folder else None, lambda row: int(row.get("step", 0)) <= step)
        self._drawn = time.monotonic()
        self.writers: list[Writer] = build_writers(args, folder, step) if main else []

    def add_steps(self, rows: list[Row]) -> None:
        """Rows with step, epoch, loss, lr."""
        self.steps.append(*rows)
        for writer in self.writers:
            writer.add_steps(rows)

    def add_epoch(self, row: Row) -> None:
        """One epoch's row; redraws the curve when the last drawing is half a minute old."""
        self.epochs.append(row)
        for writer in self.writers:
            writer.add_epoch(row)
        if time.monotonic() - self._drawn > 30:
            self.draw()

    def close(self) -> None:
        """Nothing more will come."""
        for writer in self.writers:
            writer.close()
        self.writers = []

    def draw(self) -> None:
        """Write ``curve.png``."""
        if self.folder and self.epochs.rows:
            draw_curve(self.epochs.rows, self.steps.rows, self.folder / "curve.png")
        self._drawn = time.monotonic()


def draw_curve(epochs: list[Row], steps: list[Row], path: Path) -> None:
    """Training loss of each step and test loss over epochs on the left, test accuracy on the right."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    position = _epoch_positions(steps)
    loss.plot(position, [row["loss"] for row in steps], linewidth=0.6, alpha=0.5, label="training, each step")
    ends = [row["epoch"] + 1 for row in epochs]
    mark = "o" if len(epochs) < 40 else ""
    loss.plot(ends, [row["train_loss"] for row in epochs], marker=mark, markersize=3, label="training, epoch mean")
    loss.plot(ends, [row["test_loss"] for row in epochs], marker=mark, markersize=3, label="test")
    accuracy.plot(ends, [row["test_acc1"] for row in epochs], marker=mark, markersize=3, label="top 1")
    averaged = [row for row in epochs if "test_acc1_ema" in row]
    if averaged:
        at = [row["epoch"] + 1 for row in averaged]
        accuracy.plot(
            at, [row["test_acc1_ema"] for row in averaged], marker=mark, markersize=3, label="top 1, averaged"
        )
    best = max(epochs, key=lambda row: row["test_acc1"])
    accuracy.set_title(
        f"test accuracy: best {best['test_acc1']:.2f} % in epoch {best['epoch'] + 1}, "
        f"last {epochs[-1]['test_acc1']:.2f} %",
        fontsize="medium",
    )
    loss.set_title(
        f"loss: training {epochs[-1]['train_loss']:.3f}, test {epochs[-1]['test_loss']:.3f}", fontsize="medium"
    )
    loss.set_ylabel("loss")
    accuracy.set_ylabel("%")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _epoch_positions(steps: list[Row]) -> list[float]:
    """Where each step lies on the epoch axis: an epoch's steps spread evenly over it."""
    counts: dict[int, int] = {}
    for row in steps:
        counts[row["epoch"]] = counts.get(row["epoch"], 0) + 1
    seen: dict[int, int] = {}
    positions = []
    for row in steps:
        seen[row["epoch"]] = seen.get(row["epoch"], 0) + 1
        positions.append(row["epoch"] + seen[row["epoch"]] / counts[row["epoch"]])
    return positions
