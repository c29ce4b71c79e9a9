"""The figures of result files: horizontal bars with their spread, and curves over training steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state

from bench.harness import record
from bench.report import tables
from bench.report.tables import Group, Result, Row

# Blue, orange, green, purple, yellow of Okabe and Ito, which the colour-blind can tell apart; grey for what is behind.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8c8c8c"
OPS = {tables.EAGER: GREY, tables.COMPILED: ORANGE, "triton": BLUE, "cuda": GREEN}
SIDES = {"authors": GREY, "compiled": ORANGE, "ours": BLUE}  # as in the tables
WIDTH, DPI = 10.5, 120  # inches across; pixels an inch
BAR = 0.2  # inches across a bar

Bar = tuple[float, float, float] | str  # a value and the ends of its spread, or a word in place of a number


class Panel(NamedTuple):
    """`bar` makes a bar of what a side has at one name: of a row, of rows by mode."""

    title: str
    unit: str
    form: str
    bar: Callable[[Any], Bar]


Curve = tuple[str, str, str, Sequence[tuple[float, float]]]  # name, colour, style of the line, (step, value) points


def draw(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draws the figures of one GPU's results into its folder; returns their paths."""
    drawn = [saved(of_op(op, groups), folder / f"ops-{op}.png") for op, groups in tables.by_op(results)]
    training = tables.training_groups(results)
    if training:
        drawn.append(saved(of_training(training), folder / "training.png"))
    for result in tables.convergences(results):
        drawn.append(saved(of_convergence(result), folder / f"{result.path.stem}.png"))
    return drawn


def of_op(op: str, groups: Sequence[Group]) -> Figure:
    """Speed-up, share of the floor, memory: of the authors' code and of each of our kernels."""
    batches = ", ".join(map(str, sorted({group.any["batch"] for group in groups})))
    title = f"{tables.OPS.get(op, op)}, forward + backward, {groups[0].any['dtype']}, batch {batches}"
    ran = [name for name in OPS if any(name in group.rows for group in groups)]
    sides = {name: [tables.timed(group, name) or tables.milliseconds(group, name) for group in groups] for name in ran}
    panels = [
        Panel("speed-up over the authors' eager code", "times as fast", "{:.1f}x", speedup),
        Panel("share of the floor's speed", "%", "{:.0f} %", lambda row: spread(row["percent_of_floor"], row)),
        Panel("peak memory of a call", "MiB", "{:,.0f}", lambda row: memory(row, 2**20)),
    ]
    return bars(title, groups[0].result, [tables.shape_name(group.any) for group in groups], sides, panels, OPS)


def of_training(groups: Sequence[Group]) -> Figure:
    """Training, inference, memory of the training step: each side at its best setting, as in the tables."""
    title = f"Whole models, {groups[0].any['dtype']}, batch {groups[0].any['batch_asked']}"
    models: dict[tuple[str, int], dict[str, dict[str, Row | None]]] = {}  # -> side -> mode -> row
    for group in groups:
        model, size, mode = group.key
        for side, row in zip(SIDES, tables.sides(group), strict=True):
            models.setdefault((model, size), {}).setdefault(side, {})[mode] = row
    sides = {side: [of_model[side] for of_model in models.values()] for side in SIDES}

    panels = [
        Panel("training", "images/s", "{:,.0f}", lambda rows: images(rows.get("train"))),
        Panel("inference", "images/s", "{:,.0f}", lambda rows: images(rows.get("inference"))),
        Panel("peak memory of a training step", "GB", "{:.1f}", lambda rows: memory(rows.get("train"), 1e9)),
    ]
    return bars(title, groups[0].result, [f"{model} at {size}" for model, size in models], sides, panels, SIDES)


def speedup(row: Row) -> Bar:
    factor = 1.0 if row["contender"] == tables.EAGER else row["speedup"].get(tables.EAGER)
    return "no baseline" if factor is None else spread(factor, row)


def spread(value: float, row: Row) -> Bar:
    """With that of the row's time."""
    return value, value * row["median_ms"] / row["p80_ms"], value * row["median_ms"] / row["p20_ms"]


def memory(row: Row | None, unit: float) -> Bar:
    if row is None or row["peak_bytes"] is None:
        return "none" if row is None else "not measured"
    return (row["peak_bytes"] / unit,) * 3


def images(row: Row | None) -> Bar:
    return (row["images_per_s"], row["images_per_s_p20"], row["images_per_s_p80"]) if row else "none"


def of_convergence(result: Result) -> Figure:
    """Smoothed loss, its distance from the first run's (the reference with seed 0), test accuracy."""
    colors = itertools.cycle((BLUE, ORANGE, GREEN, PURPLE, YELLOW))
    losses: list[Curve] = []
    distances: list[Curve] = []
    accuracies: list[Curve] = []
    first = dict(map(tuple, result.rows[0]["curves"].get("smoothed", [])))
    for index, row in enumerate(result.rows):
        if "error" in row:
            continue
        baseline = row["contender"] == result.rows[0]["contender"]
        name = f"{row['contender']}, seed {row['seed']}"
        color, style = ("black" if index == 0 else GREY, "-") if baseline else (next(colors), "--")
        loss = [(step, value) for step, value in row["curves"]["smoothed"] if value is not None]  # None: not finite
        losses.append((name, color, style, loss))
        apart = [(step, abs(value - first[step])) for step, value in loss if first.get(step) is not None]
        distances += [(name, color, "-", apart)] if index else []
        accuracy = [(step, 100 * share) for step, share in row["curves"]["accuracy"]]
        accuracies.append((name, color, style, accuracy))
    panels = [
        ("training loss, smoothed", "cross entropy", losses),
        ("distance from the reference, seed 0", "difference of the losses", distances),
        ("test accuracy", "% of the test images", accuracies),
    ]
    model, details = tables.convergence_subject(result)
    figure = framed(f"Convergence of {model}", f"{details}. {tables.about(result)}.", 4.2)
    drawn = [panel for panel in panels if panel[2]]
    for axes, (title, unit, lines) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for name, color, style, points in lines:
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, color=color, linewidth=1.6, linestyle=style, label=name)
        plain(axes, title, "both", "training step")
        axes.set_ylabel(unit, fontsize=9)
    return figure


def framed(title: str, note: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    # Its first line is the legend's.
    figure.suptitle(f"\n{title}", fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def saved(figure: Figure, path: Path) -> Path:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    with record.written(path) as partial:
        figure.savefig(partial, dpi=DPI, facecolor="white", format="png", metadata={"Software": None})
    return path


def bars(
    title: str, result: Result, names: Sequence[str], sides: Mapping[str, Sequence[Any]], panels: Sequence[Panel],
    colors: Mapping[str, str],
) -> Figure:  # fmt: skip
    """Panels beside each other; in each, below each name, a bar of every side. A side that has a word has no bar."""
    note = f"Bars are medians, black lines reach from p20 to p80. {tables.about(result)}."
    figure = framed(title, note, len(names) * (len(sides) * BAR + 0.1) + 1.75)
    thick = 0.82 / len(sides)
    for axes, panel in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for index, (side, there) in enumerate(sides.items()):
            found = [each if isinstance(each, str) else panel.bar(each) for each in there]
            values = [(0.0, 0.0, 0.0) if isinstance(bar, str) else bar for bar in found]
            places = [place + (index - (len(sides) - 1) / 2) * thick for place in range(len(names))]
            ends = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
            drawn = axes.barh(
                places, [bar[0] for bar in values], thick * 0.9, xerr=ends, color=colors[side], label=side
            )
            labels = [bar if isinstance(bar, str) else panel.form.format(bar[0]) for bar in found]
            axes.bar_label(drawn, labels, padding=3, fontsize=8)
        axes.margins(x=0.24)
        plain(axes, panel.title, "x", panel.unit)
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=9)
    figure.axes[0].set_ylim(len(names) - 0.45, -0.55)
    return figure


def plain(axes: Axes, title: str, grid: str, unit: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, axis=grid, color="#e5e5e5", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
