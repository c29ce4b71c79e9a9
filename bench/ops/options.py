"""The command line of bench.ops, and the order in which it works: what matters most comes first."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness import console, record
from bench.ops import cases
from bench.ops.block_cases import BLOCK_OPS
from bench.ops.cases import (
    CONTENDERS,
    DTYPES,
    IMAGES,
    MODES,
    Contender,
    Op,
    Problem,
    Shape,
    parse_shape,
    published_shapes,
)

OPS = [*cases.OPS, *BLOCK_OPS]

EXAMPLES = """\
examples:
  python -m bench.ops                                        everything that fits 8 minutes, what matters most first
  python -m bench.ops --quick                                the headline cases in about a minute
  python -m bench.ops --ops core --shape S/1/224,S/2/224 --dtype bf16 --batch 128 --mode detached
  python -m bench.ops --shape 2x96x50x70/8x8 --dtype fp32 --contenders triton,authors
  python -m bench.ops --official ../STViT --out official.json   the authors' own code in place of our re-expression
  TRITON_INTERPRET=1 python -m bench.ops --device cpu --shape 1x16x8x8/4x4 --contenders triton    the gate alone

exit codes: 0 every gate passed, 1 a gate failed or a case raised an error, 2 a wrong command line; a case that does
not fit the memory is recorded and is no failure
"""


class Options(NamedTuple):
    """The command line, checked. out: the result file, None where none is to be written."""

    device: torch.device
    ops: list[Op]
    shapes: list[Shape]
    batches: list[int]
    dtypes: list[str]
    modes: list[str]
    contenders: list[Contender]
    channels_last: bool
    autocast: bool
    gate: bool
    minutes: float
    official: Path | None
    out: Path | None


class Unit(NamedTuple):
    """One problem and those who are timed on it."""

    op: Op
    problem: Problem
    contenders: list[Contender]


Preset = dict[str, Any]  # flag -> value

# What is timed unless said otherwise; the first entry of each list is the one that matters most.
ON_GPU: Preset = {
    "ops": OPS, "shape": published_shapes(), "batch": [128, 32, 1], "dtype": list(DTYPES), "mode": list(MODES),
    "contenders": CONTENDERS, "minutes": 8.0,
}  # fmt: skip
QUICK_ON_GPU: Preset = {
    **ON_GPU, "ops": OPS[:1], "shape": [parse_shape("S/1/224"), parse_shape("S/2/224")], "batch": [128],
    "dtype": ["bf16"], "mode": ["detached"], "contenders": [c for c in CONTENDERS if c.name != "reference compiled"],
    "minutes": 1.0,
}  # fmt: skip
ON_CPU: Preset = {
    **ON_GPU, "shape": [shape for shape in published_shapes() if shape.name.endswith("/224")], "batch": [1],
    "dtype": ["fp32"],
}  # fmt: skip
QUICK_ON_CPU: Preset = {
    **ON_CPU, "shape": [parse_shape("S/2/224")], "contenders": [c for c in CONTENDERS if not c.compiled],
    "minutes": 1.0,
}  # fmt: skip


def _some(named: dict[str, Any]) -> Callable[[str], list[Any]]:
    """An argparse type: names separated by commas -> what they name."""

    def parse(text: str) -> list[Any]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in named:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(named)}; got {name!r}")
        return [named[name] for name in names]

    return parse


def _shapes(text: str) -> list[Shape]:
    try:
        return list(dict.fromkeys(parse_shape(name.strip()) for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _batches(text: str) -> list[int]:
    return [console.positive(part) for part in text.split(",")]


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line; a mistake ends the program with exit code 2 and one line that names it."""
    parser = console.parser("ops", "Time each op against its baselines and the floor of its bytes.", EXAMPLES)
    selection = {
        "ops": (_some({op.name: op for op in OPS}), ", ".join(op.name for op in OPS)),
        "shape": (_shapes, "S/1/224 (model, stage, image) or BxCxHxW/hxw, separated by commas"),
        "batch": (_batches, "images, separated by commas"),
        "dtype": (_some({name: name for name in DTYPES}), ", ".join(DTYPES)),
        "mode": (_some({name: name for name in MODES}), "gradients: " + ", ".join(MODES)),
        "contenders": (_some({c.name: c for c in CONTENDERS}), ", ".join(c.name for c in CONTENDERS)),
    }
    flags: list[tuple[str, dict[str, Any]]] = [
        *((name, {"type": kind, "metavar": "LIST", "help": text}) for name, (kind, text) in selection.items()),
        ("format", {"choices": ("channels_last", "contiguous"), "default": "channels_last",
                    "help": "memory format of all but the authors' code, which runs in NCHW (default: %(default)s)"}),
        ("autocast", {"action": "store_true", "help": "float32 parameters and torch.autocast in --dtype"}),
        ("quick", {"action": "store_true", "help": "a few cases, about a minute"}),
        ("gate", {"action": "store_true", "help": "the correctness gate alone, no times"}),
        ("minutes", {"type": console.above_zero, "help": "when to stop (default: 8, with --quick 1)"}),
        ("official", {"type": Path, "metavar": "DIR", "help": "a checkout of the authors' repository to time"}),
        ("device", {"default": "cuda" if torch.cuda.is_available() else "cpu", "help": "(default: %(default)s)"}),
        ("out", {"type": Path, "metavar": "FILE", "help": "result file (default: bench/results/<gpu>/ops.json for a "
                 "full run on a GPU, none for a selection, --quick or on a CPU)"}),
    ]  # fmt: skip
    for name, settings in flags:
        parser.add_argument(f"--{name}", **settings)
    given = parser.parse_args(arguments)
    device = _device(given.device)
    on_gpu = device.type == "cuda"
    preset = (QUICK_ON_GPU if given.quick else ON_GPU) if on_gpu else (QUICK_ON_CPU if given.quick else ON_CPU)
    chosen = {name: preset[name] if getattr(given, name) is None else getattr(given, name) for name in preset}
    if given.autocast and "fp32" in chosen["dtype"]:
        if given.dtype:
            console.usage_error("--autocast: expected --dtype bf16 or fp16, got fp32")
        chosen["dtype"] = [name for name in chosen["dtype"] if name != "fp32"] or ["bf16"]
    narrowed = given.quick or any(getattr(given, name) is not None for name in selection)
    narrowed = narrowed or given.autocast or given.gate or given.official is not None or given.format != "channels_last"
    default = record.folder(device) / "ops.json" if on_gpu and not narrowed else None
    if given.out is not None and given.out.is_dir():
        console.usage_error(f"--out: expected a file, {given.out} is a directory")
    return Options(
        device, chosen["ops"], chosen["shape"], chosen["batch"], chosen["dtype"], chosen["mode"], chosen["contenders"],
        given.format == "channels_last", given.autocast, given.gate, chosen["minutes"], given.official,
        given.out or default,
    )  # fmt: skip


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        console.usage_error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and device.type != "cuda":
        console.usage_error(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        console.usage_error(f"--device: {name} is not there, torch sees {torch.cuda.device_count()} GPUs")
    return device


def plan(options: Options) -> list[Unit]:
    """The problems in the order of importance.

    The farther from bfloat16, batch 128, 224 pixels and the detached mode, the later. The headline cases (the first op,
    dtype, batch and mode at the two smaller images) come with all contenders; for the others compiling, which takes
    most of the time, waits until everything else is done.
    """
    problems: list[tuple[int, Op, Problem]] = []
    images = list(IMAGES)
    lists = enumerate(options.ops), enumerate(options.modes), enumerate(options.batches), enumerate(options.dtypes)
    for (op_at, op), (mode_at, mode), (batch_at, batch), (dtype_at, dtype) in itertools.product(*lists):
        if MODES[mode] and not op.associates:
            continue
        for shape in options.shapes:
            if shape.batch is not None and batch_at > 0:
                continue  # it brings its own batch
            image = shape.name.split("/")[-1]
            image_at = (0, 1, 3)[images.index(image)] if image in images else 0
            far = op_at + image_at + 2 * mode_at + 2 * batch_at + 3 * dtype_at
            problem = Problem(
                shape, shape.batch or batch, DTYPES[dtype], options.device, MODES[mode], options.channels_last,
                options.autocast,
            )  # fmt: skip
            problems.append((far if op_at == 0 else far + 1, op, problem))
    problems.sort(key=lambda entry: entry[0])  # stable: the rest stays in the order of the lists
    every, slow = options.contenders, [c for c in options.contenders if c.compiled]
    fast = [c for c in every if not c.compiled]
    headline = [Unit(op, problem, every) for far, op, problem in problems if far <= 1]
    others = [(op, problem) for far, op, problem in problems if far > 1]
    units = headline + [Unit(*other, fast) for other in others] + [Unit(*other, slow) for other in others]
    return [unit for unit in units if unit.contenders]
