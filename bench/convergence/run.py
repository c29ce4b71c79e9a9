"""Does it still train the same? Loss curves of the training program (python -m stvit.train) by several backends.

The baseline, our PyTorch reference, trains twice: with seed 0 and with seed 1, which means other weights, other batches
and other draws of stochastic depth. Each contender trains with seed 0: from equal weights on equal batches.

The distance of two runs is the mean over the steps of the absolute difference of their losses, each smoothed by a
moving average over a twentieth of the steps; the largest difference is told beside it. A contender passes when its
distance from the baseline with the same seed is no larger than the distance between the baseline's two seeds.

With --minutes each run ends after its share, and curves are compared as far as both go. Seconds are those of training
steps, compilation included, tests not; those to the same accuracy end where a run reached what every run reached.

Exit codes: 0 every contender passed, 1 one did not or failed, 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import console, record
from bench.harness.child import Child
from bench.harness.gate import finite
from bench.report import tables
from stvit.backends import dispatch
from stvit.train.build import build_precision
from stvit.train.cli import parse_args
from stvit.train.errors import Preempted, UserError
from stvit.train.log import JsonLines

EXAMPLES = """contenders: reference, triton or cuda, each also compiled: reference+compile, triton+compile, ...
All other flags are the training program's: python main.py --help.

examples:
  python -m bench.convergence --data photographs --minutes 9      photographs/{train,val or test}/CLASS/*.jpg
  python -m bench.convergence --data photographs --contenders triton triton+compile --epochs 20 --lr 1e-3
  python -m bench.convergence --device cpu --quick                 scikit-learn's digits, to try the tool"""

BASELINE, OTHER_SEED = "reference", 1
WITH_DATA = ["--data-set", "FOLDER", "--epochs", "5", "--warmup-epochs", "1", "--no-model-ema"]
QUICK = ["--input-size", "32", "--batch-size", "32", "--max-steps", "20"]
# Same draws of stochastic depth as uncompiled: otherwise the compiler has random numbers of its own.
PROGRAM = "import sys, torch; from stvit.train.cli import main; {}; sys.exit(main())"
SAME_DRAWS = "torch._inductor.config.fallback_random = True"
Row = dict[str, Any]


@dataclass
class Run:
    """One training run. losses: of its steps; points: (step, seconds, test accuracy) after each epoch."""

    contender: str
    seed: int
    losses: list[float] = field(default_factory=list)
    points: list[tuple[int, float, float]] = field(default_factory=list)
    error: str | None = None


def smoothed(losses: Sequence[float]) -> Tensor:
    """Moving average over a twentieth of the steps; only where the whole window is there."""
    window = max(1, len(losses) // 20)
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)


def distance(a: Run, b: Run) -> dict[str, float]:
    """Mean and largest absolute difference of two loss curves, smoothed, as far as both go; NaN where a loss was."""
    steps = min(len(a.losses), len(b.losses))
    apart = (smoothed(a.losses[:steps]) - smoothed(b.losses[:steps])).abs()
    return {"mean": float(apart.mean()), "largest": float(apart.max())}


def target_accuracy(runs: Iterable[Run]) -> float | None:
    """The accuracy that every run reached; None where one ended before its first test."""
    best = [max((accuracy for _, _, accuracy in run.points), default=None) for run in runs]
    return None if not best or None in best else min(accuracy for accuracy in best if accuracy is not None)


def as_row(run: Run, about: Row, target: float | None) -> Row:
    """What one run says by itself. Curves are lists of [step, value]."""
    row: Row = {"contender": run.contender, "seed": run.seed, **about, "steps": len(run.losses)}
    row["curves"] = {
        "loss": [[step + 1, finite(loss)] for step, loss in enumerate(run.losses)],
        "accuracy": [[step, accuracy] for step, _, accuracy in run.points],
        "seconds": [[step, seconds] for step, seconds, _ in run.points],
    }
    if run.error is not None:
        return {**row, "error": run.error}
    curve = smoothed(run.losses).tolist()
    first = len(run.losses) - len(curve) + 1  # a window's last step
    row["curves"]["smoothed"] = [[first + i, finite(loss)] for i, loss in enumerate(curve)]
    _, seconds, accuracy = run.points[-1] if run.points else (0, None, None)
    row.update(final_loss=finite(curve[-1]), final_accuracy=accuracy, seconds=seconds, seconds_to_target=None)
    if target is not None:
        row["seconds_to_target"] = next(s for _, s, reached in run.points if reached >= target)
    return row


def as_rows(runs: Sequence[Run], about: Row) -> tuple[list[Row], Row]:
    """Rows of the result file, and what holds for all: yardstick, target, verdict."""
    whole = [run for run in runs if run.error is None]
    of_baseline = {run.seed: run for run in runs[:2] if run.error is None}
    first, second = of_baseline.get(0), of_baseline.get(OTHER_SEED)
    yardstick = distance(first, second) if first and second else None
    target = target_accuracy(whole)
    rows = []
    for place, run in enumerate(runs):
        row = as_row(run, about, target)
        if first and run is not first and run.error is None:
            found = distance(first, run)
            row["distance"] = {name: finite(value) for name, value in found.items()}
            if place > 1:
                row["passed"] = bool(yardstick and found["mean"] <= yardstick["mean"])  # NaN is not <= anything
        rows.append(row)
    passed = len(rows) > 2 and all(row.get("passed", False) for row in rows[2:])
    return rows, {"yardstick": yardstick, "target_accuracy": target, "passed": passed}


def train(run: Run, flags: Sequence[str], batch: int, seconds: float) -> None:
    """Trains in a process of its own, at most for so long, and reads what it left; a failure is the run's error."""
    backend, _, compiled = run.contender.partition("+")
    with tempfile.TemporaryDirectory(prefix="stvit-bench-") as folder:
        command = [sys.executable, "-c", PROGRAM.format(SAME_DRAWS if compiled else "pass"), *flags]
        command += ["--seed", str(run.seed), "--backend", backend, "--output_dir", folder]
        command += ["--compile"] if compiled else []
        child = Child(command, Path(folder) / "output")
        if not child.ends_in(seconds):
            child.signal(signal.SIGTERM)  # the program saves what it has
            child.ends_in(math.inf)
        child.kill()
        read(run, Path(folder), batch)
        if child.code not in (0, Preempted.exit_code) or not run.losses:
            run.error = child.last_line() or "it ended before its first step"


def read(run: Run, folder: Path, batch: int) -> None:
    """The curves that the training program left in its folder."""
    steps, epochs = (JsonLines(folder / name, lambda row: True).rows for name in ("steps.jsonl", "log.txt"))
    run.losses = [row["loss"] for row in steps]
    done, seconds = 0, 0.0
    for row in epochs:
        seconds += (row["steps"] - done) * batch / row["images_per_s"]
        done = row["steps"]
        run.points.append((done, seconds, row["test_acc1"] / 100))


def run_all(options: argparse.Namespace, flags: Sequence[str], about: Row, data: str) -> tuple[list[Row], Row]:
    """The baseline with both seeds, then the contenders; the result file is written after each."""
    wanted = [(BASELINE, 0), (BASELINE, OTHER_SEED), *((name, 0) for name in options.contenders)]
    deadline = time.monotonic() + 60 * options.minutes
    runs: list[Run] = []
    step = console.progress(len(wanted))
    for left, (name, seed) in zip(range(len(wanted), 0, -1), wanted, strict=True):
        step(f"{name}, seed {seed}")
        run = Run(name, seed)
        runs.append(run)
        train(run, flags, about["batch"], max(0.0, deadline - time.monotonic()) / left)
        rows, found = as_rows(runs, about)
        if options.out:
            record.write(options.out, "convergence", torch.device(options.device), rows, data=data, **found)
        if run.error:
            console.say(f"    failed: {run.error}")
            if len(runs) == 1:
                break
    return rows, found


def parser() -> argparse.ArgumentParser:
    p = console.parser("convergence", __doc__, EXAMPLES)
    p.usage = f"{p.prog} [options] [flags of the training program]"
    add = p.add_argument
    add("--data", type=Path, metavar="DIR", help="DIR/{train,val or test}/CLASS/*.jpg; by default digits")
    add("--contenders", nargs="+", metavar="NAME", help="by default those of triton and cuda that can run; on the CPU "
        "the reference once more, which must repeat itself")  # fmt: skip
    add("--minutes", type=console.above_zero, default=math.inf, metavar="M", help="budget, shared out among the runs")
    add("--quick", action="store_true", help=f"short for {' '.join(QUICK)}")
    console.add_device(p)
    add("--out", type=Path, metavar="FILE", help="by default bench/results/<gpu>/convergence.json; on the CPU none")
    return p


def why_not(name: str, device: torch.device) -> list[str]:
    """The reasons why a contender can't run on this device. Builds the extension if that is asked for."""
    backend, _, suffix = name.partition("+")
    if backend not in dispatch.BACKENDS or suffix not in ("", "compile"):
        return [f"expected one of {', '.join(dispatch.BACKENDS)}, with or without +compile"]
    return dispatch.prepare(backend, device)


def settle(options: argparse.Namespace) -> None:
    """Fills in what depends on the device; a wrong value ends the program."""
    device = console.device(options.device)
    options.device = device.type
    if device.type == "cuda":
        options.out = options.out or record.folder(device) / "convergence.json"
        options.contenders = options.contenders or [name for name in ("triton", "cuda") if not why_not(name, device)]
    options.contenders = options.contenders or [BASELINE]
    for name in options.contenders:
        if reasons := why_not(name, device):
            console.usage_error(f"--contenders: {name} can't take part: {'; '.join(reasons)}")


def main(arguments: Sequence[str] | None = None) -> int:
    options, given = parser().parse_known_args(arguments)
    settle(options)
    of_data = [*WITH_DATA, "--data-path", str(options.data.resolve())] if options.data else ["--data-set", "DIGITS"]
    flags = [*of_data, "--device", options.device, *(QUICK if options.quick else []), *given]
    try:
        args = parse_args(flags)
        dtype = build_precision(args, torch.device(options.device)).dtype or torch.float32
    except UserError as error:
        console.usage_error(str(error))
    about = {"model": args.model, "size": args.input_size, "batch": args.batch_size * args.grad_accum_steps}
    about["dtype"] = str(dtype).removeprefix("torch.")
    data = f"the images in {options.data.name}" if options.data else "scikit-learn's handwritten digits"
    console.say(f"{args.model} at {args.input_size} in {about['dtype']}, {data}, {options.device}")
    rows, found = run_all(options, flags, about, data)
    note = "" if options.device == "cuda" else " (CPU: a trial of the tool, no result)"
    console.table(f"\nconvergence{note}", *tables.convergence_lines(rows, found["target_accuracy"]))
    if found["yardstick"]:
        console.say(f"the yardstick, between the baseline's seeds: {found['yardstick']['mean']:.5f}")
    if options.out:
        console.say(f"written: {options.out}")
    return 0 if found["passed"] else 1
