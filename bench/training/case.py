"""Measures one case of `bench.training`: python -m bench.training.case CASE ROWS.json

It runs in a process of its own, so that a crash, a hang or an exhausted GPU costs one case and not the run. Rows are
written as soon as they are there. What a row holds is said in `measure`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import stvit
from bench.harness import record, timing
from bench.training import breakdown, contenders
from bench.training import gate as training_gate
from bench.training.contenders import CONTENDERS, Case, Step

Row = dict[str, Any]
PROFILED_STEPS = 3
KERNELS_KEPT = 60


class Prepared(NamedTuple):
    """A contender that has warmed up. `peak_bytes`: of a captured step, whose memory is only seen at its capture."""

    step: Step
    model: nn.Module
    setup_s: float
    peak_bytes: int | None


def run(case: Case, keep: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
    """One row for each mode of the case; `keep` gets the rows so far after each."""
    if case.device == "cuda" and case.dtype != "float32":
        torch.backends.cudnn.allow_tf32 = False  # for the truth; convolutions that are timed run in case.dtype
    if CONTENDERS[case.contender].replays:  # some versions of CUPTI fail when it is taken down beside a graph
        os.environ.update(TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1")
    rows: list[Row] = []
    for mode in case.modes:
        rows.append(_row(case, mode))
        keep(rows)
        _release(case.device)
    return rows


def _row(case: Case, mode: str) -> Row:
    """The row of one mode, at the largest batch that fits: the one asked for, or halved until it does."""
    about = {"model": case.model, "size": case.size, "contender": case.contender, "mode": mode}
    batch = case.batch
    while True:
        row: Row = {**about, "batch": batch, "batch_asked": case.batch, "dtype": case.dtype}
        try:
            return {**row, **measure(case, mode, batch)}
        except Exception as error:  # whatever a contender raises belongs into its row
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            out_of_memory = _out_of_memory(error)
        # Outside of the handler: the exception's frames held the model.
        _release(case.device)
        if not out_of_memory or batch == 1:
            return row
        batch //= 2


def _out_of_memory(error: BaseException | None) -> bool:
    """Also where compilation or the end of a graph's capture raised something else over it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


def _release(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, mode: str, batch: int) -> Row:
    """What is known of one contender after the gate.

    gate, loss: see training_gate; without a pass the row ends there, with an "error".
    median, p20, p80: milliseconds a step, steps following each other without a pause in between, as in training; the
        spread is that of single steps. images_per_s, _p20, _p80 follow.
    peak_bytes: the most memory that tensors took in a step: weights, gradients, optimizer state, activations,
        workspaces. peak_of "reserved": max-autotune replays graphs, whose inner memory isn't counted by tensors;
        there it is all the memory that the allocator holds, which is more.
    busy_ms: time of a step during which a kernel ran, by torch.profiler; overlapping kernels count once.
    host_gap_ms: median less busy_ms: the time that the GPU waits, mostly for the host. None on the CPU.
    setup_s: seconds until the first steps were done: compilation, autotuning, capture.
    """
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    shared = Path(case.shared) if case.shared else None
    torch.backends.cudnn.benchmark = False
    right = training_gate.truth(case.model, mode, contenders.fresh_batch(batch, case.size, device), dtype, shared)
    _release(case.device)
    torch.backends.cudnn.benchmark = True  # as the authors' training program has it
    prepared = prepare(case, mode, batch)
    row = gate(case, mode, prepared, right)
    if "error" in row:
        return row
    times = back_to_back(prepared.step, device, case.seconds)
    row.update(
        **times._asdict(),
        images_per_s=batch / times.median * 1e3,
        images_per_s_p20=batch / times.p80 * 1e3,
        images_per_s_p80=batch / times.p20 * 1e3,
        setup_s=prepared.setup_s,
        **peak(prepared, case),
    )
    try:
        row.update(profiled(prepared, case, times.median))
    except Exception as error:  # the speed stands without its breakdown
        row["profile_error"] = f"{type(error).__name__}: {error}"[:400]
    return row


def prepare(case: Case, mode: str, batch: int) -> Prepared:
    """Builds the contender from the weights of all, and runs it until nothing is compiled or allocated any more."""
    contender, device, dtype = CONTENDERS[case.contender], torch.device(case.device), getattr(torch, case.dtype)
    data = contenders.in_format(contenders.fresh_batch(batch, case.size, device), contender)
    model = contenders.contender_model(case, contenders.reference_model(case.model).state_dict()).train(mode == "train")
    if contender.optimized:
        model = stvit.optimize_for_inference(model)
    began = time.perf_counter()
    forward = contenders.forward_of(model, contender)
    step = contenders.step_of(model, forward, data, dtype, contender, mode)
    for _ in range(contenders.WARM_UP):
        step()
    peak_bytes = None
    if contender.graph:
        step = contenders.captured(step, model)
        peak_bytes = torch.cuda.max_memory_allocated()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Prepared(step, model, time.perf_counter() - began, peak_bytes)


def gate(case: Case, mode: str, prepared: Prepared, right: training_gate.Truth) -> Row:
    """Runs the prepared step once more from the weights that the truth was worked out for."""
    if mode == "train":  # whose steps have changed them
        weights = contenders.reference_model(case.model).state_dict()
        with torch.no_grad():  # in place: graphs know parameters by their address
            for name, tensor in (*prepared.model.named_parameters(), *prepared.model.named_buffers()):
                if name in weights:
                    tensor.copy_(weights[name])
    got = training_gate.outcome(mode, prepared.step(), prepared.model)
    verdict = training_gate.check(got, right)
    row: Row = {"gate": verdict.as_row()}
    if mode == "train":
        row["loss"], row["loss_truth"] = float(got["loss"]), float(right.values["loss"])
    if not verdict.passed:
        row["error"] = (
            f"wrong result: {verdict.worst_name} is off by {verdict.worst:.3g} times what {case.dtype} allows"
        )
    return row


def back_to_back(step: Step, device: torch.device, seconds: float) -> timing.Timing:
    """Times steps that follow each other without waiting for the GPU in between: from one's end to the next one's."""
    if device.type != "cuda":
        return timing.measure([step], device, warmup=0, repeats=20, seconds=seconds)
    estimate = timing.measure([step], device, warmup=1, repeats=3).median
    repeats = max(5, min(100, int(seconds * 1e3 / estimate)))
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for end in ends:  # the first step starts on an idle GPU; its time is not taken
        step()
        end.record()
    torch.cuda.synchronize()
    return timing.Timing.of([a.elapsed_time(b) for a, b in zip(ends, ends[1:], strict=False)])


def peak(prepared: Prepared, case: Case) -> Row:
    """peak_bytes and peak_of, as `measure` says."""
    if case.device != "cuda":
        return {"peak_bytes": None}
    if prepared.peak_bytes is not None:
        return {"peak_bytes": prepared.peak_bytes, "peak_of": "allocated"}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    prepared.step()
    torch.cuda.synchronize()
    if CONTENDERS[case.contender].replays:
        return {"peak_bytes": torch.cuda.max_memory_reserved(), "peak_of": "reserved"}
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_of": "allocated"}


def profiled(prepared: Prepared, case: Case, median: float) -> Row:
    """busy_ms and host_gap_ms, and with --profile the breakdown."""
    device, contender = torch.device(case.device), CONTENDERS[case.contender]
    if device.type != "cuda" and not case.profile:
        return {"host_gap_ms": None}
    eager = contender.compile_mode is None and not contender.graph
    marked = prepared.model if case.profile and eager else None
    found = breakdown.take(prepared.step, device, PROFILED_STEPS, marked, case.profile)
    row: Row = {"host_gap_ms": None}
    if device.type == "cuda":
        row = {"busy_ms": found.busy_ms, "host_gap_ms": max(0.0, median - found.busy_ms)}
    if case.profile:
        row["profile"] = {
            "busy_ms": found.busy_ms,
            "categories": found.categories,
            "kernels": [entry._asdict() for entry in found.entries[:KERNELS_KEPT]],
        }
    return row


def main(arguments: list[str]) -> int:
    fields, rows_file = json.loads(arguments[0]), Path(arguments[1])
    case = Case(**{**fields, "modes": tuple(fields["modes"])})
    run(case, lambda rows: record.write_json(rows_file, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
