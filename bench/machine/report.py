"""What each Triton kernel of a training step costs, counted on an emulator of its compiled code; no GPU is needed.

    python -m bench.machine                              stvit_small, and the block's ops of stvit_base and stvit_large
    python -m bench.machine --model stvit_base --size 384 --inference
    python -m bench.machine --capability 80 --gpu "RTX 4090" --json costs.json
    python -m bench.machine --record                     rewrite the ceiling that the tests hold the kernels to

Each column of microseconds is the time that one limit of the GPU alone takes for one launch, so the largest is a lower
bound. Counted and modelled, not timed: docs/machine.md says how.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from bench.harness import console, record
from bench.machine import cost
from bench.machine.cost import LIMITS, Cost
from bench.machine.gpus import COUNTED_AS, DEFAULT, GPU, GPUS
from bench.machine.replay import Recorded
from stvit.backends.registry import BLOCK_OPS
from stvit.model import CONFIGS

CEILING = Path(__file__).with_name("ceiling.json")
DOCUMENT = Path(__file__).parents[2] / "docs" / "machine.md"
LISTED = 16  # kernels of the document's table, those that take most of a step
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDER = ("stvit_base", "stvit_large")  # whose block's ops are listed beside the default model
HEADER = [
    "kernel", "launches", "registers", "warps/SM", "waves", "Minstr", "PTX", "loads", "stores", "banks", "MB", "MB L2",
    *LIMITS, "bound", "us a step",
]  # fmt: skip


def of_block(launched: Recorded) -> bool:
    """Whether it is a kernel of the block's ops: depthwise, LayerNorm, branch."""
    return any(launched.op.startswith(op) for op in BLOCK_OPS)


def examine(args: argparse.Namespace) -> dict[str, list[Cost]]:
    """Costs by model."""
    launches = {args.model or "stvit_small": _launches(args.model or "stvit_small", args)}
    if args.model is None and not args.record:
        launches |= {model: [each for each in _launches(model, args) if of_block(each)] for model in WIDER}
    costs = cost.measured(sum(launches.values(), []), batch=args.batch, capability=args.capability)
    return {model: cost.tally(recorded, costs) for model, recorded in launches.items()}


def _launches(model: str, args: argparse.Namespace) -> list[Recorded]:
    return cost.launches(
        model, batch=args.batch, size=args.size, dtype=DTYPES[args.dtype], autocast=args.autocast,
        inference=args.inference,
    )  # fmt: skip


def show(title: str, costs: list[Cost], gpu: GPU) -> None:
    rows = [_row(each, gpu) for each in sorted(costs, key=lambda each: -each.launches * each.bound(gpu)[1])]
    total = sum(each.launches * each.bound(gpu)[1] for each in costs)
    launches = sum(each.launches for each in costs)
    rows.append(["total", str(launches), *[""] * (len(HEADER) - 3), f"{total * 1e6:.0f}"])
    console.table(title, HEADER, rows)


def _row(each: Cost, gpu: GPU) -> list[str]:
    worst, seconds = each.bound(gpu)
    limits = each.limits(gpu)
    return [
        each.name, str(each.launches), f"{each.registers}{'!' if each.stack else ''}",
        str(each.resident(gpu) * each.warps), f"{each.waves(gpu):.1f}", f"{each.instructions / 1e6:.2f}",
        f"{each.ptx / 1e6:.2f}", *(_share(*pair) for pair in (each.loads, each.stores, each.wavefronts)),
        f"{(each.bytes_read + each.bytes_written) / 1e6:.1f}", f"{each.l2_bytes / 1e6:.1f}",
        *(f"{limits[name] * 1e6:.1f}" for name in LIMITS), worst, f"{each.launches * seconds * 1e6:.0f}",
    ]  # fmt: skip


def _share(found: float, best: float) -> str:
    return f"{100 * best / found:.0f} %" if found else "-"


def ceilings(costs: list[Cost], gpu: GPU) -> dict[str, dict[str, Any]]:
    """By kernel: launches of a step, the worst limit and its microseconds, rounded up, and those of DRAM alone. Kernels
    of one name are told apart by primes."""
    found: dict[str, dict[str, Any]] = {}
    for each in costs:
        name = each.name
        while name in found:
            name += "'"
        limit, seconds = each.bound(gpu)
        dram = _microseconds(each.limits(gpu)["DRAM"])
        found[name] = {"launches": each.launches, "limit": limit, "us": _microseconds(seconds), "dram_us": dram}
    return found


def _microseconds(seconds: float) -> float:
    return math.ceil(seconds * 1e8) / 100


def write_ceiling(costs: list[Cost], args: argparse.Namespace, gpu: GPU) -> None:
    """Records what the kernels cost at present as the most that they may cost from now on, and documents it."""
    before = json.loads(CEILING.read_text()) if CEILING.exists() else {"step_us": None, "kernels": {}}
    settings = {name: getattr(args, name) for name in ("batch", "size", "dtype", "capability")}
    found = ceilings(costs, gpu)
    total = math.ceil(sum(kernel["launches"] * kernel["us"] for kernel in found.values()))
    content = {
        "command": "python -m bench.machine --record", "triton": triton.__version__, "model": "stvit_small",
        **settings, "gpu": gpu.name, "step_us": total, "kernels": found,
    }  # fmt: skip
    record.write_json(CEILING, content)
    for name in sorted(found.keys() | before["kernels"].keys()):
        old, new = (kernels.get(name, {}).get("us", "none") for kernels in (before["kernels"], found))
        if old != new:
            console.say(f"{name}: {old} -> {new} us")
    console.say(f"a step: {before['step_us']} -> {total} us")
    with record.written(DOCUMENT) as partial:
        partial.write_text(documented(DOCUMENT.read_text(), content))


def documented(text: str, recorded: dict[str, Any]) -> str:
    """The document with the table of a recorded ceiling between its marks."""
    begin, end = "<!-- costs:begin -->\n", "<!-- costs:end -->"
    kernels = [(name, k, k["launches"] * k["us"]) for name, k in recorded["kernels"].items()]
    kernels.sort(key=lambda row: -row[2])
    settings = ("model", "batch", "size", "dtype", "gpu")
    model, batch, size, dtype, gpu = (recorded[name] for name in settings)
    others = kernels[LISTED:]
    rest_us = sum(us for *_, us in others)
    lines = [
        f"{model}, batch {batch}, {size} x {size}, {dtype}, limits of one {gpu}:",
        "",
        "| kernel | launches | bound by | us | us by DRAM alone | us a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, k, us in kernels[:LISTED]:
        lines.append(f"| {name} | {k['launches']} | {k['limit']} | {k['us']:.1f} | {k['dram_us']:.1f} | {us:.0f} |")
    lines.append(f"| {len(others)} others | {sum(k['launches'] for _, k, _ in others)} | | | | {rest_us:.0f} |")
    lines.append(f"| total | {sum(k['launches'] for _, k, _ in kernels)} | | | | {recorded['step_us']} |")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return before + begin + "\n".join(lines) + "\n" + end + after


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m bench.machine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(CONFIGS), help="only this one, all its kernels")
    parser.add_argument("--batch", type=console.positive, default=128, metavar="N", help="images of a step (128)")
    parser.add_argument("--size", type=console.positive, default=224, metavar="N", help="pixels a side (224)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations and weights (bfloat16)")
    parser.add_argument("--autocast", action="store_true", help="float32 weights, autocast to --dtype, as one trains")
    parser.add_argument("--inference", action="store_true", help="a forward pass in evaluation mode, not a step")
    parser.add_argument(
        "--capability", type=int, choices=sorted(set(COUNTED_AS.values())), help="whose code is counted (the GPU's; 90)"
    )
    parser.add_argument("--gpu", choices=GPUS, help="whose limits (H100, or A100 with --capability 80)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every count to FILE")
    parser.add_argument("--record", action="store_true", help=f"only write {CEILING.name} and {DOCUMENT.name}")
    args = parser.parse_args(arguments)
    args.capability = args.capability or (COUNTED_AS[GPUS[args.gpu].capability] if args.gpu else 90)
    args.gpu = args.gpu or DEFAULT[args.capability]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if torch.version.cuda is None:
        console.usage_error("this PyTorch is built without CUDA, whose ops are traced; no GPU is needed")
    gpu = GPUS[args.gpu]
    found = examine(args)
    if args.record:
        write_ceiling(found["stvit_small"], args, gpu)
        return 0
    run = "forward pass" if args.inference else "step"
    for model, costs in found.items():
        part = "" if args.model or model == "stvit_small" else ", the block's ops"
        show(
            f"{model}{part}: kernels of a {run}, batch {args.batch}, {args.size} x {args.size}, {args.dtype}, code for "
            f"{args.capability / 10}; microseconds of a launch by each limit of one {gpu.name}, counted and modelled",
            costs, gpu,
        )  # fmt: skip
    if args.json:
        settings: dict[str, Any] = {name: value for name, value in vars(args).items() if name not in ("json", "record")}
        rows = [
            {"model": model, **each.as_dict(), "limits": each.limits(gpu)} for model in found for each in found[model]
        ]
        record.write(args.json, "machine", torch.device("cpu"), rows, settings=settings)
        console.say(f"written: {args.json}")
    return 0
