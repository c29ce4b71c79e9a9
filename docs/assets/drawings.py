"""Draws neighbourhood.svg and padding.svg of docs/semantics.md; the weights in the first are the op's own.

python docs/assets/drawings.py [FOLDER]
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import stvit

matplotlib.rcParams |= {"svg.hashsalt": "stvit", "svg.fonttype": "none"}  # the same file each time
TILE = 4
BLUE, RED, GREY = "#2b6cb0", "#c53030", "#a0aec0"


def weights(column: int, row: int) -> list[float]:
    """What a pixel of the middle tile gives to the nine super tokens around it, of pixels that grow to the right."""
    x = torch.linspace(0, 2, 3 * TILE).expand(1, 1, 3 * TILE, 3 * TILE).contiguous()
    _, association = stvit.super_token_sampling(x, (TILE, TILE), backend="reference")
    return association.weights[0, :, row, column].tolist()


def canvas(width: int, height: int, inches: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.4, width + 0.4), ylim=(height + 0.4, -0.4), aspect="equal")
    axes.axis("off")
    return figure, axes


def pixels(axes: Axes, columns: int, rows: int) -> None:
    style = {"color": "#e2e8f0", "linewidth": 0.6}
    axes.hlines(range(rows + 1), 0, columns, **style)
    axes.vlines(range(columns + 1), 0, rows, **style)


def tile(axes: Axes, column: int, row: int, **style: object) -> None:
    axes.add_patch(Rectangle((column * TILE, row * TILE), TILE, TILE, **({"fill": False, "linewidth": 1.4} | style)))


def neighbourhood() -> Figure:
    """A pixel, and how much it gives to each of the nine super tokens of its 3 x 3 neighbourhood."""
    figure, axes = canvas(3 * TILE, 3 * TILE, (4.6, 4.6))
    pixels(axes, 3 * TILE, 3 * TILE)
    column, row = TILE + 2, TILE + 1
    for k, weight in enumerate(weights(column, row)):
        x, y = (k % 3 + 0.5) * TILE, (k // 3 + 0.5) * TILE
        tile(axes, k % 3, k // 3, edgecolor=BLUE)
        arrow = FancyArrowPatch(
            (column + 0.5, row + 0.5), (x, y), arrowstyle="-|>", mutation_scale=9, color=RED, linewidth=12 * weight
        )
        axes.add_patch(arrow)
        axes.plot(x, y, "o", color=BLUE, markersize=7)
        axes.text(k % 3 * TILE + 0.2, k // 3 * TILE + 0.75, f"k = {k}", color=BLUE, fontsize=9)
        axes.text(x, (k // 3 + 1) * TILE - 0.3, f"A = {weight:.3f}", ha="center", color=RED, fontsize=9)
    axes.add_patch(Rectangle((column, row), 1, 1, color=RED))
    axes.text(column + 0.5, row + 0.65, "p", color="white", ha="center", fontsize=9)
    return figure


def padding(width: int = 14, height: int = 10) -> Figure:
    """An image that the tiles don't divide, and neighbours that lie outside the grid."""
    columns, rows = -(-width // TILE), -(-height // TILE)
    figure, axes = canvas((columns + 1) * TILE, (rows + 1) * TILE, (6.2, 5.0))
    axes.set(xlim=(-TILE - 0.4, columns * TILE + 0.4), ylim=(rows * TILE + 0.4, -TILE - 0.4))
    pixels(axes, width, height)
    for row in range(rows):
        for column in range(columns):
            tile(axes, column, row, edgecolor=BLUE)
            axes.plot((column + 0.5) * TILE, (row + 0.5) * TILE, "o", color=BLUE, markersize=7)
    hatched = {"fill": False, "hatch": "////", "edgecolor": GREY, "linewidth": 0}
    axes.add_patch(Rectangle((width, 0), columns * TILE - width, rows * TILE, **hatched))
    axes.add_patch(Rectangle((0, height), width, rows * TILE - height, **hatched))
    for column, row in ((-1, -1), (0, -1), (1, -1), (-1, 0), (-1, 1)):
        tile(axes, column, row, edgecolor=GREY, linestyle="--", linewidth=0.9)
        axes.text((column + 0.5) * TILE, (row + 0.5) * TILE, "logit 0", ha="center", color="#718096", fontsize=9)
    axes.add_patch(Rectangle((1, 1), 1, 1, color=RED))
    axes.text(1.5, 1.65, "p", color="white", ha="center", fontsize=9)
    axes.text(
        columns * TILE, -0.3, f"{width} x {height} pixels; hatched: padding", ha="right", color="#718096", fontsize=9
    )
    return figure


def main(folder: Path) -> None:
    for name, figure in (("neighbourhood", neighbourhood()), ("padding", padding())):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
