"""Each kernel's time in a training step on a GPU beside the limits that bench.machine counts for it.

    python -m bench.predict.error training.json machine.json --out kernels.json

training.json is of `bench.training --profile`, of ours in eager mode; machine.json of `bench.machine --json` for the
same GPU, model, size and batch. Kernels go by name: a name's launches of a step are added up on either side. The ratio
is what the model misses; the limits are lower bounds, so below 1 one of the counts is wrong.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import console, record
from bench.predict import tables

CONTENDER = "ours-triton"
Row = dict[str, Any]


def compare(timings: Sequence[Row], costs: Sequence[Row]) -> list[Row]:
    """A row for each kernel of ours: microseconds and launches of a step, timed (None where it did not run) and
    predicted."""
    timed: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for row in timings:
        if row["contender"] == CONTENDER and row["mode"] == "train":
            for entry in row.get("profile", {"kernels": []})["kernels"]:
                timed[entry["name"]] += entry["ms"] * 1e3
                calls[entry["name"]] += entry["calls"]
    predicted: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for cost in costs:
        predicted[cost["kernel"]] += cost["launches"] * max(cost["limits"].values()) * 1e6
        launches[cost["kernel"]] += cost["launches"]
    rows = []
    for name, us in predicted.most_common():
        names = [found for found in timed if re.fullmatch(rf"{name}(_\w+)?", found)]
        took = sum(timed[found] for found in names) if names else None
        rows.append({
            "kernel": name, "predicted_us": us, "predicted_launches": launches[name], "timed_us": took,
            "timed_launches": sum(calls[found] for found in names) if names else None,
            "ratio": took / us if took else None,
        })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("predict.error", __doc__)
    parser.add_argument("timings", type=Path, metavar="TIMINGS")
    parser.add_argument("costs", type=Path, metavar="COSTS")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows to FILE")
    args: argparse.Namespace = parser.parse_args(arguments)
    try:
        timings, costs = (json.loads(path.read_text()) for path in (args.timings, args.costs))
        rows = compare(timings["rows"], costs["rows"])
    except (OSError, ValueError, KeyError) as error:
        console.usage_error(f"no result files of bench.training --profile and bench.machine --json: {error!r}")
    console.table("kernels of a training step", *tables.error_lines(rows))
    if args.out:
        device = torch.device("cuda" if timings["environment"]["device"] == "cuda" else "cpu")
        record.write(
            args.out,
            "kernels",
            device,
            rows,
            gpu=costs["settings"].get("gpu"),
            environment_of_times=timings["environment"],
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
