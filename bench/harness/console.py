"""What every benchmark prints: lines, tables and progress. With rich where it is installed, in plain text otherwise."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text

    HAVE_RICH = True
except ImportError:  # a GPU machine that has torch and little else
    HAVE_RICH = False

USAGE_ERROR = 2  # argparse's own exit code for a wrong command line


def say(text: str = "") -> None:
    """One line, at once, also into a file or a pipe."""
    print(text, flush=True)


def parser(name: str, description: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Of `python -m bench.NAME`; description and epilog are printed as they are written."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        f"python -m bench.{name}", description=description, epilog=epilog, formatter_class=raw
    )


def positive(text: str) -> int:
    """A command line's whole number from 1 on."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def rate(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a rate from 0 to below 1, got {text}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def usage_error(message: str) -> NoReturn:
    """Ends the program over a user's mistake: one line on standard error, exit code 2, no traceback."""
    failure(message, USAGE_ERROR)


def failure(message: str, code: int = 1) -> NoReturn:
    """Ends the program with one line on standard error and no traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table of strings whose first `left` columns are aligned left and the others right."""
    if not (HAVE_RICH and sys.stdout.isatty()):
        say(plain_table(title, header, rows, left))
        return
    drawn = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        drawn.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console().print(drawn)


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The same as one string, the columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [title]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """Gives `step(what)`, to be called before each of `total` steps: a bar on a terminal, elsewhere a line a step."""
    if HAVE_RICH and sys.stdout.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, transient=True) as bar:
            task, begun = bar.add_task("", total=total), iter([0])  # the first step ends none

            def advance(what: str) -> None:
                bar.update(task, advance=next(begun, 1), description=what)

            yield advance
        return
    began, count = time.monotonic(), 0

    def line(what: str) -> None:
        nonlocal count
        count += 1
        say(f"[{count}/{total}] {time.monotonic() - began:6.1f} s  {what}")

    yield line
