"""The program: flags in, an exit code and at most one line of error out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from stvit.train import recipes
from stvit.train.checks import check
from stvit.train.errors import Interrupted, Preempted, Stop, UserError, disk_error
from stvit.train.flags import build_parser
from stvit.train.launch import launch


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``argv``. What it gives replaces what ``--config`` gives, that the recipe, that the data set's preset.

    ``args.preset`` holds the preset's values that are in force, for the user to see.

    Raises:
        UserError: for an unknown flag or a value that can't be right.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    first = parser.parse_args(given)
    words: list[str] = []
    if first.recipe:
        words += recipes.command_line(recipes.recipe(first.recipe), parser, f"--recipe {first.recipe}")
    if first.config:
        words += recipes.command_line(recipes.read_config(first.config), parser, f"--config {first.config}")
    first = parser.parse_args([*words, *given])
    measured = "SYNTHETIC" if first.synthetic or first.throughput else None
    data_set = measured or first.data_set or ("IMNET" if first.data_path or first.recipe else "DIGITS")
    preset = recipes.PRESETS.get(data_set, {})
    parser.set_defaults(**preset)
    args = parser.parse_args([*words, *given])
    args.data_set = data_set
    args.preset = {name: value for name, value in preset.items() if getattr(args, name) == value}
    check(args)
    return args


def _message(stop: Stop) -> str:
    """What to print; a DataLoader's worker passes on an error with its traceback, whose last line is the message."""
    text = str(stop)
    if "Original Traceback" not in text:
        return text
    return text.strip().splitlines()[-1].partition(f"{type(stop).__name__}: ")[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    try:
        args = parse_args(argv)
        if args.list_recipes:
            print(recipes.listing())
            return 0
        if args.processes > 1 and "RANK" not in os.environ:
            return launch(sys.argv[1:] if argv is None else argv, args.processes)
        try:
            from stvit.train.run import run
        except ModuleNotFoundError as error:
            raise UserError(f"the training program needs {error.name}: pip install 'stvit[train]'") from error
        return run(args)
    except Stop as stop:
        _tell(stop)
        return stop.exit_code
    except OSError as error:
        _tell(disk_error(error))
        return 1
    except KeyboardInterrupt:
        print("main.py: interrupted before training began", file=sys.stderr)
        return Interrupted.exit_code


def _tell(stop: Stop) -> None:
    """One line on standard error, from one process."""
    text = _message(stop)
    if isinstance(stop, (Interrupted, Preempted)) or "torch" not in sys.modules:
        if os.environ.get("RANK", "0") == "0":
            print(f"main.py: {text}", file=sys.stderr)
        return
    from stvit.train.distributed import first_to_say, let_others_ask

    if first_to_say(text):
        print(f"main.py: {text}", file=sys.stderr)
    let_others_ask(text)
