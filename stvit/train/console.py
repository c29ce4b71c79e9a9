"""What a run shows: lines, a progress bar on a terminal, and a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_SECONDS = 10.0


class Screen:
    """Standard output of the main process; every other process is silent."""

    def __init__(self, show: bool) -> None:
        self.console = Console(quiet=not show, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, markup=False)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns: what, and its value."""
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.console.print(table, soft_wrap=False)

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Within the block, bars are drawn on a terminal."""
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=self.console, transient=True) as self._progress:
            yield
        self._progress = None

    def task(self, total: int, done: int = 0) -> Task:
        """Something of ``total`` steps that goes on while others come and go."""
        return Task(self, self._progress, total, done)


class Task:
    """Progress of one activity: a bar where there is a terminal, otherwise a line every ten seconds."""

    def __init__(self, screen: Screen, progress: Progress | None, total: int, done: int) -> None:
        self._screen, self._progress, self._total = screen, progress, total
        self._first, self._began = done, time.monotonic()
        self._told = self._began
        self._id = progress.add_task("", total=total, completed=done, note="") if progress else None

    def show(self, done: int, what: str, note: str = "") -> None:
        """``done`` of the total steps are done; ``what`` names the activity, ``note`` gives its figures."""
        if self._progress is not None and self._id is not None:
            self._progress.update(self._id, completed=done, description=what, note=note)
            return
        now = time.monotonic()
        if now - self._told < LINE_SECONDS:
            return
        self._told = now
        left = (now - self._began) / max(1, done - self._first) * (self._total - done)
        self._screen.say(f"{what}: {done}/{self._total}, {note + ', ' if note else ''}{_clock(left)} left")

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None and self._id is not None:
            self._progress.remove_task(self._id)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
