"""How fast each op is, and whether its numbers are right: python -m bench.ops.

Every contender passes the correctness gate (gate.py) right before it is timed, at the very shape that is timed. A time
is the GPU's: the host has queued the call before the clock starts, and what the host needs to do so is given beside it
(host_ms; where it is the larger, an eager loop is bound by the host, which CUDA graphs cure). Everything runs in the
plain dtype, parameters included: autocast would add casts to the authors' side only. Ours runs channels_last, the
authors' in NCHW, as they train. float32 rows keep PyTorch's defaults: TF32 off in matrix products, on in cuDNN's
convolutions. What a row of the result file holds is said in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from bench.baselines import official
from bench.harness import console, record, timing
from bench.harness.gate import Verdict, finite
from bench.ops import gate
from bench.ops.cases import MODES, PASSES, Contender, Implementation, Op, Problem, interpreted
from bench.ops.options import Unit, parse, plan

Row = dict[str, Any]
KEY = ("op", "shape", "batch", "dtype", "mode", "pass")  # what a speed-up keeps fixed
FAILED = ("failed gate", "error")
REPEATS, SECONDS = 30, 1.0
SAVE_EVERY = 20.0  # seconds: a run that is killed keeps its rows


class Run:
    """What a run has found so far."""

    def __init__(self, options: argparse.Namespace, authors: ModuleType | None) -> None:
        self.options, self.authors, self.device = options, authors, options.device
        self.bandwidth = 0.0
        self.rows: list[Row] = []
        self.skipped = 0  # measurements that the time didn't suffice for
        self.unavailable: dict[str, list[str]] = {}
        self.began = self._saved = time.monotonic()

    def out_of_time(self) -> bool:
        return time.monotonic() - self.began > 60 * self.options.minutes

    def available(self, units: Sequence[Unit]) -> list[Unit]:
        """The units with the contenders that can run; the others are noted with their reasons."""
        kept = []
        for unit in units:
            contenders = []
            for contender in unit.contenders:
                reasons = unit.op.why_not(contender, unit.problem, self.authors)
                noted = self.unavailable.setdefault(contender.name, []) if reasons else []
                noted += [reason for reason in reasons if reason not in noted]
                contenders += [] if reasons else [contender]
            if contenders:
                kept.append(unit._replace(contenders=contenders))
        return kept

    def save(self, at_once: bool = False) -> None:
        if self.options.out is None or not (at_once or time.monotonic() - self._saved > SAVE_EVERY):
            return
        self._saved = time.monotonic()
        for row in self.rows:
            row["speedup"] = speedups(row, self.rows)
        authors = "official checkout" if self.authors else "bench/baselines/attention.py"
        record.write(
            self.options.out, "ops", self.device, self.rows,
            bandwidth_bytes_per_s=self.bandwidth, authors=authors,
            unavailable=self.unavailable, skipped=self.skipped, minutes=self.options.minutes,
        )  # fmt: skip


def speedups(row: Row, rows: Sequence[Row]) -> dict[str, float]:
    """Baseline -> how many times faster than it the row is."""
    if row["status"] != "timed":
        return {}
    same = [other for other in rows if other["status"] == "timed" and all(other[key] == row[key] for key in KEY)]
    baselines = [other for other in same if other["baseline"] and other is not row]
    return {other["contender"]: other["median_ms"] / row["median_ms"] for other in baselines}


def describe(op: Op, problem: Problem, contender: Contender, pass_: str) -> Row:
    """The part of a row that is known before anything runs."""
    shape = problem.shape
    return {
        "op": op.name,
        "shape": shape.name,
        "batch": problem.batch,
        **{name: getattr(shape, name) for name in ("channels", "height", "width", "heads")},
        "tile": list(shape.tile),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "mode": next(name for name, grad in MODES.items() if grad == problem.association_grad),
        "contender": contender.name,
        "baseline": contender.baseline,
        "interpreted": interpreted(contender, problem.device),
        "pass": pass_,
        "status": "not run",
        "error": None,
    }


@contextmanager
def failures_in(row: Row, device: torch.device) -> Iterator[None]:
    """A failure within the block becomes part of the row; where the GPU doesn't survive it, the program ends."""
    try:
        yield
    except Exception as error:
        row["status"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "error"
        lines = str(error).strip().splitlines() or [""]
        row["error"] = f"{type(error).__name__}: {lines[0]}"
    if row["status"] == "error" and device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            console.failure(f"the GPU answers no more after: {row['error']}")


def run_contender(run: Run, op: Op, problem: Problem, contender: Contender, right: gate.Truth) -> None:
    """Gate, then times, of both passes of one contender; appends a row for each pass."""
    if contender.compiled:
        torch._dynamo.reset()  # so that every shape is compiled as the first, static one
    rows = [describe(op, problem, contender, pass_) for pass_ in PASSES]
    run.rows += rows
    implementation: Implementation | None = None
    prepared: gate.Calls | None = None
    for row in rows:
        with failures_in(row, run.device):
            if implementation is None:
                implementation = op.implement(problem, contender.family, run.authors)
                if contender.compiled:
                    implementation = implementation._replace(run=torch.compile(implementation.run))
            if prepared is None:
                data = gate.only(right.images, gate.draw(op, problem, 0))
                prepared = gate.prepare(op, problem, contender.family, implementation, data)
                del data
            results = prepared[row["pass"]]()
            pass_gate(row, gate.check(op, problem, contender, implementation, results, right))
            del results
    prepared = None  # the contender gets all the memory
    calls: list[gate.Calls] = []
    for row in rows:
        if row["status"] != "gate only" or row["interpreted"] or run.options.gate:
            continue
        if run.out_of_time():
            run.skipped += 1
            continue
        with failures_in(row, run.device):
            assert implementation is not None
            calls = calls or rotated(op, problem, contender, implementation)
            row.update(timed(run, op, problem, row["pass"], [prepared[row["pass"]] for prepared in calls]))


def pass_gate(row: Row, verdict: Verdict) -> None:
    errors = {name: finite(error) for name, error in verdict.errors.items()}
    row["gate"] = {**verdict.as_row(), "errors": errors}
    row["status"] = "gate only" if verdict.passed else "failed gate"
    if not verdict.passed:
        name, off = verdict.worst_name, verdict.errors[verdict.worst_name]
        row["error"] = f"failed gate: {name} is off by {off:.3g}, {verdict.worst:.3g} times what a kernel is allowed"


def rotated(op: Op, problem: Problem, contender: Contender, implementation: Implementation) -> list[gate.Calls]:
    """The calls to time, on inputs that together don't fit the L2 cache."""
    sizes = [problem.sizes(name) for name in (*op.inputs(problem), *op.outputs)]
    a_call = sum(math.prod(size) for size in sizes) * problem.dtype.itemsize
    copies = timing.copies_needed(a_call) if problem.device.type == "cuda" else 2
    return [
        gate.prepare(op, problem, contender.family, implementation, gate.draw(op, problem, seed))
        for seed in range(copies)
    ]


def timed(run: Run, op: Op, problem: Problem, pass_: str, calls: Sequence[Callable[[], Any]]) -> Row:
    """The measured part of a row."""
    calls[0]()
    host = timing.host_ms(calls[0], run.device)
    took = timing.measure(
        calls, run.device, repeats=REPEATS, seconds=SECONDS, queue_ms=min(50.0, 2 * host + 0.1) if host else 0.0
    )
    forward, backward = op.floor(problem)
    floor = forward if pass_ == "forward" else forward + backward
    return {
        "status": "timed",
        **{f"{name}_ms": getattr(took, name) for name in ("median", "p20", "p80")},
        "repeats": took.repeats,
        "host_ms": host,
        "peak_bytes": timing.peak_bytes(calls[0], run.device),
        "floor_bytes": floor,
        "percent_of_floor": 100 * floor / run.bandwidth / (took.median * 1e-3),
    }


def run_unit(run: Run, unit: Unit, step: Callable[[str], None]) -> None:
    """All contenders of one problem; what doesn't fit the time left is noted as skipped."""
    op, problem, contenders = unit
    first = len(run.rows)
    right: gate.Truth | None = None
    for contender in contenders:
        if run.out_of_time():
            run.skipped += len(PASSES)
            continue
        mode = "association_grad" if problem.association_grad else "detached"
        step(f"{op.name} {problem.shape.name}, batch {problem.batch}, {problem.dtype}, {mode}: {contender.name}")
        if right is None:
            run.rows.append(describe(op, problem, contender, PASSES[-1]))
            with failures_in(run.rows[-1], run.device):
                right = gate.truth(op, problem, gate.draw(op, problem, 0))
            if run.rows[-1]["error"]:
                break  # no truth, no numbers: the other contenders would fail likewise
            run.rows.pop()
        assert right is not None
        run_contender(run, op, problem, contender, right)
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    for row in run.rows[first:]:
        console.say(f"    {told(row, run.rows)}")


def told(row: Row, rows: Sequence[Row]) -> str:
    """A row in one line: its figures, or why there are none."""
    name = f"{row['contender']}{' (interpreted)' if row['interpreted'] else ''}, {row['pass']}"
    worst = row.get("gate", {}).get("worst")
    verdict = "" if worst is None else f", error {worst:.2f} of its limit"
    if row["status"] != "timed":
        return f"{name}: {row['error'] or 'gate passed'}{verdict}"
    figures = [
        f"{row['median_ms']:.3f} ms ({row['p20_ms']:.3f} to {row['p80_ms']:.3f})",
        f"{row['percent_of_floor']:.0f} % of the speed of its floor of {row['floor_bytes'] / 2**20:.1f} MiB",
        *(f"{factor:.2f} times as fast as {baseline}" for baseline, factor in speedups(row, rows).items()),
    ]
    figures += [] if row["host_ms"] is None else [f"host {row['host_ms']:.3f} ms"]
    figures += [] if row["peak_bytes"] is None else [f"peak {row['peak_bytes'] / 2**20:.0f} MiB"]
    return f"{name}: {', '.join(figures)}{verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0: everything passed its gate; 1: something failed; 130: interrupted."""
    options = parse(arguments)
    try:
        authors = official.load(options.official) if options.official else None
    except official.OfficialError as error:
        console.usage_error(str(error))
    run = Run(options, authors)
    units = run.available(plan(options))
    for name, reasons in run.unavailable.items():
        console.say(f"not everywhere available: {name}: {'; '.join(reasons)}")
    if not units:
        console.usage_error("nothing to run: no contender asked for can run here")
    run.bandwidth = timing.copy_bandwidth(run.device)
    console.say(f"{record.environment(run.device)['name']}: copy bandwidth {run.bandwidth / 1e9:.0f} GB/s\n")
    step = console.progress(sum(len(unit.contenders) for unit in units))
    try:
        for unit in units:
            run_unit(run, unit, step)
            run.save()
    except KeyboardInterrupt:
        console.failure("interrupted", 130)
    finally:
        run.save(at_once=True)
    return summarise(run)


def summarise(run: Run) -> int:
    """Prints how the run went; the exit code."""
    failed = [row for row in run.rows if row["status"] in FAILED]
    if run.skipped:
        console.say(f"{run.options.minutes:g} minutes were over: {run.skipped} measurements skipped (--minutes)")
    counts = {status: sum(row["status"] == status for row in run.rows) for status in {r["status"] for r in run.rows}}
    console.say(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    if run.options.out is not None:
        console.say(f"written to {run.options.out}")
    return 1 if failed else 0
