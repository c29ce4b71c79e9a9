"""Bytes that one training step moves, kernels that it launches and bytes that it saves, counted without a GPU.

    python -m bench.traffic                                    stvit_small, batch 128, 224 x 224, bfloat16
    python -m bench.traffic --by block --what authors,ours,floor
    python -m bench.traffic --autocast --by op --out traffic.json
    python -m bench.traffic --inference                        a forward pass, also after optimize_for_inference
    python -m bench.traffic --record                           rewrite the ceiling that the tests hold ours to

A step is forward, loss and backward, without the optimiser. MB are 10^6 bytes an image, weights and their gradients
included. What is counted, and the floor, is worked out in docs/traffic.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import stvit
from bench.baselines.model import authors_model
from bench.harness import console, record
from bench.traffic.count import count
from bench.traffic.floor import floor
from stvit.backends.dispatch import BACKENDS
from stvit.model import CONFIGS

CEILING = Path(__file__).with_name("ceiling.json")
SUBJECTS = {
    "authors": "the authors' formulation (bench/baselines/model.py), NCHW",
    "reference": "our model with the reference backend, channels_last",
    "ours": "our model with --backend, channels_last",
    "optimized": "the same after stvit.optimize_for_inference, for --inference",
    "floor": "what has to move (bench/traffic/floor.py)",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SMALLEST = 0.05  # MB an image below which rows of a table are put together


class Row(NamedTuple):
    """Bytes and kernels of a step, by where and what; the floor counts no kernels."""

    what: str
    phase: str
    block: str
    category: str
    op: str
    bytes: int
    kernels: int | None


class Subject(NamedTuple):
    """One column: its rows, and the bytes that its forward saves."""

    rows: list[Row]
    saved: int

    def total(self, field: str, **wanted: str) -> int:
        """Of "bytes" or "kernels" over the rows whose fields are as wanted."""
        rows = (row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items()))
        return sum(getattr(row, field) or 0 for row in rows)

    def bytes(self, **wanted: str) -> int:
        return self.total("bytes", **wanted)


def examine(what: str, args: argparse.Namespace) -> Subject:
    """Counts, or works out, one of SUBJECTS."""
    options = {"drop_path_rate": 0.1}
    if what == "floor":
        return _floor(args)
    if what == "authors":
        return _counted(what, lambda: authors_model(args.model, **options), args, channels_last=False)
    backend = "reference" if what == "reference" else args.backend

    def build() -> nn.Module:
        model = getattr(stvit, args.model)(backend=backend, **options)
        return stvit.optimize_for_inference(model) if what == "optimized" else model

    return _counted(what, build, args)


def _counted(
    what: str, build: Callable[[], nn.Module], args: argparse.Namespace, *, channels_last: bool = True
) -> Subject:
    counted = count(
        build, args.batch, args.size, DTYPES[args.dtype],
        inference=args.inference, autocast=args.autocast, channels_last=channels_last,
    )  # fmt: skip
    return Subject([Row(what, *key, moved.moved, moved.kernels) for key, moved in counted.rows.items()], counted.saved)


def _floor(args: argparse.Namespace) -> Subject:
    width = DTYPES[args.dtype].itemsize
    lines = floor(args.model, args.size)
    rows = [
        Row("floor", phase, line.block, line.category, line.what, moved, None)
        for line in lines
        for phase, moved in zip(("forward", "backward"), line.bytes(args.batch, width), strict=True)
    ]
    return Subject(rows, width * args.batch * sum(line.saved for line in lines))


def show(subjects: dict[str, Subject], args: argparse.Namespace) -> None:
    """The table of --by, totals below."""
    columns = {what: subject for what, subject in subjects.items() if args.by != "op" or what != "floor"}
    names = dict.fromkeys(getattr(row, args.by) for subject in columns.values() for row in subject.rows)
    largest = {name: max(subject.bytes(**{args.by: name}) for subject in columns.values()) for name in names}
    shown = [name for name in names if largest[name] >= SMALLEST * 1e6 * args.batch]
    if args.by != "block":
        shown.sort(key=lambda name: -largest[name])

    def line(title: str, names: Iterable[str]) -> list[str]:
        cells = [title]
        for what, subject in columns.items():
            moved, kernels = (sum(subject.total(f, **{args.by: n}) for n in names) for f in ("bytes", "kernels"))
            cells += [_mb(moved, args), "" if what == "floor" else str(kernels)]
        return cells

    table = [line(name, [name]) for name in shown]
    small = [name for name in names if name not in shown]
    if small:
        table.append(line(f"{len(small)} smaller", small))
    table.append(line("total", names))
    if not args.inference:
        saved = ((_mb(subject.saved, args), "") for subject in columns.values())
        table.append(["saved for the backward", *itertools.chain(*saved)])
    header = [args.by, *itertools.chain(*((f"{what} MB", "kernels") for what in columns))]
    numbers = f"{args.dtype} {'autocast' if args.autocast else 'activations'}"
    run = "forward pass" if args.inference else "step"
    title = f"{args.model}, batch {args.batch}, {args.size} x {args.size}, {numbers}: MB an image moved by a {run}"
    console.table(title, header, table)


def _mb(moved: int, args: argparse.Namespace) -> str:
    return f"{moved / args.batch / 1e6:.1f}"


def ceilings(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """MB an image that ours moves and saves, rounded up, with activations in --dtype and under autocast."""
    found = {}
    for name, autocast in (("activations", False), ("autocast", True)):
        subject = examine("ours", argparse.Namespace(**{**vars(args), "autocast": autocast}))
        moved, saved = (math.ceil(n / args.batch / 1e4) / 100 for n in (subject.bytes(), subject.saved))
        found[name] = {"moved_mb": moved, "saved_mb": saved}
    return found


def write_ceiling(path: Path, args: argparse.Namespace) -> None:
    """Records what ours moves at present as the most that it may move from now on."""
    before = json.loads(path.read_text())["ceilings"] if path.exists() else {}
    settings = {name: getattr(args, name) for name in ("model", "batch", "size", "dtype", "backend")}
    found = ceilings(args)
    command = {"command": "python -m bench.traffic --record", "torch": torch.__version__}
    record.write_json(path, {**command, **settings, "ceilings": found})
    for name, figures in found.items():
        for figure, value in figures.items():
            console.say(f"{name} {figure}: {before.get(name, {}).get(figure, 'none')} -> {value}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = console.parser("traffic", __doc__)
    add = parser.add_argument
    add("--model", choices=sorted(CONFIGS), default="stvit_small")
    add("--batch", type=console.positive, default=128, metavar="N", help="images of a step (128)")
    add("--size", type=console.positive, default=224, metavar="N", help="pixels a side (224)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of activations and weights (bfloat16)")
    add("--autocast", action="store_true", help="float32 weights, autocast to --dtype, as one trains")
    add(
        "--what", type=console.some({name: name for name in SUBJECTS}), metavar="LIST",
        help="of " + "; ".join(f"{name}: {meaning}" for name, meaning in SUBJECTS.items())
        + " (authors,ours,floor; with --inference authors,ours,optimized)",
    )  # fmt: skip
    add("--inference", action="store_true", help="a forward pass in evaluation mode, not a step")
    add(
        "--backend", choices=BACKENDS, default="triton",
        help="of ours (triton); it need not run here; cuda is counted as with enough images for a GPU, about 100",
    )  # fmt: skip
    add("--by", choices=("category", "op", "block"), default="category", help="rows (category)")
    add("--quick", action="store_true", help="stvit_tiny, batch 2, 64 x 64")
    add("--out", type=Path, metavar="FILE", help="write every row to FILE as JSON")
    add("--record", action="store_true", help=f"only write {CEILING.name}, from the present count")
    args = parser.parse_args(arguments)
    if args.quick:
        args.model, args.batch, args.size = "stvit_tiny", 2, 64
    if args.autocast and args.dtype == "float32":
        parser.error("argument --autocast: expected a 16-bit --dtype, got float32")
    if args.backend == "cuda" and args.dtype == "float32":
        parser.error("argument --backend: cuda is counted in 16 bits, expected such a --dtype, got float32")
    args.what = args.what or ["authors", "ours", "optimized" if args.inference else "floor"]
    if args.inference and ("floor" in args.what or args.record):
        parser.error("argument --inference: expected neither floor nor --record, which are those of a training step")
    if "optimized" in args.what and not args.inference:
        parser.error("argument --what: optimized is for inference only, expected --inference with it")
    if args.batch * math.ceil(args.size / 32) ** 2 < 2:
        parser.error("argument --batch: BatchNorm needs more than one pixel in the last stage, got one image of one")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if torch.version.cuda is None:
        console.usage_error("this PyTorch is built without CUDA, whose ops are counted; no GPU is needed")
    if args.record:
        write_ceiling(CEILING, args)
        return 0
    subjects = {}
    step = console.progress(len(args.what))
    for what in args.what:
        step(what)
        subjects[what] = examine(what, args)
    show(subjects, args)
    if args.out:
        settings: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in ("out", "record")}
        saved = {what: subject.saved for what, subject in subjects.items()}
        rows = [row._asdict() for subject in subjects.values() for row in subject.rows]
        record.write(args.out, "traffic", torch.device("cpu"), rows, settings=settings, saved=saved)
        console.say(f"written: {args.out}")
    return 0
