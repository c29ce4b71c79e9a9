"""A stage of the GPU check: its clock, its steps, each a command with a log and a time limit, and its report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bench.harness import console, record

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 540.0  # seconds that a stage may take, building included
GRACE = 20.0  # of these, the seconds between asking a step to stop and killing it
RED = ("failed", "timed out")
HIDDEN = ("step", "status", "seconds", "exit", "tail", "command")  # no counts


class Stage:
    """One stage while it runs: its clock, its steps and their results."""

    def __init__(self, name: str, out: Path, device: torch.device, extra: Sequence[str] = (), limit: float = LIMIT):
        self.name, self.out, self.device, self.extra, self.limit = name, out, device, list(extra), limit
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
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

    def skip(self, step: str, why: str) -> None:
        self.rows.append({"step": step, "status": "skipped", "seconds": 0.0, "exit": None, "note": why})
        self.write()

    def step(
        self,
        step: str,
        command: Sequence[str],
        counts: Callable[[str], dict[str, Any]] = lambda output: {},
        environment: dict[str, str] | None = None,
        share: float = 1.0,
        seconds: float = LIMIT,
    ) -> dict[str, Any]:
        """Runs a command, in a share of the time left and at most in `seconds`, and records it. `counts` reads its
        output; where the command ended well and in time, a "status" among them is what counts."""
        log = self.out / f"{self.name}-{step}.log"
        console.say(f"== {self.name}: {step}: {' '.join(command)}")
        began = time.monotonic()
        if self.left > 0:
            code, in_time = run(command, log, min(seconds, share * self.left), environment or {})
        else:
            log.write_text("")
            code, in_time = None, False
        return self.note(step, command, code, in_time, time.monotonic() - began, counts)

    def note(
        self, step: str, command: Sequence[str], code: int | None, in_time: bool, seconds: float,
        counts: Callable[[str], dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        """Records how a command ended, and writes the stage's file: what is there outlives what comes."""
        output = (self.out / f"{self.name}-{step}.log").read_text(errors="replace")
        status = "timed out" if not in_time else "failed" if code else "passed"
        row = {"step": step, "status": status, "seconds": round(seconds, 1), "exit": code}
        found = counts(output)
        if status != "passed":
            found.pop("status", None)
            row["tail"] = output[-2000:]
        self.rows.append({**row, **found, "command": " ".join(command)})
        self.write()
        return self.rows[-1]

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


class Background:
    """A command that runs beside a stage's steps, its output in the step's log alone; `end` records it."""

    def __init__(self, stage: Stage, step: str, command: Sequence[str]) -> None:
        self.stage, self.step, self.command = stage, step, command
        self.began = time.monotonic()
        with (stage.out / f"{stage.name}-{step}.log").open("wb") as log:
            self.child = subprocess.Popen(
                command, cwd=ROOT, env=_variables({}), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        console.say(f"== {stage.name}: {step}, in the background: {' '.join(command)}")

    def end(self, seconds: float, counts: Callable[[str], dict[str, Any]] = lambda output: {}) -> dict[str, Any]:
        """Waits for so long, then stops it."""
        in_time = True
        try:
            self.child.wait(max(0.0, min(seconds, self.stage.left)))
        except subprocess.TimeoutExpired:
            in_time = False
        self.kill()
        took = time.monotonic() - self.began
        return self.stage.note(self.step, self.command, self.child.returncode, in_time, took, counts)

    def kill(self) -> None:
        _signal(self.child, signal.SIGKILL)
        self.child.wait()


def run(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> tuple[int | None, bool]:
    """(exit code, whether it ended in time). Output goes to the terminal and to `log`.

    The command gets a process group of its own. At the limit the group is asked to stop (SIGINT: pytest prints what
    it has, a benchmark keeps its rows), and killed GRACE later; what a dead command leaves behind is killed as well.
    """
    with log.open("wb") as file:
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=_variables(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            file.write(f"error: {error}\n".encode())
            return 127, True
        assert child.stdout is not None
        copier = threading.Thread(target=_copy, args=(child.stdout, file), daemon=True)
        copier.start()
        in_time = True
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            in_time = False
            _signal(child, signal.SIGINT)
            try:
                child.wait(GRACE * 0.75)
            except subprocess.TimeoutExpired:
                pass
        finally:  # also when this program is interrupted
            _signal(child, signal.SIGKILL)
            code = child.wait()
            copier.join(5)
    return code, in_time


def _variables(changed: dict[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **changed}


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # the whole group has ended


def _copy(source: BinaryIO, log: BinaryIO) -> None:
    for line in source:
        try:
            log.write(line)
            log.flush()
        except ValueError:  # the log was closed on a straggler
            return
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()
