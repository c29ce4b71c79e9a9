"""The tables of what is predicted, on the terminal and in the README."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from bench.report.tables import DASH, MODES, Lines, ResultError, Row, markdown, number, times

SIDES = ("authors", "ours")


def predicted_lines(rows: Sequence[Row]) -> Lines:
    """Of rows of bench.predict, one for each model, size, mode and side: MB and us an image, kernels a step."""
    header = [
        "model", "size", "run", "authors, MB", "ours, MB", "authors, kernels", "ours, kernels", "authors, us",
        "ours, us", "ratio",
    ]  # fmt: skip
    lines = []
    for key, group in itertools.groupby(rows, key=lambda row: (row["model"], row["size"], row["mode"])):
        sides = {row["side"]: row for row in group}
        figures = [
            (name, form, side) for name, form in (("mb", ".0f"), ("kernels", ""), ("us", ".0f")) for side in SIDES
        ]
        ratio = times(sides["authors"]["us"], sides["ours"]["us"])
        cells = (format(sides[side][name], form) for name, form, side in figures)
        lines.append([key[0], str(key[1]), MODES[key[2]].lower(), *cells, ratio])
    return header, lines


def predicted(path: Path) -> tuple[str, str] | None:
    """The table of the file that bench.predict recorded, and what it was counted for; None where there is no file."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        about = f"one {content['gpu']}, batch {content['rows'][0]['batch']}, bfloat16"
        return markdown(*predicted_lines(content["rows"]), left=3), about
    except (ValueError, KeyError, IndexError) as error:
        raise ResultError(f"{path} is no file of bench.predict: {error!r}") from error


def error_lines(rows: Sequence[Row]) -> Lines:
    """Of rows of bench.predict.error, one for each kernel."""
    header = ["kernel", "launches", "timed, us a step", "predicted, us a step", "timed / predicted"]
    return header, [
        [
            row["kernel"], f"{row['predicted_launches']}", DASH if row["timed_us"] is None else number(row["timed_us"]),
            number(row["predicted_us"]), DASH if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
