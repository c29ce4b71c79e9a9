"""The figures of result files: what goes into which panel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.report import charts, tables
from bench.report.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, YELLOW, Bar, Curve, Panel, Series
from bench.report.tables import Group, Result, Row

OF_OPS = {tables.EAGER: GREY, tables.COMPILED: ORANGE, "triton": BLUE, "cuda": GREEN}


def draw(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draws the figures of one GPU's results into its folder; returns their paths."""
    drawn = []
    for op, groups in tables.by_op(results):
        row = groups[0].any
        batches = ", ".join(map(str, sorted({group.any["batch"] for group in groups})))
        title = f"{tables.OPS.get(op, op)}, forward + backward, {row['dtype']}, batch {batches}"
        drawn.append(charts.bars(folder / f"ops-{op}.png", title, note(groups[0]), [panels_of_op(groups)]))
    groups = [group for group in tables.training_groups(results) if tables.is_ours(group)]
    rows = [panels_of_model(model, size, modes) for (model, size), modes in by_model(groups).items()]
    if rows:
        title = f"Whole models, {groups[0].any['dtype']}, batch {groups[0].any['batch_asked']}"
        drawn.append(charts.bars(folder / "training.png", title, note(groups[0]), rows))
    for result in tables.convergences(results):
        model, details = tables.convergence_subject(result)
        path = folder / f"{result.path.stem}.png"
        about = f"{details}. {tables.about(result)}."
        drawn.append(charts.curves(path, f"Convergence of {model}", about, panels_of_runs(result)))
    return drawn


def note(group: Group) -> str:
    return f"Bars are medians, black lines reach from p20 to p80. {tables.about(group.result)}."


def panels_of_op(groups: Sequence[Group]) -> list[Panel]:
    """Speed-up, share of the floor, memory: of the authors' code and of each of our kernels."""
    ran = {name for group in groups for name, row in group.rows.items() if name in OF_OPS or not row["baseline"]}
    contenders = [name for name in (*OF_OPS, *sorted(ran - set(OF_OPS))) if name in ran]

    def series(value: Callable[[Group, Row], Bar]) -> list[Series]:
        found = []
        for name in contenders:
            rows = [(group, tables.timed(group, name)) for group in groups]
            missing = [tables.milliseconds(group, name).replace(tables.DASH, "not run") for group in groups]
            bars = [
                value(group, row) if row else Bar(None, word=word)
                for (group, row), word in zip(rows, missing, strict=True)
            ]
            color = OF_OPS.get(name, YELLOW)
            found.append(Series({tables.EAGER: "authors, eager"}.get(name, name), color, bars))
        return found

    names = [tables.shape_name(group.any) for group in groups]
    return [
        Panel("speed-up over the authors' eager code", names, series(speedup), "times as fast", "{:.1f}x"),
        Panel("share of the floor's speed", names, series(floor), "%", "{:.0f} %", 100, "floor"),
        Panel("peak memory of a call", names, series(memory), "MiB", "{:,.0f}"),
    ]


def speedup(group: Group, row: Row) -> Bar:
    base = tables.timed(group, tables.EAGER)
    if base is None:
        return Bar(None, word="no baseline")
    if base is row:
        return Bar(1.0)
    return Bar(base["median_ms"] / row["median_ms"], base["p20_ms"] / row["p80_ms"], base["p80_ms"] / row["p20_ms"])


def floor(group: Group, row: Row) -> Bar:
    share = row["percent_of_floor"] * row["median_ms"]
    return Bar(row["percent_of_floor"], share / row["p80_ms"], share / row["p20_ms"])


def memory(group: Group, row: Row) -> Bar:
    return Bar(None, word="not measured") if row["peak_bytes"] is None else Bar(row["peak_bytes"] / 2**20)


Modes = dict[str, dict[str, Row]]  # mode -> contender -> row


def by_model(groups: Sequence[Group]) -> dict[tuple[str, int], Modes]:
    found: dict[tuple[str, int], Modes] = {}
    for group in groups:
        model, size, mode = group.key
        found.setdefault((model, size), {})[mode] = group.rows
    return found


def panels_of_model(model: str, size: int, modes: Modes) -> list[Panel]:
    """Training, inference, memory of the training step: of every contender."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(modes.values())))
    names.sort(key=lambda name: (name.startswith("ours"), name))

    def panel(mode: str, title: str, value: Callable[[Row], Bar], unit: str, form: str) -> Panel:
        bars = []
        for name in names:
            row = modes.get(mode, {}).get(name)
            word = "not run" if row is None else "failed" if "error" in row else ""
            bars.append(Bar(None, word=word) if row is None or word else value(row))
        return Panel(title, names, [Series("", [color(name) for name in names], bars)], unit, form)

    return [
        panel("train", f"{model} at {size}: training", images, "images/s", "{:,.0f}"),
        panel("inference", "inference", images, "images/s", "{:,.0f}"),
        panel("train", "peak memory of a training step", gigabytes, "GB", "{:.1f}"),
    ]


def images(row: Row) -> Bar:
    return Bar(row["images_per_s"], row["images_per_s_p20"], row["images_per_s_p80"])


def gigabytes(row: Row) -> Bar:
    return Bar(None, word="not measured") if row["peak_bytes"] is None else Bar(row["peak_bytes"] / 1e9)


def color(name: str) -> str:
    """Grey for the authors' eager code, orange for it compiled, blue for ours."""
    if name.startswith("ours"):
        return BLUE
    return GREY if name in ("authors", "authors-channels-last") else ORANGE if name.startswith("authors") else PURPLE


def panels_of_runs(result: Result) -> list[tuple[str, str, list[Curve]]]:
    """Smoothed loss, its distance from the first run's (the reference with seed 0), test accuracy."""
    colors = iter(itertools.cycle((BLUE, ORANGE, GREEN, PURPLE, YELLOW)))
    losses, distances, accuracies = [], [], []
    first = dict(map(tuple, result.rows[0]["curves"].get("smoothed", [])))
    for index, row in enumerate(result.rows):
        if "error" in row:
            continue
        baseline = row["contender"] == result.rows[0]["contender"]
        name = f"{row['contender']}, seed {row['seed']}"
        color, style = (BLACK if index == 0 else GREY, "-") if baseline else (next(colors), "--")
        steps, loss = _xy(row["curves"]["smoothed"])
        losses.append(Curve(name, color, steps, loss, style))
        if index > 0:
            apart = [(step, abs(value - first[step])) for step, value in zip(steps, loss, strict=True) if step in first]
            distances.append(Curve(name, color, *_xy(apart), "-"))
        steps, accuracy = _xy(row["curves"]["accuracy"])
        accuracies.append(Curve(name, color, steps, [100 * share for share in accuracy], style))
    panels = [("training loss, smoothed", "cross entropy", losses)]
    if distances:
        panels.append(("distance from the reference, seed 0", "difference of the losses", distances))
    return [*panels, ("test accuracy", "% of the test images", accuracies)]


def _xy(points: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float]]:
    """Steps and values of the points that have one: a loss that was not finite is None."""
    there = [(step, value) for step, value in points if step is not None and value is not None]
    return [step for step, _ in there], [value for _, value in there]
