"""What every benchmark prints: lines, tables and progress, in plain text; and what its command line shares."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

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


def some(named: Mapping[str, Any]) -> Callable[[str], list[Any]]:
    """An argparse type: names separated by commas -> what they name."""

    def parse(text: str) -> list[Any]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in named:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(named)}; got {name!r}")
        return [named[name] for name in names]

    return parse


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default cuda where there is one")


def device(name: str | None) -> torch.device:
    """What --device asks for; one that isn't there ends the program."""
    if name == "cuda" and not torch.cuda.is_available():
        usage_error("--device: no CUDA device found; --device cpu tries the tool on the CPU")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def usage_error(message: str) -> NoReturn:
    """Ends the program over a user's mistake: one line on standard error, exit code 2, no traceback."""
    failure(message, USAGE_ERROR)


def failure(message: str, code: int = 1) -> NoReturn:
    """Ends the program with one line on standard error and no traceback."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints a table of strings whose first `left` columns are aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    say(title)
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [f"{cell:{'<' if i < left else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        say("  ".join(cells).rstrip())


def progress(total: int) -> Callable[[str], None]:
    """`step(what)`, to be called before each of `total` steps: a line each."""
    began, numbers = time.monotonic(), itertools.count(1)
    return lambda what: say(f"[{next(numbers)}/{total}] {time.monotonic() - began:6.1f} s  {what}")
