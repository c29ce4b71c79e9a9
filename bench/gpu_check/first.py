"""The stages `first` and `second`: what a few minutes of GPU are for, most valuable first, each part with a time limit.

No part stops the rest, and each leaves its files as soon as it ends. While the extension is built and the compiled
kernels are counted (bench.machine needs no GPU) the parts that need neither run. `second` repeats, for what changed,
what needs the GPU: flags after `--` go to bench.ops, `-- --ops gelu_depthwise` say.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu_check import sanitizer
from bench.gpu_check.counts import extension_origin, row_counts
from bench.gpu_check.stage import LIMIT as A_STAGE
from bench.gpu_check.stage import Row, Stage, Step
from bench.harness import record
from bench.machine.gpus import GPUS
from stvit.backends import build as building
from stvit.backends import extension as built

LIMIT = 480.0
PATIENCE = 3  # times as long, limits and all, on a CPU
OPS = "core,gelu_depthwise,channel_layer_norm,residual_branch"
SHAPES = "S/1/224,S/2/224"
SMALL = f"--device cpu --shape 2x8x8x8/4x4 --dtype fp32 --ops {OPS} --mode detached"


class Part(NamedTuple):
    """A run of a benchmark: its program, its flags on a GPU and, to try it, on a CPU. `table`: the name of its file
    where that makes a table; what times or checks one side alone makes none."""

    program: str
    on_gpu: str
    on_cpu: str = ""
    table: str = ""


PARTS = {
    # Every Triton kernel at real shapes, in every dtype that models run in, held to float64; nothing is timed.
    "numbers": Part(
        "ops", f"--shape {SHAPES},B/1/224 --batch 32 --contenders triton --gate", f"{SMALL} --contenders triton --gate"
    ),
    # The ops that a step's time depends on, timed beside the authors', eager and compiled.
    "ops": Part(
        "ops",
        f"--ops {OPS} --shape {SHAPES} --batch 128 --dtype bf16 --mode detached "
        "--contenders 'triton,authors,authors compiled'",
        f"{SMALL} --contenders reference,authors",
        "ops",
    ),
    # Training step and inference of stvit_small at 224, and the kernels of each by torch.profiler.
    "models": Part(
        "training",
        "--quick --seconds 1 --profile --contenders ours-triton ours-graph ours-compile",
        "--quick --device cpu --profile --contenders ours-reference authors",
        "training",
    ),
    # The extension's numbers and times; its ops alone.
    "extension": Part(
        "ops", f"--ops core,sampling,upsampling --shape {SHAPES} --batch 128 --dtype bf16,fp16 --contenders cuda"
    ),
}
AUTHORS = ("authors", "authors-compile")  # beside ours in the first stage
# The seconds that each part may take: seven and a half minutes together.
SECONDS = {"numbers": 75, "ops": 85, "models": 140, "extension": 60, "kernels": 15, "memcheck": 35, "racecheck": 35}


def first(stage: Stage) -> None:
    _parts(stage, AUTHORS if stage.on_gpu else ())
    memory(stage)


def second(stage: Stage) -> None:
    _parts(stage, ())


def _parts(stage: Stage, contenders: Sequence[str]) -> None:
    stage.limit = LIMIT if stage.on_gpu else LIMIT * PATIENCE
    build, counting = extension_build(stage), costs(stage)
    try:
        part(stage, "numbers", *(stage.extra if stage.on_gpu else ()))
        part(stage, "ops", *stage.extra)
        part(stage, "models", *contenders)
        extension(stage, build)
        kernels(stage, counting)
    finally:
        for background in filter(None, (build, counting)):
            background.child.kill()


def measure(
    stage: Stage, step: str, command: Sequence[str], out: Path,
    environment: dict[str, str] | None = None, seconds: float = A_STAGE,
) -> Row:  # fmt: skip
    """A step by a program of bench/, with the rows of its result file."""
    out.unlink(missing_ok=True)  # an earlier run's rows must not pass for this one's
    whole = [sys.executable, "-m", f"bench.{command[0]}", *command[1:], "--out", str(out)]
    return stage.step(step, whole, lambda _: row_counts(out), environment, seconds)


def _seconds(stage: Stage, step: str) -> float:
    return SECONDS[step] * (1 if stage.on_gpu else PATIENCE)


def _file(stage: Stage, name: str) -> Path:
    """In the GPU's folder, from which tables are made."""
    return stage.out / record.folder(stage.device).name / f"{name}.json"


def part(stage: Stage, name: str, *more: str) -> None:
    """One of PARTS, with further flags."""
    program, on_gpu, on_cpu, table = PARTS[name]
    flags = [*shlex.split(on_gpu if stage.on_gpu else on_cpu), *more]
    flags += ["--minutes", f"{SECONDS[name] / 60 - 0.3:.2f}"] if stage.on_gpu else []
    out = _file(stage, table) if table else stage.out / f"{name}.json"
    environment = {} if stage.on_gpu else {"TRITON_INTERPRET": "1"}
    measure(stage, name, [program, *flags], out, environment, _seconds(stage, name))


def extension_build(stage: Stage) -> Step | None:
    if not stage.on_gpu or (building.obstacles() and not built.ready()):
        return None
    return Step(stage, "build", [sys.executable, "-m", "stvit.info", "--build"])


def costs(stage: Stage) -> Step:
    """What the kernels of a step cost by count, on the GPU at hand where the table of GPUs has it."""
    flags = ["--model", "stvit_tiny", "--batch", "2", "--size", "64"]
    if stage.on_gpu:
        here = torch.cuda.get_device_name(stage.device)
        flags = ["--model", "stvit_small", "--gpu", next((name for name in GPUS if name in here), "H100")]
    command = [sys.executable, "-m", "bench.machine", *flags, "--json", str(stage.out / "machine.json")]
    return Step(stage, "costs", command)


def extension(stage: Stage, build: Step | None) -> None:
    """The extension's numbers and times, once it is built; its ops alone."""
    if build is None:
        stage.skip("extension", "no GPU, or a tool to build it with is missing")
        return
    if build.end(SECONDS["extension"], extension_origin)["status"] != "passed":
        stage.skip("extension", "it was not built in time, or does not compile")
        return
    part(stage, "extension")


def kernels(stage: Stage, counting: Step) -> None:
    """Each kernel's time in a training step beside what bench.machine counts for it."""
    if counting.end(_seconds(stage, "kernels"))["status"] != "passed":
        stage.skip("kernels", "the compiled kernels were not counted in time")
        return
    files = [str(_file(stage, "training")), str(stage.out / "machine.json")]
    measure(stage, "kernels", ["predict.error", *files], _file(stage, "kernels"), seconds=_seconds(stage, "kernels"))


def memory(stage: Stage) -> None:
    """compute-sanitizer's memcheck and racecheck on the smallest cases."""
    program = sanitizer.find()
    for check in ("memcheck", "racecheck"):
        if program is None or not stage.on_gpu:
            stage.skip(check, sanitizer.NOT_FOUND if stage.on_gpu else "no GPU")
        else:
            sanitizer.watch(stage, program, check, SECONDS[check], *sanitizer.SMALLEST)
