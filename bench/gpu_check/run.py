"""What needs a GPU, in stages that each end inside nine minutes: first, second, tests, sanitizer, ops, training,
convergence.

Each stage ends with a table and leaves DIR/gpu-check-STAGE.json (environment, seconds, exit codes, counts) and the
output of its steps, DIR/STAGE-STEP.log. The benchmarks' result files go to DIR/<gpu>/, ready to be copied to
bench/results/. `first` is what to run on a GPU that is there for eight minutes, `second` again after a change; `all`
runs the others in order and stops after red tests. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.gpu_check import first, sanitizer
from bench.gpu_check.counts import extension_origin, pytest_counts
from bench.gpu_check.sanitizer import PYTEST, side_by_side
from bench.gpu_check.stage import RED, Stage
from bench.harness import console, record
from bench.harness.child import ROOT
from stvit.backends import build as building
from stvit.backends import extension

EXAMPLES = """\
examples:
  python -m bench.gpu_check first --out runs/gpu-check
  python -m bench.gpu_check second --out runs/gpu-check -- --ops gelu_depthwise
  python -m bench.gpu_check all --out runs/gpu-check
  python -m bench.gpu_check convergence --out runs/gpu-check --data photographs    DIR/{train,val}/CLASS/*.jpg
  python -m bench.gpu_check training --out runs/gpu-check -- --models stvit_base   to the benchmark, for --quick
  python -m bench.gpu_check ops --out runs/gpu-check --on-cpu                      reduced: does the tool work?

exit codes: 0 all passed, 1 something failed or ran out of time, 2 no GPU or a wrong command line
"""

# Of tests/, what needs packages beside torch, triton, timm, pytest and hypothesis: left out, saying so, without them.
PICTURES, PACKAGES = ("train", "model/test_visualize.py"), ("torchvision", "sklearn", "matplotlib", "PIL")
ON_CPU_TESTS = ("tests/host/test_conftest.py", "tests/kernels/test_sampling.py", "-k", "test_conftest or 1x7x1x1")


def build(stage: Stage) -> None:
    """Finds the CUDA extension, or builds it once for all stages; skipped, saying why, where a tool is missing."""
    if not stage.on_gpu:
        stage.skip("build", "no GPU")
        return
    missing = building.obstacles()
    if missing and not extension.ready():
        stage.skip("build", f"the CUDA extension is left out: {'; '.join(missing)}")
    else:
        stage.step("build", [sys.executable, "-m", "stvit.info", "--build"], extension_origin)


def tests(stage: Stage) -> None:
    """All but tests/host and tests/fuzz, which learn nothing from a GPU; steps run without TRITON_INTERPRET."""
    command = [*PYTEST, *ON_CPU_TESTS]
    if stage.on_gpu:
        lacking = [package for package in PACKAGES if not importlib.util.find_spec(package)]
        for name in PICTURES if lacking else ():
            stage.skip(name, f"{', '.join(lacking)} not installed")
        left_out = ["host", "fuzz", *(PICTURES if lacking else ())]
        command = [*PYTEST, "tests", *(f"--ignore=tests/{name}" for name in left_out), *side_by_side()]
    row = stage.step("pytest", [*command, *stage.extra], pytest_counts)
    if row["status"] == "passed" and not row.get("passed"):
        row.update(status="failed", note="no test passed")


def benchmark(stage: Stage) -> None:
    """A benchmark of bench/ with the stage's time as its budget; --quick on a CPU."""
    path = stage.out / record.folder(stage.device).name / f"{stage.name}.json"
    shown = Path(os.path.relpath(path, ROOT)) if path.is_relative_to(ROOT) else path  # it ends up in the result file
    flags = ["--device", stage.device.type]
    # Started processes, compilations and tests under way may overrun the budget.
    flags += ["--minutes", f"{stage.left / 60 - 0.75:.1f}"] if stage.on_gpu else []
    flags += stage.extra or ([] if stage.on_gpu and stage.name != "training" else ["--quick"])
    row = first.measure(stage, "bench", [stage.name, *flags], shown)
    if row["status"] == "passed" and not row.get("rows"):
        row.update(status="failed", note="no rows were recorded")


STAGES: dict[str, Callable[[Stage], None]] = {
    "tests": tests,
    "sanitizer": sanitizer.sanitizer,
    "ops": benchmark,
    "training": benchmark,
    "convergence": benchmark,
}
SHORT: dict[str, Callable[[Stage], None]] = {"first": first.first, "second": first.second}


def check(name: str, out: Path, device: torch.device, extra: Sequence[str] = ()) -> Stage:
    """Runs one stage, writes its file whatever happens, and returns it."""
    stage = Stage(name, out, device, extra)
    try:
        if name in SHORT:
            SHORT[name](stage)
            return stage
        build(stage)
        if stage.status not in RED:
            STAGES[name](stage)
    finally:
        stage.finish()
    return stage


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("gpu_check", __doc__, EXAMPLES)
    names = ", ".join((*SHORT, *STAGES))
    parser.add_argument("stage", choices=(*SHORT, *STAGES, "all"), metavar="STAGE", help=f"{names}, or all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for reports, logs, result files")
    parser.add_argument("--data", type=Path, metavar="DIR", help="images for convergence, by default the tool's own")
    parser.add_argument("--on-cpu", action="store_true", help="reduced stages on the CPU, to try the program itself")
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [-- FLAGS of pytest or the benchmark]"
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options, own = parser.parse_args(given[:end]), given[end + 1 :]
    if own and options.stage in ("all", "sanitizer", "first"):
        console.usage_error(f"{' '.join(own)}: only a stage of tests or of one benchmark takes flags of its own")
    if options.data is not None and not options.data.is_dir():
        console.usage_error(f"--data: {options.data} is not a folder")
    if not options.on_cpu and not torch.cuda.is_available():
        console.usage_error("no CUDA device found; --on-cpu runs reduced stages on the CPU")
    device = torch.device("cpu" if options.on_cpu else "cuda")
    if device.type == "cuda":
        os.environ.pop("TORCH_CUDA_ARCH_LIST", None)  # the extension is built for this GPU alone, which is sooner done
    return run(list(STAGES) if options.stage == "all" else [options.stage], options, device, own)


def run(wanted: Sequence[str], options: argparse.Namespace, device: torch.device, own: Sequence[str]) -> int:
    """The stages in their order; after red tests no further one."""
    red = []
    for name in wanted:
        data = ["--data", str(options.data.resolve())] if options.data is not None and name == "convergence" else []
        if check(name, options.out.resolve(), device, [*own, *data]).status in RED:
            red.append(name)
            if name == "tests" and len(wanted) > 1:
                console.say("the tests are red: no further stage is run")
                break
    if len(wanted) > 1:
        console.say(f"red: {', '.join(red)}" if red else "all stages passed")
    return 1 if red else 0
