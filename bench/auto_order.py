"""Which of our kernels backend="auto" takes first on which GPU: writes stvit/auto_order.json from the result files.

For each compute capability the geometric mean, over the shapes of stages 1 and 2, of Triton's median over the
extension's: super token sampling and upsampling (the op "core"), forward + backward, detached, bfloat16, at the largest
batch at which both were timed. The faster one comes first. A GPU is left out, and "auto" then takes Triton first, where
one of the two gave a wrong result or raised an error in any row of that op, and where they were not both timed at both
stages.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import console, tables
from bench.plot import ROOT, link
from bench.tables import Group, ResultError, Row

EXAMPLES = """\
examples:
  python -m bench.auto_order            write the table
  python -m bench.auto_order --check    change nothing; exit code 1 where it differs from what the files give
"""
TABLE = ROOT / "stvit" / "auto_order.json"
KERNELS = ("triton", "cuda")
KEYS = ("op", "shape", "batch", "dtype", "mode", "autocast", "pass")
SETTING = {"dtype": "bfloat16", "mode": "detached", "autocast": False, "pass": "forward+backward"}


def generate(results: Path, root: Path = ROOT) -> tuple[dict[str, Any], list[str]]:
    """The table, compute capability -> order and what it is from, and why GPUs are left out of it."""
    found, refused = tables.load(results)
    by_capability: dict[str, list[Group]] = {}
    for of_gpu in found.values():
        for group in tables.groups(of_gpu, "ops", KEYS):
            if group.any["op"] == "core":
                by_capability.setdefault(group.result.environment["capability"], []).append(group)
    table = {}
    for capability, groups in sorted(by_capability.items()):
        reasons = why_not(groups)
        if reasons:
            refused.append(f"compute capability {capability}: {'; '.join(reasons)}")
        else:
            table[capability] = entry(compared(groups), root)
    return table, refused


def why_not(groups: Sequence[Group]) -> list[str]:
    """The reasons why the groups don't decide."""
    rows = [row for group in groups for name, row in group.rows.items() if name in KERNELS]
    red = [row for row in rows if row["status"] in ("failed gate", "error")]
    reasons = [f"{row['contender']}, {row['shape']}, batch {row['batch']}: {row['status']}" for row in red[:1]]
    stages = {group.any["stage"] for group in compared(groups)}
    return reasons + [f"not both were timed at stage {stage}" for stage in (1, 2) if stage not in stages]


def compared(groups: Iterable[Group]) -> list[Group]:
    """Of each GPU and shape of a stage the group with the largest batch at which both were timed."""
    best: dict[tuple[Path, str], Group] = {}
    for group in groups:
        row = group.any
        if row["stage"] is None or any(row[name] != value for name, value in SETTING.items()):
            continue
        if not all(tables.timed(group, name) for name in KERNELS):
            continue
        kept = best.setdefault((group.result.path.parent, row["shape"]), group)
        if row["batch"] > kept.any["batch"]:
            best[group.result.path.parent, row["shape"]] = group
    return list(best.values())


def entry(groups: Sequence[Group], root: Path) -> dict[str, Any]:
    """order: the faster first. cuda_speedup: how many times as fast the extension is as Triton."""
    logarithms = [math.log(median(group.rows["triton"]) / median(group.rows["cuda"])) for group in groups]
    speedup = math.exp(sum(logarithms) / len(logarithms))
    return {
        "order": ["cuda", "triton"] if speedup > 1 else ["triton", "cuda"],
        "cuda_speedup": round(speedup, 3),
        "gpus": sorted({group.result.environment["name"] for group in groups}),
        "cases": [f"{group.any['shape']}, batch {group.any['batch']}" for group in groups],
        "files": sorted({link(group.result.path, root) for group in groups}),
    }


def median(row: Row) -> float:
    return float(row["median_ms"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.auto_order", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--check", action="store_true", help="only compare the table with what the files give")
    add("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="<gpu>/*.json")
    add("--table", type=Path, default=TABLE, metavar="FILE", help="instead of stvit/auto_order.json")
    options = parser.parse_args(arguments)
    try:
        table, refused = generate(options.results)
    except ResultError as error:
        console.usage_error(str(error))
    for line in refused:
        console.say(f"left out: {line}")
    for capability, told in table.items():
        console.say(f"{capability}: {' before '.join(told['order'])}, cuda {told['cuda_speedup']}x as fast as triton")
    text = json.dumps(table, indent=1) + "\n"
    if not options.check:
        options.table.write_text(text)
        console.say(f"written: {options.table}")
    elif not options.table.exists() or options.table.read_text() != text:
        console.say(f"{options.table} differs from what the result files give; run python -m bench.auto_order")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
