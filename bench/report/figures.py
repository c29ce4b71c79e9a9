"""The figures of result files: panels of horizontal bars with their spread, and curves over training steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.patches import Patch

from bench.harness import record
from bench.report import tables
from bench.report.tables import Group, Result, Row

# Blue, orange, green, purple, yellow of Okabe and Ito, which the colour-blind can tell apart; grey for what is behind.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8c8c8c"
OF_OPS = {tables.EAGER: GREY, tables.COMPILED: ORANGE, "triton": BLUE, "cuda": GREEN}
WIDTH, DPI = 10.5, 120  # inches across; pixels an inch
BAR = 0.2  # inches across a bar

Bar = tuple[float, float, float] | str  # a value and the ends of its spread, or a word in place of a number
Series = dict[str, tuple[Sequence[str], Sequence[Bar]]]
Curve = tuple[str, str, str, Sequence[Sequence[float | None]]]  # name, colour, style of the line, [step, value] points


class Panel(NamedTuple):
    """Groups of bars below each other, each with a bar of every series: name -> (colours of its bars, bars)."""

    title: str
    groups: Sequence[str]
    series: Series
    unit: str
    form: str = "{:.1f}"
    mark: float | None = None  # where a dashed line is drawn


def draw(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Draws the figures of one GPU's results into its folder; returns their paths."""
    drawn = []
    for op, groups in tables.by_op(results):
        row, batches = groups[0].any, ", ".join(map(str, sorted({group.any["batch"] for group in groups})))
        title = f"{tables.OPS.get(op, op)}, forward + backward, {row['dtype']}, batch {batches}"
        drawn.append(bars(folder / f"ops-{op}.png", title, groups[0], [panels_of_op(groups)]))
    groups = [group for group in tables.training_groups(results) if tables.is_ours(group)]
    models: dict[tuple[str, int], dict[str, dict[str, Row]]] = {}  # -> mode -> contender -> row
    for group in groups:
        models.setdefault((group.key[0], group.key[1]), {})[group.key[2]] = group.rows
    if models:
        title = f"Whole models, {groups[0].any['dtype']}, batch {groups[0].any['batch_asked']}"
        rows = [panels_of_model(f"{model} at {size}", modes) for (model, size), modes in models.items()]
        drawn.append(bars(folder / "training.png", title, groups[0], rows))
    for result in tables.convergences(results):
        model, details = tables.convergence_subject(result)
        figure = framed(f"Convergence of {model}", f"{details}. {tables.about(result)}.", 4.2)
        curves(figure, panels_of_runs(result))
        drawn.append(saved(figure, folder / f"{result.path.stem}.png"))
    return drawn


# What goes into which panel


def panels_of_op(groups: Sequence[Group]) -> list[Panel]:
    """Speed-up, share of the floor, memory: of the authors' code and of each of our kernels."""
    ran = {name for group in groups for name, row in group.rows.items() if name in OF_OPS or not row["baseline"]}
    names = [tables.shape_name(group.any) for group in groups]

    def series(value: Callable[[Group, Row], Bar]) -> Series:
        found: Series = {}
        for name in (name for name in (*OF_OPS, *sorted(ran - set(OF_OPS))) if name in ran):
            rows = [(group, tables.timed(group, name)) for group in groups]
            missing = [tables.milliseconds(group, name).replace(tables.DASH, "not run") for group in groups]
            of_name = [value(*pair) if pair[1] else word for pair, word in zip(rows, missing, strict=True)]  # type: ignore[arg-type]
            found["authors, eager" if name == tables.EAGER else name] = [OF_OPS.get(name, YELLOW)] * len(names), of_name
        return found

    return [
        Panel("speed-up over the authors' eager code", names, series(speedup), "times as fast", "{:.1f}x"),
        Panel("share of the floor's speed", names, series(floor), "%", "{:.0f} %", 100),
        Panel("peak memory of a call", names, series(lambda _, row: memory(row, 2**20)), "MiB", "{:,.0f}"),
    ]


def speedup(group: Group, row: Row) -> Bar:
    base = tables.timed(group, tables.EAGER)
    if base is None:
        return "no baseline"
    if base is row:
        return 1.0, 1.0, 1.0
    return base["median_ms"] / row["median_ms"], base["p20_ms"] / row["p80_ms"], base["p80_ms"] / row["p20_ms"]


def floor(_: Group, row: Row) -> Bar:
    share = row["percent_of_floor"] * row["median_ms"]
    return row["percent_of_floor"], share / row["p80_ms"], share / row["p20_ms"]


def memory(row: Row, unit: float) -> Bar:
    return "not measured" if row["peak_bytes"] is None else (row["peak_bytes"] / unit,) * 3


def images(row: Row) -> Bar:
    return row["images_per_s"], row["images_per_s_p20"], row["images_per_s_p80"]


def panels_of_model(name: str, modes: dict[str, dict[str, Row]]) -> list[Panel]:
    """Training, inference, memory of the training step: of every contender."""
    names = sorted(set(itertools.chain.from_iterable(modes.values())), key=lambda n: (n.startswith("ours"), n))

    def panel(mode: str, title: str, value: Callable[[Row], Bar], unit: str, form: str) -> Panel:
        rows = [modes.get(mode, {}).get(name) for name in names]
        of_rows = ["not run" if row is None else "failed" if "error" in row else value(row) for row in rows]
        return Panel(title, names, {"": ([color_of(name) for name in names], of_rows)}, unit, form)

    return [
        panel("train", f"{name}: training", images, "images/s", "{:,.0f}"),
        panel("inference", "inference", images, "images/s", "{:,.0f}"),
        panel("train", "peak memory of a training step", lambda row: memory(row, 1e9), "GB", "{:.1f}"),
    ]


def color_of(name: str) -> str:
    """Grey for the authors' eager code, orange for it compiled, blue for ours."""
    if name.startswith("ours"):
        return BLUE
    return GREY if name in tables.AUTHORS_EAGER else ORANGE if name.startswith("authors") else PURPLE


def panels_of_runs(result: Result) -> list[tuple[str, str, list[Curve]]]:
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
        accuracies.append((name, color, style, [(step, 100 * share) for step, share in row["curves"]["accuracy"]]))
    panels = [
        ("training loss, smoothed", "cross entropy", losses),
        ("distance from the reference, seed 0", "difference of the losses", distances),
        ("test accuracy", "% of the test images", accuracies),
    ]
    return [panel for panel in panels if panel[2]]


# How it is drawn


def framed(title: str, note: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
    return figure


def saved(figure: Figure, path: Path) -> Path:
    with record.written(path) as partial:
        figure.savefig(partial, dpi=DPI, facecolor="white", format="png", metadata={"Software": None})
    return path


def bars(path: Path, title: str, group: Group, rows: Sequence[Sequence[Panel]]) -> Path:
    """Panels in a grid; those in one row share their groups, which the first one names."""
    note = f"Bars are medians, black lines reach from p20 to p80. {tables.about(group.result)}."
    heights = [max(len(p.groups) * (len(p.series) * BAR + 0.1) for p in row) for row in rows]
    figure = framed(title, note, sum(heights) + 0.75 * len(rows) + 1.0)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes_row, panels in zip(grid, rows, strict=True):
        for column, (axes, panel) in enumerate(zip(axes_row, panels, strict=True)):
            draw_bars(axes, panel, named=column == 0)
    names = {name: colors[0] for row in rows for panel in row for name, (colors, _) in panel.series.items() if name}
    if len(names) > 1:
        legend(figure, [Patch(color=color, label=name) for name, color in names.items()])
    return saved(figure, path)


def legend(figure: Figure, handles: Iterable[object]) -> None:
    figure.legend(handles=list(handles), loc="outside upper right", ncols=6, frameon=False, fontsize=9)  # type: ignore[arg-type]


def draw_bars(axes: Axes, panel: Panel, named: bool) -> None:
    count = len(panel.series)
    thick = 0.82 / count
    highest = [bar[2] for _, of_name in panel.series.values() for bar in of_name if not isinstance(bar, str)]
    right = max([*highest, panel.mark or 0.0]) or 1.0
    for index, (colors, of_name) in enumerate(panel.series.values()):
        for group, (color, bar) in enumerate(zip(colors, of_name, strict=True)):
            y = group + (index - (count - 1) / 2) * thick
            if isinstance(bar, str):
                axes.text(right * 0.01, y, bar, va="center", fontsize=8, color="#777777", style="italic")
                continue
            value, low, high = bar
            axes.barh(y, value, thick * 0.9, color=color)
            axes.plot([low, high], [y, y], color="black", linewidth=1.2, solid_capstyle="butt")
            axes.text(max(value, high) + right * 0.018, y, panel.form.format(value), va="center", fontsize=8, zorder=4)
    axes.set_xlim(0, right * 1.24)
    axes.set_ylim(len(panel.groups) - 0.45, -0.55)
    axes.set_yticks(range(len(panel.groups)), panel.groups if named else [""] * len(panel.groups), fontsize=9)
    plain(axes, panel.title, panel.unit, "x")
    if panel.mark is not None:
        axes.axvline(panel.mark, color="#333333", linewidth=1, linestyle="--", zorder=3)


def curves(figure: Figure, panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> None:
    """(title, name of the y axis, curves) beside each other, all over training steps."""
    for axes, (title, unit, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, color, style, points in lines:
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, color=color, linewidth=1.6, linestyle=style, label=name)
        plain(axes, title, "training step", "both")
        axes.set_ylabel(unit, fontsize=9)
    legend(figure, figure.axes[0].get_legend_handles_labels()[0])


def plain(axes: Axes, title: str, unit: str, grid: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(True, axis=grid, color="#e5e5e5", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
