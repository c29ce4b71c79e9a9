"""The stages `first` and `second`: what a few minutes of GPU are for, most valuable first, each part with a time limit.

No part stops the rest, and each leaves its files as soon as it ends. While the extension is built and the compiled
kernels are counted (bench.machine needs no GPU) the parts that need neither run. `second` repeats, for what changed,
what needs the GPU: flags after `--` go to bench.ops, `-- --ops gelu_depthwise` say.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu_check import run
from bench.gpu_check.stage import Background, Stage
from bench.harness import record
from bench.machine.gpus import GPUS
from stvit.backends import build as building
from stvit.backends import extension as built

# Parts and the seconds that each may take: seven and a half minutes together.
SECONDS = {"numbers": 75, "ops": 85, "models": 140, "extension": 60, "kernels": 15, "memcheck": 35, "racecheck": 35}
LIMIT = 480.0
PATIENCE = 3  # times as long, limits and all, on a CPU
OPS = "core,gelu_depthwise,channel_layer_norm,residual_branch"
SHAPES = "S/1/224,S/2/224"
INTERPRETED = {"TRITON_INTERPRET": "1"}
ON_CPU = ["--device", "cpu", "--shape", "2x8x8x8/4x4", "--dtype", "fp32"]
CONTENDERS = ("authors", "ours-triton", "ours-graph", "ours-compile", "authors-compile")
CHANGED = ("ours-triton", "ours-graph", "ours-compile")  # in the second stage


def first(stage: Stage) -> None:
    _parts(stage, CONTENDERS)


def second(stage: Stage) -> None:
    _parts(stage, CHANGED)


def _parts(stage: Stage, contenders: Sequence[str]) -> None:
    stage.limit = LIMIT if stage.on_gpu else LIMIT * PATIENCE
    build, counting = extension_build(stage), costs(stage)
    try:
        numbers(stage)
        ops(stage)
        models(stage, contenders)
        extension(stage, build)
        kernels(stage, counting)
        if stage.name == "first":
            memory(stage)
    finally:
        for background in filter(None, (build, counting)):
            background.kill()


def extension_build(stage: Stage) -> Background | None:
    if not stage.on_gpu or (building.obstacles() and not built.ready()):
        return None
    return Background(stage, "build", [sys.executable, "-m", "stvit.info", "--build"])


def _allowed(stage: Stage, step: str) -> float:
    return SECONDS[step] * (1 if stage.on_gpu else PATIENCE)


def _module(name: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"bench.{name}", *flags]


def _file(stage: Stage, name: str) -> Path:
    return stage.out / record.folder(stage.device).name / f"{name}.json"


def costs(stage: Stage) -> Background:
    """What the kernels of a step cost by count, on the GPU at hand where the table of GPUs has it."""
    flags = ["--model", "stvit_tiny", "--batch", "2", "--size", "64"]
    if stage.on_gpu:
        here = torch.cuda.get_device_name(stage.device)
        flags = ["--model", "stvit_small", "--gpu", next((name for name in GPUS if name in here), "H100")]
    return Background(stage, "costs", _module("machine", *flags, "--json", str(costs_file(stage))))


def costs_file(stage: Stage) -> Path:
    return stage.out / "machine.json"


def _bench_ops(stage: Stage, step: str, *flags: str, environment: dict[str, str] | None = None) -> None:
    """One part by bench.ops. Its file goes to the GPU's folder, from which tables are made, where it times both sides;
    a second file of the same measurements has no place there."""
    path = _file(stage, step) if step == "ops" else stage.out / f"{step}.json"
    budget = ["--minutes", f"{SECONDS[step] / 60 - 0.3:.2f}"] if stage.on_gpu else []
    path.unlink(missing_ok=True)  # an earlier run's rows must not pass for this one's
    command = _module("ops", *flags, *budget, "--out", str(path))
    row = stage.step(step, command, environment=environment, seconds=_allowed(stage, step))
    row.update(run.row_counts(path))
    stage.write()


def numbers(stage: Stage) -> None:
    """Every Triton kernel at real shapes, in every dtype that models run in, held to float64; nothing is timed."""
    if not stage.on_gpu:
        small = [*ON_CPU, "--ops", OPS, "--mode", "detached"]
        _bench_ops(stage, "numbers", *small, "--contenders", "triton", "--gate", environment=INTERPRETED)
        return
    _bench_ops(
        stage,
        "numbers",
        "--shape",
        f"{SHAPES},B/1/224",
        "--batch",
        "32",
        "--contenders",
        "triton",
        "--gate",
        *stage.extra,
    )


def ops(stage: Stage) -> None:
    """The ops that a step's time depends on, timed beside the authors', eager and compiled."""
    where = [*ON_CPU, "--ops", OPS, "--contenders", "reference,authors"]
    if stage.on_gpu:
        where = ["--ops", OPS, "--shape", SHAPES, "--batch", "128", "--dtype", "bf16"]
        where += ["--contenders", "triton,authors,authors compiled"]
    _bench_ops(stage, "ops", *where, "--mode", "detached", *stage.extra)


def models(stage: Stage, contenders: Sequence[str]) -> None:
    """Training step and inference of stvit_small at 224, and the kernels of each by torch.profiler."""
    path, profile = _file(stage, "training"), stage.out / "profile.json"
    flags = ["--device", "cpu", "--quick", "--contenders", "authors", "ours-reference"]
    if stage.on_gpu:
        flags = ["--quick", "--seconds", "1", "--minutes", f"{SECONDS['models'] / 60 - 0.3:.2f}"]
        flags += ["--contenders", *contenders]
    path.unlink(missing_ok=True)
    command = _module("training", *flags, "--profile", str(profile), "--out", str(path))
    row = stage.step("models", command, seconds=_allowed(stage, "models"))
    row.update(run.row_counts(path))
    stage.write()


def extension(stage: Stage, build: Background | None) -> None:
    """The extension's numbers and times, once it is built; its ops alone."""
    if build is None:
        stage.skip("extension", "no GPU, or a tool to build it with is missing")
        return
    if build.end(SECONDS["extension"], run.extension_origin)["status"] != "passed":
        stage.skip("extension", "it was not built in time, or does not compile")
        return
    flags = ["--ops", "core,sampling,upsampling", "--shape", SHAPES, "--batch", "128", "--dtype", "bf16,fp16"]
    _bench_ops(stage, "extension", *flags, "--contenders", "cuda")


def kernels(stage: Stage, counting: Background) -> None:
    """Each kernel's time in a training step beside what bench.machine counts for it."""
    if counting.end(_allowed(stage, "kernels"))["status"] != "passed":
        stage.skip("kernels", "the compiled kernels were not counted in time")
        return
    files = [str(stage.out / "profile.json"), str(costs_file(stage)), "--out", str(_file(stage, "kernels"))]
    row = stage.step("kernels", _module("predict.error", *files), seconds=_allowed(stage, "kernels"))
    row.update(run.row_counts(_file(stage, "kernels")))
    stage.write()


def memory(stage: Stage) -> None:
    """compute-sanitizer's memcheck and racecheck on the smallest cases."""
    cases = _module("gpu_check.sanitizer_cases", "--only", run.ON_CPU_CASES)
    if not stage.on_gpu:
        stage.step(
            "memcheck", [*cases, "--device", "cpu"], run.case_counts, INTERPRETED, seconds=_allowed(stage, "memcheck")
        )
        stage.skip("racecheck", "no GPU")
        return
    program = run.find_sanitizer()
    for check in ("memcheck", "racecheck"):
        if program is None:
            stage.skip(check, "compute-sanitizer is not on the PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin")
            continue
        command = [program, "--tool", check, *run.SANITIZER_OPTIONS, *cases]
        stage.step(check, command, lambda output: run.sanitizer_counts(output, "cases: "), seconds=SECONDS[check])
