"""Reads result files, picks the rows that tables and figures show, and writes the tables in Markdown.

Only files measured on a GPU count (environment.device == "cuda"). A row without a speed (its gate failed, memory ended,
it raised) never shows a number. Ratios are taken within one file: both sides ran in the same run on the same GPU.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
Lines = tuple[list[str], list[list[str]]]  # of a table: its header, its rows

EAGER, COMPILED = "authors", "authors compiled"  # contenders of bench.ops
OPS = {
    "core": "Super token attention without refinement",
    "attention": "Super token attention with refinement",
    "sampling": "Super token sampling",
    "upsampling": "Token upsampling",
    "gelu_depthwise": "GELU and residual depthwise 3x3",
    "residual_depthwise": "Residual depthwise 3x3",
    "channel_layer_norm": "LayerNorm over channels",
    "residual_branch": "LayerScale, drop-path and residual",
}
MODES = {"train": "Training step", "inference": "Inference"}
AUTHORS_EAGER = ("authors", "authors-channels-last")  # contenders of bench.training
DASH = "–"


class ResultError(Exception):
    """A result file can't be read, or two of them hold the same measurement."""


class Result(NamedTuple):
    """One result file."""

    path: Path
    benchmark: str
    environment: dict[str, Any]
    rows: list[Row]
    about: dict[str, Any]  # the whole file


class Group(NamedTuple):
    """What is compared with each other: rows of one file that differ in the contender alone."""

    result: Result
    key: tuple[Any, ...]
    rows: dict[str, Row]

    @property
    def any(self) -> Row:
        return next(iter(self.rows.values()))


def load(results: Path) -> tuple[dict[str, list[Result]], list[str]]:
    """The files of each GPU's folder, and those refused, with the reason. Raises ResultError for one it can't read."""
    found: dict[str, list[Result]] = {}
    refused = []
    for path in sorted(results.glob("*/*.json")):
        try:
            content = json.loads(path.read_text())
            result = Result(path, content["benchmark"], content["environment"], content["rows"], content)
            device = result.environment["device"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultError(f"{path} is no result file: {type(error).__name__}: {error}") from error
        if device != "cuda":
            refused.append(f"{path}: measured on {device}, not on a GPU")
        else:
            found.setdefault(path.parent.name, []).append(result)
    return found, refused


def groups(results: Iterable[Result], benchmark: str, keys: Sequence[str]) -> list[Group]:
    """The benchmark's rows by the values of `keys`, in the files' order."""
    found: dict[tuple[Any, ...], Group] = {}
    for result in results:
        if result.benchmark != benchmark:
            continue
        for row in result.rows:
            try:
                key = tuple(row[name] for name in keys)
                group = found.setdefault(key, Group(result, key, {}))
                if group.result.path != result.path:
                    what = ", ".join(map(str, key))
                    raise ResultError(f"{group.result.path} and {result.path} both hold {benchmark} of {what}")
                group.rows[row["contender"]] = row
            except KeyError as error:
                raise ResultError(f"{result.path}: a row lacks {error}") from error
    return list(found.values())


def about(result: Result) -> str:
    """GPU, driver, versions and commit."""
    e = result.environment
    commit = f"commit {e['commit'][:10]}" if e.get("commit") else "commit unknown"
    parts = [e["name"], f"driver {e.get('driver')}", f"torch {e['torch']}", f"triton {e.get('triton')}", commit]
    return ", ".join(parts) + ("" if e.get("clean", True) else " with local changes")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; the columns after the first `left` are aligned right."""
    lines = [header, ["---" if i < left else "---:" for i in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    """Three digits that count, and all of those before the point."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def times(a: float, b: float) -> str:
    return f"{number(a / b)}x"


def over(key: str, a: Row | None, b: Row | None) -> str:
    """How many times b's figure a's is, where there are both."""
    return times(a[key], b[key]) if a and b else DASH


# Ops: median_ms, p20_ms, p80_ms of rows whose status is "timed".


def ops_groups(results: Iterable[Result]) -> list[Group]:
    """Forward + backward, detached; of each op and shape the first dtype (bfloat16 where it was
    timed) and the largest batch at which one of our kernels was."""
    keys = ("op", "shape", "batch", "dtype", "mode", "pass")
    wanted = [
        group
        for group in groups(results, "ops", keys)
        if group.key[4:] == ("detached", "forward+backward") and ours(group) is not None
    ]
    best: dict[tuple[str, str], Group] = {}
    for group in wanted:
        kept = best.setdefault(group.key[:2], group)
        if (group.key[3] == "bfloat16", group.key[2]) > (kept.key[3] == "bfloat16", kept.key[2]):
            best[group.key[:2]] = group
    order = list(OPS)
    return sorted(best.values(), key=lambda g: order.index(g.key[0]) if g.key[0] in order else len(order))


def by_op(results: Iterable[Result]) -> list[tuple[str, list[Group]]]:
    return [(op, list(found)) for op, found in itertools.groupby(ops_groups(results), lambda group: group.key[0])]


def timed(group: Group, contender: str) -> Row | None:
    row = group.rows.get(contender)
    return row if row is not None and row["status"] == "timed" else None


def ours(group: Group) -> Row | None:
    """The fastest of our kernels."""
    rows = [row for row in group.rows.values() if row["status"] == "timed" and not row["baseline"]]
    return min(rows, key=lambda row: row["median_ms"], default=None)


def shape_name(row: Row) -> str:
    """ "S stage 1, 224" for a published shape; B's and L's are the same."""
    model, _, rest = row["shape"].partition("/")
    if model not in ("S", "B"):
        return str(row["shape"])
    stage, _, image = rest.partition("/")
    return f"{'B/L' if model == 'B' else model} stage {stage}, {image}"


def milliseconds(group: Group, contender: str) -> str:
    """ "1.23 [1.22, 1.25]", or why there is no time."""
    row = group.rows.get(contender)
    if row is None:
        return DASH
    if row["status"] != "timed":
        return {"failed gate": "wrong result", "out of memory": "out of memory"}.get(row["status"], "failed")
    return f"{number(row['median_ms'])} [{number(row['p20_ms'])}, {number(row['p80_ms'])}]"


def ops_lines(of_op: Sequence[Group]) -> Lines:
    header = [
        "shape", "C x H x W", "batch", "authors, ms", "compiled, ms", "ours, ms", "kernels", "over eager",
        "over compiled", "of the floor", "memory, MiB",
    ]  # fmt: skip
    rows = []
    for group in of_op:
        mine = ours(group)
        assert mine is not None
        eager, compiled = timed(group, EAGER), timed(group, COMPILED)
        memory = mine["peak_bytes"] and f"{number(mine['peak_bytes'] / 2**20)}"
        if memory and eager and eager["peak_bytes"]:
            memory = f"{memory} / {number(eager['peak_bytes'] / 2**20)}"
        rows.append([
            shape_name(mine), f"{mine['channels']} x {mine['height']} x {mine['width']}", str(mine["batch"]),
            milliseconds(group, EAGER), milliseconds(group, COMPILED), milliseconds(group, mine["contender"]),
            mine["contender"], over("median_ms", eager, mine), over("median_ms", compiled, mine),
            f"{mine['percent_of_floor']:.0f} %", memory or DASH,
        ])  # fmt: skip
    return header, rows


# Training: images_per_s, _p20, _p80 of rows without an "error".


def training_groups(results: Iterable[Result]) -> list[Group]:
    return groups(results, "training", ("model", "size", "mode"))


def fastest(group: Group, *prefixes: str, but: Sequence[str] = ()) -> Row | None:
    """The fastest of the contenders whose names begin so."""
    rows = [row for name, row in group.rows.items() if name.startswith(prefixes) and name not in but]
    return max((row for row in rows if "error" not in row), key=lambda row: row["images_per_s"], default=None)


def sides(group: Group) -> tuple[Row | None, Row | None, Row | None]:
    """The authors' code in eager mode, the same compiled, and ours, each at its best setting. timm's models, there for
    context, are compiled and nobody else's."""
    compiled = [name for name in group.rows if name not in AUTHORS_EAGER]
    return (
        fastest(group, *AUTHORS_EAGER, but=compiled),
        fastest(group, "authors", "timm", but=AUTHORS_EAGER),
        fastest(group, "ours-"),
    )


def images(row: Row | None) -> str:
    """ "1,234 (graph)", the setting in brackets, and the batch where it had to be smaller than asked for."""
    if row is None:
        return DASH
    setting = row["contender"].split("-", 1)[1:]
    smaller = [f"batch {row['batch']}"] if row["batch"] != row["batch_asked"] else []
    notes = ", ".join([*setting, *smaller])
    return f"{number(row['images_per_s'])}{f' ({notes})' if notes else ''}"


def training_lines(of_mode: Sequence[Group]) -> Lines:
    header = [
        "model", "size", "batch", "authors, images/s", "compiled, images/s", "ours, images/s", "over eager",
        "over compiled", "memory, GB",
    ]  # fmt: skip
    rows = []
    for group in of_mode:
        eager, compiled, mine = sides(group)
        memory = DASH
        if mine and mine["peak_bytes"]:
            memory = f"{mine['peak_bytes'] / 1e9:.1f}"
            if eager and eager["peak_bytes"] and eager["batch"] == mine["batch"]:
                memory += f" / {eager['peak_bytes'] / 1e9:.1f}"
        rows.append([
            group.any["model"], str(group.any["size"]), str(group.any["batch_asked"]), images(eager), images(compiled),
            images(mine), over("images_per_s", mine, eager), over("images_per_s", mine, compiled), memory,
        ])  # fmt: skip
    return header, rows


# Convergence: one file, one comparison; final_accuracy and the like of rows without an "error".


def convergence_lines(runs: Sequence[Row], target: float | None) -> Lines:
    to_target = f"s to {target:.1%}" if target is not None else "s to the same accuracy"
    header = ["run", "steps", "loss", "accuracy", "seconds", to_target, "distance", "verdict"]
    forms = {"final_loss": ".4f", "final_accuracy": ".2%", "seconds": ".1f", "seconds_to_target": ".1f", "mean": ".5f"}
    lines = []
    for row in runs:
        known = {**row, **(row.get("distance") or {})}
        figures = [DASH if known.get(name) is None else format(known[name], form) for name, form in forms.items()]
        verdict = {True: "passed", False: "too far", None: "baseline"}[row.get("passed")]
        verdict = "failed" if "error" in row else verdict
        lines.append([f"{row['contender']}, seed {row['seed']}", str(row["steps"]), *figures, verdict])
    return header, lines


def convergence_subject(result: Result) -> tuple[str, str]:
    """("stvit_small at 224", "batch 64, bfloat16, ..."): what all runs of the file have in common."""
    row = result.rows[0]
    return f"{row['model']} at {row['size']}", f"batch {row['batch']}, {row['dtype']}, {result.about['data']}"


def convergences(results: Iterable[Result]) -> list[Result]:
    return [result for result in results if result.benchmark == "convergence" and result.rows]
