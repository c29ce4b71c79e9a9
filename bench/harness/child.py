"""A program that runs beside this one, under a time limit, so that a crash, a hang or exhausted memory cost itself."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """A command in a process group of its own, in the repository's root, its output in a file."""

    def __init__(self, command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> None:
        self.output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.poll()

    def ends_in(self, seconds: float) -> bool:
        """Waits so long for the command's end; it is killed where this program is interrupted meanwhile."""
        try:
            self.process.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            return False
        except BaseException:
            self.kill()
            raise
        return True

    def kill(self) -> None:
        """Ends the command, if need be, and whatever it started."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass  # the whole group has ended

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def last_line(self) -> str:
        return (self.said().strip().splitlines() or [""])[-1]
