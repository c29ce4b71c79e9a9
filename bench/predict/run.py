"""How long a step or a forward pass would take with each kernel at its limit, ours beside the authors', without a GPU.

    python -m bench.predict                               S, B, L at 224 and 384, training and inference, on an H100
    python -m bench.predict --models stvit_small --sizes 224 --modes train --gpu A100
    python -m bench.predict --record                      write the file that README's tables are generated from

Counted and modelled, not timed. Bytes, products and launches are counted (bench.traffic). An op of PyTorch takes the
time of its bytes at the bandwidth of the GPU's memory, or of its products at the peak of its tensor cores, whichever is
longer, which no real op reaches: that favours PyTorch. A kernel of ours takes what bench.machine counts for the
compiled code: instructions, shared memory, L2 and memory, whichever limit is the worst. Both sides run in eager mode;
launches are listed apart, since the time that a host needs for them hides behind kernels or doesn't. The optimiser is
left out, as it costs both the same.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import stvit
from bench.baselines.model import authors_model
from bench.harness import console, record
from bench.machine import cost
from bench.machine.gpus import COUNTED_AS, GPU, GPUS
from bench.machine.processes import compiling_processes
from bench.machine.replay import Recorded
from bench.machine.replay import record as recorded
from bench.predict import tables
from bench.predict.tables import SIDES
from bench.report.tables import MODES
from bench.traffic.count import count
from stvit.model import CONFIGS

RECORDED = record.RESULTS / "predicted.json"
SAMPLED = 224  # of larger images a share of the blocks is executed, as many as of one of so many pixels a side
MODELS, SIZES = ("stvit_small", "stvit_base", "stvit_large"), (224, 384)
Row = dict[str, Any]


class Case(NamedTuple):
    """One model at one size in one mode, by the authors' formulation or by ours."""

    model: str
    size: int
    mode: str
    side: str
    batch: int
    autocast: bool


class Found(NamedTuple):
    """What a case moves and launches, and for how long PyTorch's ops are busy at their limits (s); our launches."""

    moved: int
    kernels: int
    pytorch_s: float
    launches: list[Recorded]


def examine(case: Case, gpu: GPU) -> Found:
    """Counts a case on fake tensors."""
    options = {"drop_path_rate": 0.1}

    def build() -> torch.nn.Module:
        if case.side == "authors":
            return authors_model(case.model, **options)
        model: torch.nn.Module = getattr(stvit, case.model)(backend="triton", **options)
        return model

    counted = count(
        build, case.batch, case.size, torch.bfloat16,
        inference=case.mode == "inference", autocast=case.autocast, channels_last=case.side == "ours",
    )  # fmt: skip
    total = counted.total()
    ours = {launched.op for launched in counted.launches}
    pytorch = [moved for key, moved in counted.calls if key.op not in ours]
    seconds = sum(max(moved.moved / gpu.dram, moved.flops / gpu.tensor) for moved in pytorch)
    return Found(total.moved, total.kernels, seconds, [recorded(launched) for launched in counted.launches])


def rows(
    cases: Sequence[Case], gpu: GPU, step: Callable[[str], None] = lambda what: None
) -> list[Row]:  # fmt: skip
    """A row for each case; those of one batch. Cases, then the distinct kernels, are shared among the cores."""
    with compiling_processes(len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(examine, case, gpu) for case in cases]
        found = []
        for case, future in zip(cases, futures, strict=True):
            step(f"counting {case.model} at {case.size}, {case.mode}, {case.side}")
            found.append(future.result())
    batch = cases[0].batch
    seconds: dict[str, float] = {}
    for size in dict.fromkeys(case.size for case in cases):
        step(f"counting our kernels at {size}")
        launches = [
            launch for case, each in zip(cases, found, strict=True) if case.size == size for launch in each.launches
        ]
        share = batch * max(1, round((size / SAMPLED) ** 2))
        costs = cost.measured(launches, batch=share, capability=COUNTED_AS[gpu.capability]) if launches else {}
        seconds.update({key: each.bound(gpu)[1] for key, each in costs.items()})
    made = []
    for case, each in zip(cases, found, strict=True):
        ours = sum(seconds[launch.key] for launch in each.launches)
        made.append({
            **case._asdict(), "mb": each.moved / batch / 1e6, "kernels": each.kernels,
            "us": (each.pytorch_s + ours) / batch * 1e6, "us_of_our_kernels": ours / batch * 1e6,
        })  # fmt: skip
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = console.parser("predict", __doc__)
    parser.add_argument(
        "--models", nargs="+", choices=sorted(CONFIGS), default=MODELS, metavar="NAME", help="(S, B, L)"
    )
    parser.add_argument("--sizes", nargs="+", type=console.positive, default=SIZES, metavar="PIXELS", help="(224 384)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="(both)")
    parser.add_argument("--batch", type=console.positive, default=128, metavar="N", help="images (128)")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="whose limits (H100)")
    parser.add_argument("--autocast", action="store_true", help="float32 weights under autocast, as one trains")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("--record", action="store_true", help=f"write them to {RECORDED.name}, for the README")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if torch.version.cuda is None:
        console.usage_error("this PyTorch is built without CUDA, whose ops are counted; no GPU is needed")
    cases = [
        Case(*key, args.batch, args.autocast) for key in itertools.product(args.models, args.sizes, args.modes, SIDES)
    ]
    found = rows(cases, GPUS[args.gpu], console.progress(len(cases) + len(set(args.sizes))))
    title = f"\ncounted and modelled, not timed: each kernel at its limit on one {args.gpu}, batch {args.batch}"
    console.table(title, *tables.predicted_lines(found), left=3)
    for path in filter(None, (args.out, RECORDED if args.record else None)):
        record.write(path, "predict", torch.device("cpu"), found, gpu=args.gpu, source=GPUS[args.gpu].source)
        console.say(f"written: {path}")
    return 0
