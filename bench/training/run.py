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
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.baselines import official
from bench.harness import console, record
from bench.harness.categories import CATEGORIES
from bench.training.contenders import CONTENDERS, CONTEXT_MODELS, Case, modes_of, why_not
from stvit.model import CONFIGS

EXAMPLES = """examples:
  python -m bench.training --quick                      stvit_small at 224, under eight minutes on an H100
  python -m bench.training --minutes 30                 S, B and L at 224 and 384, as far as half an hour goes
  python -m bench.training --official ../STViT --models stvit_base --contenders authors ours-triton ours-graph
  python -m bench.training --train --contenders authors ours-triton --profile profile.json
  python -m bench.training --device cpu --quick         a trial of the tool; a CPU's numbers enter no table"""

ROOT = Path(__file__).resolve().parents[2]
CASE_LIMIT = 1200.0  # seconds: a case that takes longer hangs
CASE_LEAST = 15.0  # seconds: with less left, no further case is begun
QUICK_MINUTES = 7.5
SLOW_TO_COMPILE = 3  # tier
# The compilation of the others takes minutes there.
ON_CPU = ("authors", "authors-channels-last", "ours-reference", "ours-optimized")
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:<30}{contender.about}" for name, contender in CONTENDERS.items())
    p = console.parser("training", __doc__, f"contenders:\n{names}\n\n{EXAMPLES}")
    add = p.add_argument
    add("--models", nargs="+", metavar="NAME", choices=list(CONFIGS), help="by default stvit_small, _base, _large")
    add("--sizes", nargs="+", type=console.positive, metavar="PIXELS", help="of images, by default 224 and 384")
    add("--batch", type=console.positive, metavar="N", help="by default 128; halved where memory doesn't suffice")
    add("--contenders", nargs="+", metavar="NAME", choices=list(CONTENDERS), help="by default all that can run")
    only = p.add_mutually_exclusive_group()
    only.add_argument("--train", action="store_true", help="training steps only")
    only.add_argument("--inference", action="store_true", help="inference only")
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of autocast, by default bfloat16, on the CPU float32, which is none; in float16 the loss is not scaled",
    )
    add(
        "--drop-path",
        type=console.rate,
        default=0.0,
        metavar="RATE",
        help="stochastic depth in training (default 0); the gate looks at a twin without, which is compiled as well",
    )
    add("--official", type=Path, metavar="DIR", help="a checkout of the authors' repository, to time as 'authors'")
    add("--quick", action="store_true", help="stvit_small at 224 without what takes longest to compile")
    add(
        "--minutes", type=console.above_zero, metavar="M", help=f"budget, by default none, with --quick {QUICK_MINUTES}"
    )
    add("--seconds", type=console.above_zero, metavar="S", help="of timing for each case and mode; 3, with --quick 2")
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help="also break the time of each case down by category of kernel and part of the network, into FILE",
    )
    add("--compile-backend", default="inductor", metavar="NAME", help="of torch.compile (default inductor)")
    add("--device", choices=("cuda", "cpu"), help="by default cuda where there is one")
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
        drop_path=options.drop_path,
        compile_backend=options.compile_backend,
        seconds=options.seconds or (2.0 if options.quick and on_gpu else 3.0 if on_gpu else 0.5),
        profile=options.profile is not None,
    )  # fmt: skip
    cases, left_out = [], []
    for name in wanted:
        reasons = why_not(name, device)
        if reasons and options.contenders:
            console.usage_error(f"--contenders: {name} can't run here: {'; '.join(reasons)}")
        takes = modes_of(CONTENDERS[name], modes)
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
    ranks = {model: rank for rank, model in enumerate((*models, *CONTEXT_MODELS))}
    order = list(CONTENDERS)
    cases.sort(
        key=lambda c: (sizes.index(c.size), CONTENDERS[c.contender].tier, ranks[c.model], order.index(c.contender))
    )
    return cases, left_out


def run_case(case: Case, limit: float, shared: Path) -> tuple[list[Row], str]:
    """The rows of a case, measured in a process of its own, and why modes are missing ("" if none is).

    A mode that broke the process, or overran CASE_LIMIT, gets a row with an error.
    """
    case = dataclasses.replace(case, shared=str(shared))
    case_file, rows_file = shared / "case.json", shared / "rows.json"
    case_file.write_text(json.dumps(dataclasses.asdict(case)))
    rows_file.unlink(missing_ok=True)
    with (shared / "output.txt").open("w+") as output:
        command = [sys.executable, "-m", "bench.training.case", str(case_file), str(rows_file)]
        # A session of its own: the compiler's worker processes have to end with it.
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        overran = False
        try:
            child.wait(min(limit, CASE_LIMIT))
        except subprocess.TimeoutExpired:
            overran = True
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        output.seek(0)
        said = output.read().strip().splitlines()
    rows = json.loads(rows_file.read_text()) if rows_file.exists() else []
    missing = case.modes[len(rows) :]
    if not missing:
        return rows, ""
    if overran and limit < CASE_LIMIT:
        return rows, "out of time"
    ending = f"ended with code {child.returncode}: {said[-1] if said else ''}"
    row = {key: getattr(case, key) for key in ("model", "size", "contender", "dtype")}
    row.update(mode=missing[0], batch_asked=case.batch)
    row["error"] = f"stopped after {CASE_LIMIT:.0f} s" if overran else ending[:500]
    return [*rows, row], ""


def run_all(cases: Sequence[Case], left_out: list[Row], deadline: float, results: Results) -> None:
    """Runs the cases in their order until the deadline; results are written after each."""
    with tempfile.TemporaryDirectory(prefix="stvit-bench-") as shared, console.progress(len(cases)) as step:
        for case in cases:
            about = {"model": case.model, "size": case.size, "contender": case.contender}
            left = deadline - time.monotonic()
            if left < CASE_LEAST:
                step(f"{case.model} {case.size} {case.contender}: left out, no time")
                left_out.append({**about, "why": "out of time"})
                continue
            step(f"{case.model} {case.size} {case.contender}")
            rows, missing = run_case(case, left, Path(shared))
            if missing:
                left_out += [{**about, "mode": mode, "why": missing} for mode in case.modes[len(rows) :]]
            results.add(rows)
            for row in rows:
                console.say(f"    {describe(row)}")


class Results:
    """Rows so far, and the files that hold them."""

    def __init__(self, device: torch.device, out: Path | None, profile: Path | None, **about: Any) -> None:
        self.device, self.out, self.profile, self.about = device, out, profile, about
        self.rows: list[Row] = []
        self.profiles: list[Row] = []

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            found = row.pop("profile", None)
            if found:
                kept = ("model", "size", "contender", "mode", "batch", "dtype", "median")
                self.profiles.append({**{key: row[key] for key in kept}, **found})
        self.rows += rows
        self.write()

    def write(self) -> None:
        if self.out:
            record.write(self.out, "training", self.device, self.rows, **self.about)
        if self.profile:
            record.write(self.profile, "training", self.device, self.profiles, kind="profile")


def describe(row: Row) -> str:
    if "error" in row:
        return f"{row['mode']}: failed: {row['error']}"
    batch = "" if row["batch"] == row["batch_asked"] else f" at batch {row['batch']}, the largest that fits"
    return (
        f"{row['mode']}: {row['images_per_s']:,.0f} images/s "
        f"({row['images_per_s_p20']:,.0f} to {row['images_per_s_p80']:,.0f}){batch}"
    )


def show(results: Results, left_out: Sequence[Row]) -> None:
    """A table for every model, size and mode, each beside the authors' eager formulation."""
    rows = [row for row in results.rows if "error" not in row]
    groups = dict.fromkeys((row["size"], row["mode"], row["model"]) for row in rows)
    for size, mode, model in groups:
        group = [row for row in rows if (row["size"], row["mode"], row["model"]) == (size, mode, model)]
        baseline = next((row for row in group if row["contender"] == "authors"), None)
        note = "" if results.device.type == "cuda" else " (CPU: a trial of the tool, no result)"
        console.table(
            f"\n{model} {mode} at {size}, {group[0]['dtype']}{note}",
            ("contender", "batch", "images/s", "p20", "p80", "x authors", "peak GB", "x authors", "host gap"),
            [_cells(row, baseline) for row in group],
        )
    for entry in left_out:
        what = " ".join(str(entry[key]) for key in ("model", "size", "contender", "mode") if key in entry)
        console.say(f"left out: {what}: {entry['why']}")
    for row in results.rows:
        if "error" in row:
            console.say(f"failed: {row['model']} {row['size']} {row['contender']} {row['mode']}: {row['error']}")


def _cells(row: Row, baseline: Row | None) -> tuple[str, ...]:
    speed = f"{row['images_per_s'] / baseline['images_per_s']:.2f}" if baseline else ""
    peak = row.get("peak_bytes")
    share = ""
    if baseline and peak and baseline["peak_bytes"] and baseline["batch"] == row["batch"]:
        share = f"{peak / baseline['peak_bytes']:.2f}"
    gap = row.get("host_gap_ms")
    return (
        row["contender"], str(row["batch"]), f"{row['images_per_s']:,.0f}", f"{row['images_per_s_p20']:,.0f}",
        f"{row['images_per_s_p80']:,.0f}", speed, f"{peak / 1e9:.2f}" if peak else "", share,
        f"{gap:.2f} ms" if gap is not None else "",
    )  # fmt: skip


def show_profiles(profiles: Sequence[Row]) -> None:
    """Milliseconds a step by category, contenders side by side."""
    for key in dict.fromkeys((row["model"], row["size"], row["mode"]) for row in profiles):
        group = [row for row in profiles if (row["model"], row["size"], row["mode"]) == key]
        lines = [
            (name, *(f"{row['categories'].get(name, 0.0):.2f}" for row in group))
            for name in CATEGORIES
            if any(name in row["categories"] for row in group)
        ]
        lines.append(("kernels", *(f"{row['busy_ms']:.2f}" for row in group)))
        lines.append(("step", *(f"{row['median']:.2f}" for row in group)))
        title = f"\n{key[0]} {key[2]} at {key[1]}: milliseconds a step"
        console.table(title, ("category", *(f"{row['contender']}@{row['batch']}" for row in group)), lines)


def check(options: argparse.Namespace, device: torch.device) -> None:
    """Whatever would fail every case is a user's mistake, told before the first."""
    if device.type == "cuda" and not torch.cuda.is_available():
        console.usage_error("--device: no CUDA device found; --device cpu tries the tool on the CPU")
    if options.contenders is None or any(CONTENDERS[name].family == "timm" for name in options.contenders):
        if device.type == "cuda" and importlib.util.find_spec("timm") is None:
            console.usage_error("timm is not installed; name --contenders without timm-compile to do without it")
    if options.official:
        try:
            official.load(options.official)
        except official.OfficialError as error:
            console.usage_error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check(options, device)
    cases, left_out = plan(options, device)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else None)
    deadline = time.monotonic() + minutes * 60 if minutes else float("inf")
    out = options.out or (record.folder(device) / "training.json" if device.type == "cuda" else None)
    authors = "official checkout" if options.official else "bench/baselines/model.py"
    results = Results(device, out, options.profile, authors=authors, drop_path=options.drop_path, left_out=left_out)
    run_all(cases, left_out, deadline, results)
    results.write()
    show(results, left_out)
    show_profiles(results.profiles)
    for path in filter(None, (out, options.profile)):
        console.say(f"written: {path}")
    return 0 if results.rows and not any("error" in row for row in results.rows) else 1
