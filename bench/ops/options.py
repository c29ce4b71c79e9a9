"""The command line of bench.ops, and the order in which it works: what matters most comes first."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import console, record
from bench.ops import cases
from bench.ops.cases import CONTENDERS, DTYPES, IMAGES, MODES, Op, Problem, Shape, parse_shape, published_shapes

OPS = [*cases.OPS, *cases.BLOCK_OPS]

EXAMPLES = """\
examples:
  python -m bench.ops                    everything that fits 8 minutes, what matters most first
  python -m bench.ops --ops core --shape S/1/224,S/2/224 --dtype bf16 --batch 128 --mode detached
  python -m bench.ops --shape 2x96x50x70/8x8 --dtype fp32 --contenders triton,authors
  python -m bench.ops --official ../STViT --out official.json   the authors' own code in place of our re-expression
  TRITON_INTERPRET=1 python -m bench.ops --device cpu --shape 1x16x8x8/4x4 --contenders triton    the gate alone

exit codes: 0 every gate passed, 1 a gate failed or a case raised an error, 2 a wrong command line; a case that does
not fit the memory is recorded and is no failure
"""


class Unit(NamedTuple):
    """One problem and those who are timed on it."""

    op: Op
    problem: Problem
    contenders: list[cases.Contender]


def preset(on_gpu: bool, quick: bool) -> dict[str, Any]:
    """What is timed unless said otherwise, by flag; the first entry of each list is the one that matters most."""
    found: dict[str, Any] = {
        "ops": OPS, "shape": published_shapes(), "batch": [128, 32, 1], "dtype": list(DTYPES), "mode": list(MODES),
        "contenders": CONTENDERS, "minutes": 8.0,
    }  # fmt: skip
    if not on_gpu:
        small = [shape for shape in found["shape"] if shape.name.endswith("/224")]
        found.update(shape=small, batch=[1], dtype=["fp32"])
    if quick and on_gpu:
        found.update(ops=OPS[:1], batch=[128], dtype=["bf16"], mode=["detached"])
    if quick:
        shapes = ("S/1/224", "S/2/224") if on_gpu else ("S/2/224",)
        quick_ones = [c for c in CONTENDERS if not c.compiled or (on_gpu and c.family == "authors")]
        found.update(shape=[parse_shape(name) for name in shapes], contenders=quick_ones, minutes=1.0)
    return found


def _shapes(text: str) -> list[Shape]:
    try:
        return list(dict.fromkeys(parse_shape(name.strip()) for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    p = console.parser("ops", "Time each op against its baselines and the floor of its bytes.", EXAMPLES)
    add = p.add_argument
    for flag, named in (
        ("ops", {op.name: op for op in OPS}), ("dtype", {name: name for name in DTYPES}),
        ("mode", {name: name for name in MODES}), ("contenders", {c.name: c for c in CONTENDERS}),
    ):  # fmt: skip
        add(f"--{flag}", type=console.some(named), metavar="LIST", help=f"some of {', '.join(named)}")
    add("--shape", type=_shapes, metavar="LIST", help="S/1/224 (model, stage, image) or BxCxHxW/hxw, with commas")
    add("--batch", type=lambda text: list(map(console.positive, text.split(","))), metavar="LIST",
        help="images, with commas")  # fmt: skip
    add("--quick", action="store_true", help="a few cases, about a minute")
    add("--gate", action="store_true", help="the correctness gate alone, no times")
    add("--minutes", type=console.above_zero, help="when to stop (default: 8, with --quick 1)")
    add("--official", type=Path, metavar="DIR", help="a checkout of the authors' repository to time")
    console.add_device(p)
    add("--out", type=Path, metavar="FILE", help="result file (default: bench/results/<gpu>/ops.json for a full run on "
        "a GPU, none for a selection, --quick or on a CPU)")  # fmt: skip
    return p


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, filled up; a mistake ends the program with exit code 2 and one line that names it."""
    options = parser().parse_args(arguments)
    options.device = console.device(options.device)
    on_gpu = options.device.type == "cuda"
    default = preset(on_gpu, options.quick)
    missing = {name for name in default if getattr(options, name) is None}
    whole = not (options.quick or options.gate or options.official or default.keys() - missing - {"minutes"})
    if options.out is None and on_gpu and whole:
        options.out = record.folder(options.device) / "ops.json"
    for name in missing:
        setattr(options, name, default[name])
    return options


def plan(options: argparse.Namespace) -> list[Unit]:
    """The problems in the order of importance.

    The farther from bfloat16, batch 128, 224 pixels and the detached mode, the later. The headline cases (the first op,
    dtype, batch and mode at the two smaller images) come with all contenders; for the others compiling, which takes
    most of the time, waits until everything else is done.
    """
    problems: list[tuple[int, Op, Problem]] = []
    images = list(IMAGES)
    lists = enumerate(options.ops), enumerate(options.mode), enumerate(options.batch), enumerate(options.dtype)
    for (op_at, op), (mode_at, mode), (batch_at, batch), (dtype_at, dtype) in itertools.product(*lists):
        if MODES[mode] and not op.associates:
            continue
        for shape in options.shape:
            if shape.batch is not None and batch_at > 0:
                continue  # it brings its own batch
            image = shape.name.split("/")[-1]
            image_at = (0, 1, 3)[images.index(image)] if image in images else 0
            far = op_at + image_at + 2 * mode_at + 2 * batch_at + 3 * dtype_at
            problem = Problem(shape, shape.batch or batch, DTYPES[dtype], options.device, MODES[mode])
            problems.append((far if op_at == 0 else far + 1, op, problem))
    problems.sort(key=lambda entry: entry[0])  # stable: the rest stays in the order of the lists
    every, slow = options.contenders, [c for c in options.contenders if c.compiled]
    fast = [c for c in every if not c.compiled]
    headline = [Unit(op, problem, every) for far, op, problem in problems if far <= 1]
    others = [(op, problem) for far, op, problem in problems if far > 1]
    units = headline + [Unit(*other, fast) for other in others] + [Unit(*other, slow) for other in others]
    return [unit for unit in units if unit.contenders]
