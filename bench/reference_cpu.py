"""Time of the reference on the CPU beside the authors' formulation: sampling, upsampling and their backward.

    python -m bench.reference_cpu --threads 1 --out result.json

The shapes are stages 1 and 2 of stvit_small at 224 x 224, each in both memory formats. The two sides take turns, so
that whatever else the machine does falls on both; the ratio is the median over the pairs. Nothing is timed before both
gave the same result. Exits with 1 if the reference is the slower one anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import stvit
from bench import record
from bench.authors import AuthorsStokenAttention
from bench.timing import measure


class Shape(NamedTuple):
    """A stage's input: channels, side in pixels, side of a super token."""

    channels: int
    side: int
    stoken_size: int


STAGES = {"stage 1": Shape(64, 56, 8), "stage 2": Shape(128, 28, 4)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Step = Callable[[], tuple[Tensor, Tensor]]


def steps(shape: Shape, batch: int, memory_format: torch.memory_format) -> dict[str, Step]:
    """For each side a call that runs forward and backward on the same input and returns y and the gradient of x."""
    generator = torch.Generator().manual_seed(0)
    size = (batch, shape.channels, shape.side, shape.side)
    x, grad_y = (torch.randn(size, generator=generator).contiguous(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    tile = (shape.stoken_size, shape.stoken_size)
    baseline = AuthorsStokenAttention(tile)

    def reference(x: Tensor) -> Tensor:
        return stvit.token_upsampling(*stvit.super_token_sampling(x, tile, backend="reference"), backend="reference")

    def step(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        y = forward(x)
        return y.detach(), torch.autograd.grad(y, x, grad_y)[0]

    return {"reference": lambda: step(reference), "authors": lambda: step(baseline)}


def compare(sides: dict[str, Step], pairs: int) -> dict[str, Any]:
    """Milliseconds (median, p20, p80) of each side over `pairs` turns and the quantiles of reference / authors."""
    for ours, theirs in zip(sides["reference"](), sides["authors"](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    cpu = torch.device("cpu")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(pairs):
        for name in sorted(sides, reverse=bool(turn % 2)):
            times[name].append(measure([sides[name]], cpu, warmup=0, repeats=1).median)
    values = {name: torch.tensor(milliseconds) for name, milliseconds in times.items()}
    values["ratio"] = values["reference"] / values["authors"]
    return {name: quantiles(value) for name, value in values.items()}


def quantiles(values: Tensor) -> dict[str, float]:
    return {name: round(values.quantile(q).item(), 4) for name, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for reading; the ratio is reference / authors, below 1 where the reference is faster."""
    title = "Forward and backward, median (p20-p80)"
    shown = Table("input", "format", "reference ms", "authors ms", "ratio", title=title)
    for row in rows:
        cells = (row["timings"][name] for name in ("reference", "authors", "ratio"))
        texts = (f"{cell['median']:.2f} ({cell['p20']:.2f}-{cell['p80']:.2f})" for cell in cells)
        shown.add_row(f"{row['stage']}: {row['shape']}, tile {row['stoken_size']}", row["format"], *texts)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reference_cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="images (default 4)")
    parser.add_argument("--pairs", type=int, default=30, help="timed turns of each side (default 30)")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch (default: as PyTorch chooses)")
    parser.add_argument("--out", type=Path, default=None, help="also write the result as JSON to this file")
    chosen = parser.parse_args(arguments)
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    rows: list[dict[str, Any]] = []
    for stage, shape in STAGES.items():
        for name, memory_format in FORMATS.items():
            timings = compare(steps(shape, chosen.batch, memory_format), chosen.pairs)
            size = [chosen.batch, shape.channels, shape.side, shape.side]
            rows.append({"stage": stage, "shape": size, "stoken_size": shape.stoken_size, "format": name,
                         "dtype": "float32", "timings": timings})  # fmt: skip
    Console().print(table(rows))
    if chosen.out:
        record.write(chosen.out, "reference_cpu", torch.device("cpu"), rows)
    return int(any(row["timings"]["ratio"]["median"] > 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
