"""A stage of the GPU check: its clock, its steps, each a command with a log and a time limit, and its report."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import console, record
from bench.harness.child import ROOT, Child

LIMIT = 540.0  # seconds that a stage may take, building included
GRACE = 20.0  # of these, the seconds between asking a step to stop and killing it
RED = ("failed", "timed out")
HIDDEN = ("step", "status", "seconds", "exit", "tail", "command")  # no counts
Row = dict[str, Any]
Counts = Callable[[str], Row]  # a step's output -> what it tells


class Stage:
    """One stage while it runs: its clock, its steps and their results."""

    def __init__(self, name: str, out: Path, device: torch.device, extra: Sequence[str] = (), limit: float = LIMIT):
        self.name, self.out, self.device, self.extra, self.limit = name, out, device, list(extra), limit
        self.began = time.monotonic()
        self.rows: list[Row] = []
        out.mkdir(parents=True, exist_ok=True)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds that a step may take before it is asked to stop."""
        return max(0.0, self.limit - GRACE - self.seconds)

    @property
    def status(self) -> str:
        states = [row["status"] for row in self.rows]
        return next((state for state in (*RED, "passed") if state in states), "skipped")

    def note(self, step: str, status: str, seconds: float = 0.0, code: int | None = None, **more: Any) -> Row:
        """Records a step, and writes the stage's file: what is there outlives what comes."""
        self.rows.append({"step": step, "status": status, "seconds": round(seconds, 1), "exit": code, **more})
        self.write()
        return self.rows[-1]

    def skip(self, step: str, why: str) -> None:
        self.note(step, "skipped", note=why)

    def step(
        self, step: str, command: Sequence[str], counts: Counts = lambda output: {},
        environment: dict[str, str] | None = None, seconds: float = LIMIT,
    ) -> Row:  # fmt: skip
        """Runs a command, at most for so long and for the time that is left, and records it as `Step.end` does."""
        if self.left == 0:
            return self.note(step, "timed out", command=" ".join(command))
        return Step(self, step, command, environment).end(seconds, counts)

    def write(self) -> Path:
        path = self.out / f"gpu-check-{self.name}.json"
        seconds = round(self.seconds, 1)
        return record.write(
            path, "gpu_check", self.device, self.rows, stage=self.name, status=self.status, seconds=seconds
        )

    def finish(self) -> None:
        """Writes the stage's file and prints its table."""
        path = self.write()
        cells = []
        for row in self.rows:
            counts = {name: value for name, value in row.items() if name not in HIDDEN and value is not None}
            told = ", ".join(str(value) if name == "note" else f"{value} {name}" for name, value in counts.items())
            cells.append([row["step"], row["status"], f"{row['seconds']:.0f} s", told])
        where = record.environment(self.device)["name"] or self.device.type
        title = f"{self.name}: {self.status} in {self.seconds:.0f} s on {where} ({path})"
        console.table(title, ("step", "status", "time", "counts"), cells, left=4)


class Step:
    """A command that runs beside a stage until `end`, in a process group of its own, its output in the step's log."""

    def __init__(self, stage: Stage, name: str, command: Sequence[str], environment: dict[str, str] | None = None):
        self.stage, self.name, self.command = stage, name, command
        self.began = time.monotonic()
        log = stage.out / f"{stage.name}-{name}.log"
        console.say(f"== {stage.name}: {name}: {' '.join(command)} > {log}")
        self.child = Child(command, log, _variables(environment or {}))

    def end(self, seconds: float, counts: Counts = lambda output: {}) -> Row:
        """Waits for so long and records how it ended. `counts` reads its output; where the command ended well and in
        time, a "status" among them is what counts.

        At the limit the process group is asked to stop (SIGINT: pytest prints what it has, a benchmark keeps its rows),
        and killed GRACE later; what a dead command leaves behind is killed as well.
        """
        in_time = self.child.ends_in(min(seconds, self.stage.left))
        if not in_time:
            self.child.signal(signal.SIGINT)
            self.child.ends_in(GRACE * 0.75)
        self.child.kill()
        output, code = self.child.said(), self.child.code
        status = "timed out" if not in_time else "failed" if code else "passed"
        found = {"status": status, **counts(output), "command": " ".join(self.command)}
        if status != "passed":
            found.update(status=status, tail=output[-2000:])
            console.say(output[-2000:])
        return self.stage.note(self.name, found.pop("status"), time.monotonic() - self.began, code, **found)


def _variables(changed: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **changed}
