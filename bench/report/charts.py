"""What figures are drawn with: panels of horizontal bars with their spread, and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

# Blue, orange, green, purple, yellow of Okabe and Ito, which the colour-blind can tell apart; grey for what is behind.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8c8c8c"
BLACK = "#222222"
WIDTH, DPI = 10.5, 120  # inches across; pixels an inch
BAR = 0.2  # inches across a bar


class Bar(NamedTuple):
    """A value and the ends of its spread (none where low is None), or a word in place of a number."""

    value: float | None
    low: float | None = None
    high: float | None = None
    word: str = ""


class Series(NamedTuple):
    """Bars, one for each group, of one colour or of a colour each."""

    name: str
    color: str | Sequence[str]
    bars: Sequence[Bar]


class Panel(NamedTuple):
    """Groups of horizontal bars below each other. `mark` is where a dashed line says `mark_name`."""

    title: str
    groups: Sequence[str]
    series: Sequence[Series]
    unit: str
    form: str = "{:.1f}"
    mark: float | None = None
    mark_name: str = ""


class Curve(NamedTuple):
    """A line over steps."""

    name: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    style: str = "-"


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def bars(path: Path, title: str, note: str, rows: Sequence[Sequence[Panel]]) -> Path:
    """Panels in a grid; those in one row share their groups, those in the first row name their series."""
    heights = [max(len(p.groups) * (len(p.series) * BAR + 0.1) for p in row) for row in rows]
    figure = _figure(title, note, sum(heights) + 0.75 * len(rows) + 1.0)
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes_row, panels in zip(grid, rows, strict=True):
        for column, (axes, panel) in enumerate(zip(axes_row, panels, strict=True)):
            _draw(axes, panel, named=column == 0)
    names = {s.name: s.color for row in rows for panel in row for s in panel.series if isinstance(s.color, str)}
    if len(names) > 1:
        _legend(figure, [Patch(color=color, label=name) for name, color in names.items()])
    return save(figure, path)


def _figure(title: str, note: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, hspace=0.04))
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel("\n\n" + note, fontsize=8, color="#555555", x=0.01, ha="left")  # below the legend
    return figure


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    above_note = 0.2 / figure.get_figheight()
    legend = figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.0, above_note), ncols=6, frameon=False, fontsize=9
    )
    legend.set_in_layout(False)


def _draw(axes: Axes, panel: Panel, named: bool) -> None:
    count = len(panel.series)
    thick = 0.82 / count
    values = [bar.high or bar.value or 0.0 for series in panel.series for bar in series.bars]
    right = max([*values, panel.mark or 0.0]) or 1.0
    for index, series in enumerate(panel.series):
        for group, bar in enumerate(series.bars):
            y = group + (index - (count - 1) / 2) * thick
            color = series.color if isinstance(series.color, str) else series.color[group]
            _bar(axes, bar, y, thick, color, right, panel.form)
    axes.set_xlim(0, right * 1.24)
    axes.set_ylim(len(panel.groups) - 0.45, -0.55)
    axes.set_yticks(range(len(panel.groups)), panel.groups if named else [""] * len(panel.groups), fontsize=9)
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel(panel.unit, fontsize=9)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if panel.mark is not None:
        axes.axvline(panel.mark, color="#333333", linewidth=1, linestyle=(0, (4, 3)), zorder=3)
        axes.annotate(
            panel.mark_name, (panel.mark, 1), xycoords=("data", "axes fraction"), xytext=(3, 1),
            textcoords="offset points", fontsize=8, color="#333333", va="bottom",
        )  # fmt: skip


def _bar(axes: Axes, bar: Bar, y: float, thick: float, color: str, right: float, form: str) -> None:
    if bar.value is None:
        if bar.word:
            axes.text(right * 0.01, y, bar.word, va="center", fontsize=8, color="#777777", style="italic")
        return
    axes.barh(y, bar.value, thick * 0.9, color=color)
    end = bar.value
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [y, y], color="black", linewidth=1.2, solid_capstyle="butt")
        end = max(end, bar.high)
    axes.text(end + right * 0.018, y, form.format(bar.value), va="center", fontsize=8, color="#222222", zorder=4)


def curves(path: Path, title: str, note: str, panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> Path:
    """(title, name of the y axis, curves) beside each other, all over training steps."""
    figure = _figure(title, note, 4.2)
    for axes, (name, unit, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in lines:
            axes.plot(line.steps, line.values, color=line.color, linewidth=1.6, linestyle=line.style, label=line.name)
        axes.set_title(name, fontsize=10.5, loc="left")
        axes.set_xlabel("training step", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.tick_params(labelsize=8.5)
        axes.grid(True, color="#e5e5e5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, figure.axes[0].get_legend_handles_labels()[0])
    return save(figure, path)
