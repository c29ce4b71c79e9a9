"""Does it still train the same? Loss curves of one model by several backends, from equal weights on equal batches.

The baseline, our PyTorch reference, trains twice: with seed 0 and with seed 1, which means other batches in another
order and other draws of stochastic depth, from the same weights. Each contender trains with seed 0.

The distance of two runs is the mean over the steps of the absolute difference of their losses, each smoothed by a
moving average over a twentieth of the steps; the largest difference is told beside it. A contender passes when its
distance from the baseline with the same seed is no larger than the distance between the baseline's two seeds.

Wall time is that of training steps, without compilation and without tests. The time to the same accuracy is when a run
first reached the best accuracy of the run that is worst by that measure.

Exit codes: 0 every contender passed, 1 one did not or failed, 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.convergence.data import Batches, Data, DataError, digits, image_folder
from bench.convergence.trainer import OutOfTime, Run, Trainer, build, why_not
from bench.harness import console, record
from bench.harness.gate import finite
from bench.report import tables
from stvit.model import CONFIGS

EXAMPLES = """contenders: reference, triton, cuda or authors, each also compiled: reference+compile, triton+compile, ...

examples:
  python -m bench.convergence --data photographs --minutes 9      photographs/{train,val or test}/CLASS/*.jpg
  python -m bench.convergence --data photographs --contenders triton triton+compile --steps 2000
  python -m bench.convergence --device cpu --quick                 scikit-learn's digits, to try the tool"""

BASELINE, OTHER_SEED = "reference", 1
LEAST_STEPS = 20
SHARE = 0.8  # of the time left that steps are planned for; the rest is for what steps don't cost
COMPILATION = 60.0  # seconds set aside for each compiled contender
Row = dict[str, Any]


class Distance(NamedTuple):
    """Between two smoothed loss curves: mean and largest absolute difference."""

    mean: float
    largest: float


def smoothed(losses: Sequence[float]) -> Tensor:
    """Moving average over a twentieth of the steps; only where the whole window is there."""
    window = max(1, len(losses) // 20)
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(1)


def distance(a: Run, b: Run) -> Distance:
    """Between the loss curves of two runs of equal length; NaN where a loss was."""
    apart = (smoothed(a.losses) - smoothed(b.losses)).abs()
    return Distance(float(apart.mean()), float(apart.max()))


def target_accuracy(runs: Sequence[Run]) -> float:
    """The accuracy that every run reached."""
    return min(max(accuracy for _, _, accuracy in run.points) for run in runs)


def as_row(run: Run, options: argparse.Namespace, target: float | None) -> Row:
    """What one run says by itself. Curves are lists of [step, value]."""
    row: Row = {"contender": run.contender, "seed": run.seed, "model": options.model, "size": options.size}
    row.update(batch=options.batch, dtype=options.dtype, steps=len(run.losses), setup_s=run.setup_s)
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
    row.update(final_loss=finite(curve[-1]), final_accuracy=run.points[-1][2], seconds=run.seconds)
    row["images_per_s"] = len(run.losses) * options.batch / run.seconds
    row["seconds_to_target"] = next(s for _, s, accuracy in run.points if accuracy >= (target or 0.0))
    return row


def as_rows(runs: Sequence[Run], options: argparse.Namespace) -> tuple[list[Row], Row]:
    """Rows of the result file, and what holds for all: yardstick, target, verdict."""
    whole = {(run.contender, run.seed): run for run in runs if run.error is None}
    first, second = whole.get((BASELINE, 0)), whole.get((BASELINE, OTHER_SEED))
    yardstick = distance(first, second) if first and second else None
    target = target_accuracy(list(whole.values())) if whole else None
    rows = []
    for run in runs:
        row = as_row(run, options, target)
        if first and run is not first and run.error is None:
            found = distance(first, run)
            row["distance"] = {"mean": finite(found.mean), "largest": finite(found.largest)}
            if run.contender != BASELINE:
                row["passed"] = bool(yardstick and found.mean <= yardstick.mean)  # NaN is not <= anything
        rows.append(row)
    contenders = [row for row in rows if row["contender"] != BASELINE]
    passed = bool(contenders) and all(row.get("passed", False) for row in contenders)
    about = {"yardstick": yardstick._asdict() if yardstick else None, "target_accuracy": target, "passed": passed}
    return rows, about


def run_one(run: Run, options: argparse.Namespace, data: Data, weights: dict[str, Tensor], deadline: float) -> None:
    """Trains one run; what it raises becomes its error. Works out `options.steps` if it is the first."""
    try:
        if time.monotonic() > deadline:
            raise OutOfTime("no time was left to begin")
        trainer = Trainer(run, options, data, weights)
        a_step = trainer.warm_up()
        if options.planned is None:
            options.planned = planned_steps(options, a_step, deadline - time.monotonic())
            console.say(f"{options.planned} steps of {options.batch} images, {a_step * 1e3:.0f} ms by the baseline")
        trainer.train(options.planned, deadline)
    except Exception as error:  # whatever a contender raises belongs into its row
        run.error = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def planned_steps(options: argparse.Namespace, a_step: float, seconds: float) -> int:
    """The steps asked for, or as many as all runs can do in the time left."""
    if math.isinf(seconds):
        return int(options.steps)
    compiled = sum(name.endswith("+compile") for name in options.contenders)
    runs = 2 + len(options.contenders)
    affordable = (SHARE * seconds - COMPILATION * compiled) / (runs * a_step)
    return max(LEAST_STEPS, min(int(options.steps), int(affordable)))


def run_all(options: argparse.Namespace, data: Data, device: torch.device, deadline: float) -> list[Run]:
    """The baseline with both seeds, then the contenders; the result file is written after each."""
    torch.manual_seed(0)
    weights = build(BASELINE, options, data.classes).state_dict()
    data = data._replace(train=data.train.to(device), test=data.test.to(device))
    runs: list[Run] = []
    wanted = [(BASELINE, 0), (BASELINE, OTHER_SEED), *((name, 0) for name in options.contenders)]
    with console.progress(len(wanted)) as step:
        for name, seed in wanted:
            step(f"{name}, seed {seed}")
            run = Run(name, seed)
            runs.append(run)
            run_one(run, options, data, weights, deadline)
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if options.out:
                rows, about = as_rows(runs, options)
                record.write(options.out, "convergence", device, rows, data=data.description, **about)
            if run.error:
                console.say(f"    failed: {run.error}")
                if (name, seed) == (BASELINE, 0):
                    break
    return runs


def show(rows: Sequence[Row], about: Row, device: torch.device) -> None:
    note = "" if device.type == "cuda" else " (CPU: a trial of the tool, no result)"
    console.table(f"\nconvergence{note}", *tables.convergence_lines(rows, about["target_accuracy"]))
    if about["yardstick"]:
        console.say(f"the yardstick, between the baseline's seeds: {about['yardstick']['mean']:.5f}")


def parser() -> argparse.ArgumentParser:
    p = console.parser("convergence", __doc__, EXAMPLES)
    add = p.add_argument
    add("--data", type=Path, metavar="DIR", help="DIR/{train,val or test}/CLASS/*.jpg; by default digits")
    add("--contenders", nargs="+", metavar="NAME", help="by default those of triton and cuda that can run")
    add("--model", choices=list(CONFIGS), help="by default stvit_small, on the CPU stvit_tiny")
    add(
        "--size",
        type=console.positive,
        metavar="PIXELS",
        help="of images, by default 224, on the CPU 64, with --quick 32",
    )
    add("--batch", type=console.positive, metavar="N", help="images a step, by default 64, on the CPU 16")
    add("--steps", type=console.positive, metavar="N", help="by default 1000, on the CPU 100, with --quick 20")
    add(
        "--minutes",
        type=console.above_zero,
        metavar="M",
        help="budget: fewer steps where time wouldn't do for all of them",
    )
    add("--images", type=console.positive, default=20000, metavar="N", help="most images to train on (default 20000)")
    add("--test-images", type=console.positive, default=2000, metavar="N", help="most images to test on (default 2000)")
    add("--lr", type=console.above_zero, default=1e-3, metavar="RATE", help="largest learning rate (default 0.001)")
    add("--drop-path", type=console.rate, default=0.1, metavar="RATE", help="stochastic depth (default 0.1)")
    add("--dtype", choices=("bfloat16", "float32"), help="of autocast, by default bfloat16, on the CPU float32")
    add("--quick", action="store_true", help="few steps, few images")
    add(
        "--compile-backend",
        metavar="NAME",
        help="of torch.compile, by default inductor, on the CPU aot_eager, which needs no C++ compiler",
    )
    add("--device", choices=("cuda", "cpu"), help="by default cuda where there is one")
    add("--out", type=Path, metavar="FILE", help="by default bench/results/<gpu>/convergence.json; on the CPU none")
    return p


def settle(options: argparse.Namespace, device: torch.device) -> None:
    """Fills in what depends on the device; a wrong value ends the program."""
    on_gpu, quick = device.type == "cuda", options.quick
    options.model = options.model or ("stvit_small" if on_gpu else "stvit_tiny")
    options.size = options.size or (224 if on_gpu else 32 if quick else 64)
    options.batch = options.batch or (64 if on_gpu else 16)
    options.steps = options.steps or (LEAST_STEPS if quick else 1000 if on_gpu else 100)
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.compile_backend = options.compile_backend or ("inductor" if on_gpu else "aot_eager")
    options.planned = None
    if quick:
        options.images, options.test_images = min(options.images, 500), min(options.test_images, 200)
    if options.out is None and on_gpu:
        options.out = record.folder(device) / "convergence.json"
    if on_gpu and not torch.cuda.is_available():
        console.usage_error("--device: no CUDA device found; --device cpu tries the tool on the CPU")
    if options.contenders is None:
        options.contenders = [name for name in ("triton", "cuda") if on_gpu and not why_not(name, device)]
        options.contenders = options.contenders or ["reference+compile"]
    for name in options.contenders:
        reasons = why_not(name, device) + (["it is the baseline, which always runs"] if name == BASELINE else [])
        if reasons:
            console.usage_error(f"--contenders: {name} can't take part: {'; '.join(reasons)}")


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settle(options, device)
    deadline = began + options.minutes * 60 if options.minutes else math.inf
    try:
        if options.data is not None:
            data = image_folder(options.data, options.size, options.images, options.test_images)
        else:
            data = digits(options.size)
        Batches(data.train, options.batch, 0, data.mirror)
    except DataError as error:
        console.usage_error(str(error))
    console.say(f"{options.model} at {options.size} in {options.dtype}, {data.description}, {device.type}")
    rows, about = as_rows(run_all(options, data, device, deadline), options)
    show(rows, about, device)
    if options.out:
        console.say(f"written: {options.out}")
    return 0 if about["passed"] else 1
