"""Training steps and inference of whole models: images a second, memory, and how long the GPU waits for the host.

Each contender runs the same model from the same weights on the same random images: the authors' formulation, ours with
each backend, either under torch.compile, ours as one CUDA graph, and for context two models of timm. A training step
is forward, loss, backward and fused AdamW, under autocast. A contender whose loss and gradients (in inference: logits)
differ from the reference's by more than the dtype explains gets no speed. Every case runs in a process of its own; what
fails is recorded, and the rest goes on. The order is by importance: 224 before 384, eager code before what takes long
to compile. What a row of the result file holds is said in bench/training/case.py.

Exit codes: 0 all that was tried ran and was right, 1 a contender failed, 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.baselines import official
from bench.harness import console, record
from bench.harness.categories import CATEGORIES
from bench.harness.child import Child
from bench.report import tables
from bench.training.contenders import CONTENDERS, CONTEXT_MODELS, Case, why_not
from stvit.model import CONFIGS

EXAMPLES = """examples:
  python -m bench.training --quick                      stvit_small at 224, under eight minutes on an H100
  python -m bench.training --minutes 30                 S, B and L at 224 and 384, as far as half an hour goes
  python -m bench.training --official ../STViT --models stvit_base --contenders authors ours-triton ours-graph
  python -m bench.training --train --contenders authors ours-triton --profile --out profile.json
  python -m bench.training --device cpu --quick         a trial of the tool; a CPU's numbers enter no table"""

CASE_LIMIT = 1200.0  # seconds: a case that takes longer hangs
CASE_LEAST = 15.0  # seconds: with less left, no further case is begun
QUICK_MINUTES = 7.5
SLOW_TO_COMPILE = 3  # tier
# The compilation of the others takes minutes there.
ON_CPU = ("authors", "authors-channels-last", "ours-reference", "ours-optimized")
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = console.parser("training", __doc__, EXAMPLES)
    add = p.add_argument
    add("--models", nargs="+", metavar="NAME", choices=list(CONFIGS), help="by default stvit_small, _base, _large")
    add("--sizes", nargs="+", type=console.positive, metavar="PIXELS", help="of images, by default 224 and 384")
    add("--batch", type=console.positive, metavar="N", help="by default 128; halved where memory doesn't suffice")
    names = ", ".join(CONTENDERS)
    add("--contenders", nargs="+", metavar="NAME", choices=list(CONTENDERS), help=f"all that can run, of {names}")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--train", action="store_true", help="training steps only")
    only.add_argument("--inference", action="store_true", help="inference only")
    about = "of autocast, by default bfloat16, on the CPU float32, which is none; in float16 the loss is not scaled"
    add("--dtype", choices=("bfloat16", "float16", "float32"), help=about)
    add("--official", type=Path, metavar="DIR", help="a checkout of the authors' repository, to time as 'authors'")
    add("--quick", action="store_true", help="stvit_small at 224 without what takes longest to compile")
    add("--minutes", type=console.above_zero, metavar="M", help=f"budget, with --quick by default {QUICK_MINUTES}")
    add("--seconds", type=console.above_zero, metavar="S", help="of timing for each case and mode; 3, with --quick 2")
    add("--profile", action="store_true", help="break the time down by kernel and category, too")
    console.add_device(p)
    add("--out", type=Path, metavar="FILE", help="by default bench/results/<gpu>/training.json; on the CPU none")
    return p


def plan(options: argparse.Namespace, device: torch.device) -> tuple[list[Case], list[Row]]:
    """The cases, most important first, and what can't take part, with the reasons."""
    on_gpu = device.type == "cuda"
    models = options.models or (["stvit_tiny"] if not on_gpu else ["stvit_small", "stvit_base", "stvit_large"])
    sizes = options.sizes or ([64] if not on_gpu else [224, 384])
    if options.quick:
        models, sizes = options.models or models[:1], options.sizes or sizes[:1]
    wanted = options.contenders or [
        name
        for name, contender in CONTENDERS.items()
        if (on_gpu or name in ON_CPU) and not (options.quick and contender.tier >= SLOW_TO_COMPILE)
    ]
    modes = ("train",) if options.train else ("inference",) if options.inference else ("train", "inference")
    like = Case(
        models[0], sizes[0], wanted[0], modes,
        batch=options.batch or (128 if on_gpu else 2),
        dtype=options.dtype or ("bfloat16" if on_gpu else "float32"),
        device=device.type,
        official=str(options.official.resolve()) if options.official else None,
        seconds=options.seconds or (2.0 if options.quick and on_gpu else 3.0 if on_gpu else 0.5),
        profile=options.profile,
    )  # fmt: skip
    cases, left_out = [], []
    for name in (name for name in CONTENDERS if name in wanted):
        reasons = why_not(name, device)
        if reasons and options.contenders:
            console.usage_error(f"--contenders: {name} can't run here: {'; '.join(reasons)}")
        takes = tuple(mode for mode in modes if mode == "inference" or not CONTENDERS[name].optimized)
        if not takes:
            if options.contenders:
                console.usage_error(f"--contenders: {name} takes no part in training")
            continue
        if reasons:
            left_out.append({"contender": name, "why": "; ".join(reasons)})
            continue
        for model in CONTEXT_MODELS if CONTENDERS[name].family == "timm" else models:
            for size in sizes:
                cases.append(dataclasses.replace(like, model=model, size=size, contender=name, modes=takes))
    order = [*models, *CONTEXT_MODELS]
    # Stable: contenders stay in their order.
    cases.sort(key=lambda c: (sizes.index(c.size), CONTENDERS[c.contender].tier, order.index(c.model)))
    return cases, left_out


def run_case(case: Case, limit: float, shared: Path) -> tuple[list[Row], str]:
    """The rows of a case, measured in a process of its own, and why modes are missing ("" if none is).

    A mode that broke the process, or overran CASE_LIMIT, gets a row with an error.
    """
    case = dataclasses.replace(case, shared=str(shared))
    given, rows_file = json.dumps(dataclasses.asdict(case)), shared / "rows.json"
    rows_file.unlink(missing_ok=True)
    child = Child([sys.executable, "-m", "bench.training.case", given, str(rows_file)], shared / "output.txt")
    in_time = child.ends_in(min(limit, CASE_LIMIT))
    child.kill()  # the compiler's worker processes have to end with it
    rows = json.loads(rows_file.read_text()) if rows_file.exists() else []
    missing = case.modes[len(rows) :]
    if not missing:
        return rows, ""
    if not in_time and limit < CASE_LIMIT:
        return rows, "out of time"
    ending = f"ended with code {child.code}: {child.last_line()}"
    row = {key: getattr(case, key) for key in ("model", "size", "contender", "dtype")}
    error = ending[:500] if in_time else f"stopped after {CASE_LIMIT:.0f} s"
    return [*rows, {**row, "mode": missing[0], "batch_asked": case.batch, "error": error}], ""


def run_all(
    cases: Sequence[Case], left_out: list[Row], deadline: float, save: Callable[[list[Row]], None]
) -> list[Row]:
    """Runs the cases in their order until the deadline; `save` gets the rows after each."""
    rows: list[Row] = []
    step = console.progress(len(cases))
    with tempfile.TemporaryDirectory(prefix="stvit-bench-") as shared:
        for case in cases:
            about = {"model": case.model, "size": case.size, "contender": case.contender}
            left = deadline - time.monotonic()
            if left < CASE_LEAST:
                step(f"{case.model} {case.size} {case.contender}: left out, no time")
                left_out.append({**about, "why": "out of time"})
                continue
            step(f"{case.model} {case.size} {case.contender}")
            found, missing = run_case(case, left, Path(shared))
            if missing:
                left_out += [{**about, "mode": mode, "why": missing} for mode in case.modes[len(found) :]]
            rows += found
            save(rows)
            for row in found:
                console.say(f"    {describe(row)}")
    return rows


def describe(row: Row) -> str:
    if "error" in row:
        return f"{row['mode']}: failed: {row['error']}"
    batch = "" if row["batch"] == row["batch_asked"] else f" at batch {row['batch']}, the largest that fits"
    speed = f"{row['images_per_s']:,.0f} images/s ({row['images_per_s_p20']:,.0f} to {row['images_per_s_p80']:,.0f})"
    peak = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.2f} GB {row['peak_of']}"
    gap = "" if row.get("host_gap_ms") is None else f", host gap {row['host_gap_ms']:.2f} ms"
    return f"{row['mode']}: {speed}{batch}{peak}{gap}"


def show(rows: Sequence[Row], left_out: Sequence[Row], device: torch.device) -> None:
    """The README's table, both modes; what failed and what was left out."""
    note = "" if device.type == "cuda" else " (CPU: a trial of the tool, no result)"
    found = tables.training_groups([tables.Result(Path(), "training", {}, list(rows), {})])  # in no file yet
    for mode, title in tables.MODES.items():
        groups = [group for group in found if group.key[2] == mode]
        if groups:
            console.table(f"\n{title}, {groups[0].any['dtype']}{note}", *tables.training_lines(groups))
    for entry in left_out:
        what = " ".join(str(entry[key]) for key in ("model", "size", "contender", "mode") if key in entry)
        console.say(f"left out: {what}: {entry['why']}")


def show_profiles(rows: Sequence[Row]) -> None:
    """Milliseconds a step by category, contenders side by side."""
    rows = [row for row in rows if "profile" in row]
    for key in dict.fromkeys((row["model"], row["size"], row["mode"]) for row in rows):
        group = [row for row in rows if (row["model"], row["size"], row["mode"]) == key]
        sums = {name: [row["profile"]["categories"].get(name, 0.0) for row in group] for name in CATEGORIES}
        sums["kernels"] = [row["profile"]["busy_ms"] for row in group]
        sums["step"] = [row["median"] for row in group]
        lines = [(name, *(f"{ms:.2f}" for ms in of_name)) for name, of_name in sums.items() if any(of_name)]
        title = f"\n{key[0]} {key[2]} at {key[1]}: milliseconds a step"
        console.table(title, ("category", *(f"{row['contender']}@{row['batch']}" for row in group)), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = console.device(options.device)
    if options.official:
        try:
            official.load(options.official)
        except official.OfficialError as error:
            console.usage_error(str(error))
    cases, left_out = plan(options, device)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else None)
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    out = options.out or (record.folder(device) / "training.json" if device.type == "cuda" else None)
    authors = "official checkout" if options.official else "bench/baselines/model.py"

    def save(rows: list[Row]) -> None:
        if out:
            record.write(out, "training", device, rows, authors=authors, left_out=left_out)

    rows = run_all(cases, left_out, deadline, save)
    save(rows)
    show(rows, left_out, device)
    show_profiles(rows)
    if out:
        console.say(f"written: {out}")
    return 0 if rows and not any("error" in row for row in rows) else 1
