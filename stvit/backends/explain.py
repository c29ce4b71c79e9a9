"""Which kernels a shape gets, and how they are laid out, as `python -m stvit.info --explain` prints it.

The CUDA side is asked of the extension itself, which plans on any machine (csrc/plan.cpp); no GPU is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from typing import Any, NamedTuple

import torch

from ..geometry import grid_size
from . import extension

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
MAPS = ("associate", "weighted", "products", "differentiate")  # the order of csrc/plan.h
# What each op goes through: a map from pixels to super tokens, or super tokens spread over pixels.
STEPS = {
    "sampling": ("associate",),
    "sampling_backward": ("spread",),
    "sampling_backward_full": ("differentiate", "spread"),
    "upsampling": ("spread",),
    "upsampling_backward": ("weighted",),
    "upsampling_backward_full": ("products",),
}
SPREAD_CHANNELS = 1024  # csrc/spread.cuh


class Shape(NamedTuple):
    """Pixels (batch, channels, height, width) in tiles of h x w."""

    batch: int
    channels: int
    height: int
    width: int
    h: int
    w: int

    def __str__(self) -> str:
        return "{}x{}x{}x{}/{}x{}".format(*self)


class Gpu(NamedTuple):
    """A GPU's multiprocessors, and the bytes of shared memory that one block of threads can have."""

    name: str
    multiprocessors: int
    shared_bytes: int


GPUS = {
    "a100": Gpu("NVIDIA A100", 108, 166912),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 82, 101376),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 128, 101376),
    "h100": Gpu("NVIDIA H100", 132, 232448),
    "h200": Gpu("NVIDIA H200", 132, 232448),
    "b200": Gpu("NVIDIA B200", 148, 232448),
}


def parse_shape(text: str) -> Shape:
    """128x64x56x56/8x8 (B, C, H, W and the tile), or one number for a square tile. ValueError for anything else."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)/(\d+)(?:x(\d+))?", text)
    numbers = [int(number) for number in found.groups(found[5])] if found else [0]
    if min(numbers) < 1:
        raise ValueError(f"expected BxCxHxW/hxw, all at least 1, as 128x64x56x56/8x8, got {text!r}")
    if max(numbers) >= 2**31 or math.prod(numbers[:4]) >= 2**60:
        raise ValueError(f"expected a size that memory could hold, got {text!r}")
    return Shape(*numbers)


def default_gpu() -> Gpu:
    """The current GPU; the H100 where there is none."""
    if not torch.cuda.is_available():
        return GPUS["h100"]
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def explain(shape: Shape, dtype: str, gpu: Gpu) -> dict[str, Any]:
    """What the CUDA extension and Triton launch for pixels of this shape in channels_last, as plain data."""
    return {
        "shape": str(shape),
        "dtype": dtype,
        "gpu": gpu._asdict(),
        "cuda": _cuda(shape, DTYPES[dtype], gpu),
        "triton": _triton(shape, DTYPES[dtype]),
    }


def _cuda(shape: Shape, dtype: torch.dtype, gpu: Gpu) -> dict[str, Any]:
    if not extension.ready():
        reasons = extension.why_not() or ["it is not built yet: python -m stvit.info --build builds it"]
        return {"reasons": reasons, "steps": []}
    steps = [
        {"op": op, **(_spread(shape, dtype) if step == "spread" else _walk(step, shape, dtype, gpu))}
        for op, names in STEPS.items()
        for step in names
    ]
    return {"reasons": [], "steps": steps}


def _walk(step: str, shape: Shape, dtype: torch.dtype, gpu: Gpu) -> dict[str, Any]:
    pools = step == "associate"  # the first round; later ones are given their super tokens
    limits = (gpu.multiprocessors, gpu.shared_bytes)
    plan = extension.load().plan(MAPS.index(step), pools, step == "differentiate", *shape, dtype.itemsize, *limits)
    if not plan["fits"]:
        kernels = ["pooling_kernel"] * pools + ["weigh_kernel"] * (step != "weighted") + ["sum_kernel"]
        return {"kernels": kernels, "path": "general", "why": _why_general(shape, dtype)}
    if not pools:
        path = "fast"
    else:
        path = "single pass" if plan["pools"] else "two passes"
    kernels = ["pooling_kernel"] * (path == "two passes") + ["walk_kernel"]
    return {"kernels": kernels, "path": path, **{name: plan[name] for name in plan if name not in ("fits", "pools")}}


def _why_general(shape: Shape, dtype: torch.dtype) -> str:
    if dtype.itemsize > 4:
        return "the fast kernel is for 16- and 32-bit numbers"
    if shape.channels % (16 // dtype.itemsize):
        return f"the channels are no multiple of {16 // dtype.itemsize}"
    return "the channels or the tiles are too large for the fast kernel"


def _spread(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    if dtype.itemsize == 2 and shape.channels % 8 == 0 and shape.channels <= SPREAD_CHANNELS:
        return {"kernels": ["spread_kernel"], "path": "fast", "reads": 0.0}
    if dtype.itemsize == 4 and shape.channels % 4 == 0:
        return {"kernels": ["spread_single_kernel"], "path": "fast", "reads": 0.0}
    return {"kernels": ["tokens_to_pixels_kernel"], "path": "general", "why": _why_general(shape, dtype)}


def _triton(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        return {"reasons": ["the package triton is not installed"]}
    configs = importlib.import_module("stvit.kernels.configs")
    blocks = configs.blocks(torch.empty(shape[:4], dtype=dtype, device="meta"), shape.h * shape.w)
    gh, gw = grid_size(shape.height, shape.width, (shape.h, shape.w))
    run = configs.run_length(shape.batch, gh, gw)
    return {"reasons": [], **blocks._asdict(), "held": blocks.held, "whole": blocks.whole(shape.channels), "run": run}


def as_text(told: dict[str, Any]) -> str:
    """What `explain` returns, for reading."""
    gpu = Gpu(**told["gpu"])
    lines = [
        f"{told['shape']} (BxCxHxW/hxw) in {told['dtype']}, channels_last, on {gpu.name}:"
        f" {gpu.multiprocessors} multiprocessors, {gpu.shared_bytes / 1024:.0f} KiB of shared memory a block",
        "",
        "cuda",
        *(f"  - {reason}" for reason in told["cuda"]["reasons"]),
    ]
    op = ""
    for step in told["cuda"]["steps"]:
        lines.append(f"  {step['op'] if step['op'] != op else '':<26}{' + '.join(step['kernels'])}: {step['path']}")
        lines += [f"  {'':<26}{line}" for line in _details(step, gpu)]
        op = step["op"]
    lines += ["", "triton", *(f"  - {reason}" for reason in told["triton"]["reasons"])]
    if not told["triton"]["reasons"]:
        lines.append("  programs hold {pixels} pixels x {held} channels in {warps} warps".format(**told["triton"]))
        lines.append(f"  and sum along {told['triton']['run']} of the tiles in a row of the grid")
        if not told["triton"]["whole"]:
            lines.append(
                "  pixels have more channels than that: they are read once for the products, once for the sums"
            )
    return "\n".join(lines)


def _details(step: dict[str, Any], gpu: Gpu) -> list[str]:
    if "why" in step:
        return [f"because {step['why']}"]
    if "regions" not in step:
        return ["pixels are written once, and not read"]
    waves = step["regions"] / gpu.multiprocessors
    return [
        f"{step['regions']} blocks, {waves:.2f} a multiprocessor, each {step['rows']} x {step['columns']} super tokens",
        f"{step['group']} tiles at a time, {step['ahead']} x {step['group']} ahead on their way to shared memory;"
        f" {step['shared_bytes'] / 1024:.1f} KiB of it",
        f"pixels are read {step['reads']:.2f} times",
    ]
