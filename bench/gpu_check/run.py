"""What needs a GPU, in stages that each end inside nine minutes: first, second, tests, sanitizer, ops, training,
convergence.

Each stage ends with a table and leaves DIR/gpu-check-STAGE.json (environment, seconds, exit codes, counts) and the
output of its steps, DIR/STAGE-STEP.log. The benchmarks' result files go to DIR/<gpu>/, ready to be copied to
bench/results/. `first` is what to run on a GPU that is there for eight minutes, `second` again after a change; `all`
runs the others in order and stops after red tests. Nothing is fetched from a network.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.stage import RED, ROOT, Stage
from bench.harness import console, record
from stvit.backends import build as building
from stvit.backends import extension

EXAMPLES = """\
examples:
  python -m bench.gpu_check first --out runs/gpu-check
  python -m bench.gpu_check second --out runs/gpu-check -- --ops gelu_depthwise
  python -m bench.gpu_check tests --out runs/gpu-check
  python -m bench.gpu_check all --out runs/gpu-check
  python -m bench.gpu_check convergence --out runs/gpu-check --data photographs    DIR/{train,val}/CLASS/*.jpg
  python -m bench.gpu_check training --out runs/gpu-check -- --models stvit_base   to the benchmark, for --quick
  python -m bench.gpu_check ops --out runs/gpu-check --on-cpu                      reduced: does the tool work?

exit codes: 0 all passed, 1 something failed or ran out of time, 2 no GPU or a wrong command line
"""

# Folders and files of tests/ that need more than torch, triton, timm, pytest and hypothesis: left out, and named, where
# it is missing.
NEEDS = {"train": ("torchvision", "sklearn", "matplotlib", "PIL"), "model/test_visualize.py": ("PIL", "matplotlib")}
ON_CPU_TESTS = ("tests/host/test_conftest.py", "tests/kernels/test_sampling.py", "-k", "test_conftest or 1x7x1x1")
CHECKS = ("memcheck", "racecheck", "initcheck")
ON_CPU_CASES = "tiny"
# API errors off: torch probes for things that a driver may not have, and handles the answer.
SANITIZER_OPTIONS = ["--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "50"]


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


def extension_origin(output: str) -> dict[str, Any]:
    found = re.search(r"^extension +(.+)", output, re.MULTILINE)
    return {"note": found[1]} if found else {}


def cores() -> int:
    """Processes to use: at most 16, so that they fit beside each other on the GPU."""
    return min(16, len(os.sched_getaffinity(0)))


def tests(stage: Stage) -> None:
    """All but tests/host, which learns nothing from a GPU, with kernels on it: run() unsets TRITON_INTERPRET."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if stage.on_gpu:
        lacking = {name: [p for p in packages if not importlib.util.find_spec(p)] for name, packages in NEEDS.items()}
        left_out = [name for name, packages in lacking.items() if packages]
        for name in left_out:
            stage.skip(name, f"{', '.join(lacking[name])} not installed")
        command += ["tests", *(f"--ignore=tests/{name}" for name in ("host", *left_out))]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(cores()), "--dist", "loadgroup"]
    else:
        command += ON_CPU_TESTS
    row = stage.step("pytest", [*command, *stage.extra], pytest_counts)
    if row["status"] == "passed" and not row.get("passed"):
        row.update(status="failed", note="no test passed")


def pytest_counts(output: str) -> dict[str, Any]:
    """Counts from pytest's last line; from the progress lines of a run that was cut off."""
    counts: dict[str, Any] = {}
    for line in reversed(output.splitlines()):
        if re.search(r"\bin \d+(\.\d+)?s\b", line):
            found = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)\b", line)
            return {name.rstrip("s") if name.startswith("error") else name: int(count) for count, name in found}
    letters = "".join(re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", output, re.MULTILINE))
    for name, letter in (("passed", "."), ("failed", "F"), ("error", "E"), ("skipped", "s")):
        if letter in letters:
            counts[name] = letters.count(letter)
    return counts


def sanitizer(stage: Stage) -> None:
    """The cases without a sanitizer, which compiles and checks them; then under each tool of compute-sanitizer."""
    cases = [sys.executable, "-m", "bench.gpu_check.sanitizer_cases"]
    if not stage.on_gpu:
        command = [*cases, "--device", "cpu", "--only", ON_CPU_CASES]
        stage.step("cases", command, case_counts, {"TRITON_INTERPRET": "1"})
        for check in CHECKS:
            stage.skip(check, "no GPU")
        return
    ran = stage.step("cases", [*cases, "--processes", str(cores())], case_counts)
    if ran["status"] != "passed":
        return
    program = find_sanitizer()
    if program is None:
        stage.rows.append(
            {"step": "compute-sanitizer", "status": "failed", "seconds": 0.0, "exit": 127,
             "note": "not found on the PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin"}
        )  # fmt: skip
        return
    for backend in ran.get("backends", "").split(", "):
        command = [program, "--tool", "memcheck", *SANITIZER_OPTIONS, *cases, "--plant", backend]
        planted = stage.step(f"planted-{backend}", command, lambda output: sanitizer_counts(output, ""))
        found = planted.get("errors", 0) > 0
        note = "a planted fault is found" if found else "a planted fault is NOT found"
        planted.update(status="passed" if found else "failed", note=note)
    for place, check in enumerate(CHECKS):
        command = [program, "--tool", check, *SANITIZER_OPTIONS, *cases]
        share = 1 / (len(CHECKS) - place)  # a slow tool must not take the time of the next
        stage.step(check, command, lambda output: sanitizer_counts(output, "cases: "), share=share)


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH"), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(filter(None, folders)))


def case_counts(output: str) -> dict[str, Any]:
    found = re.search(r"^cases: (\d+) ran, (\d+) failed, backends: (.*)", output, re.MULTILINE)
    return {"cases": int(found[1]), "failed": int(found[2]), "backends": found[3]} if found else {}


def sanitizer_counts(output: str, ending: str) -> dict[str, Any]:
    """Errors by the tool's own summary, and the kernels they were seen in. A run that printed neither the summary nor
    the program's own last line, which starts with `ending`, did not check everything: failed."""
    errors = [int(n) for n in re.findall(r"= ERROR SUMMARY: (\d+) error", output)]
    errors += [int(n) for n in re.findall(r"= RACECHECK SUMMARY: .*\((\d+) errors?", output)]
    warnings = [int(n) for n in re.findall(r"= RACECHECK SUMMARY: .*\(.*, (\d+) warnings?\)", output)]
    if not errors:
        return {"status": "failed", "note": "no summary by compute-sanitizer"}
    whole = re.search(rf"^{re.escape(ending)}", output, re.MULTILINE) is not None
    counts: dict[str, Any] = {"status": "passed" if whole and not sum(errors) else "failed", "errors": sum(errors)}
    if sum(warnings):
        counts["warnings"] = sum(warnings)
    kernels = sorted(set(re.findall(r"^=+ .*\bat (?:0x\w+ in )?([\w:~<>]+)(?:\(.*)?(?:\+0x\w+)", output, re.MULTILINE)))
    if sum(errors) and kernels:
        counts["note"] = "in " + ", ".join(kernels[:5])
    elif not whole:
        counts["note"] = "the cases did not all run"
    return counts


def benchmark(stage: Stage) -> None:
    """A benchmark of bench/ with the stage's time as its budget; --quick on a CPU."""
    path = stage.out / record.folder(stage.device).name / f"{stage.name}.json"
    shown = os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)  # it ends up in the result file
    command = [sys.executable, "-m", f"bench.{stage.name}", "--device", stage.device.type, "--out", shown]
    # Started processes, compilations and tests under way may overrun the budget.
    command += ["--minutes", f"{stage.left / 60 - 0.75:.1f}"] if stage.on_gpu else []
    command += stage.extra or ([] if stage.on_gpu and stage.name != "training" else ["--quick"])
    path.unlink(missing_ok=True)  # an earlier run's rows must not pass for this one's
    row = stage.step("bench", command)
    row.update(row_counts(path))
    if row["status"] == "passed" and not row.get("rows"):
        row.update(status="failed", note="no rows were recorded")


def row_counts(path: Path) -> dict[str, Any]:
    """Rows of a result file, and how many of them hold an error."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return {"rows": 0}
    failed = sum(1 for row in rows if row.get("error"))
    return {"rows": len(rows), "file": str(path), **({"with an error": failed} if failed else {})}


STAGES: dict[str, Callable[[Stage], None]] = {
    "tests": tests,
    "sanitizer": sanitizer,
    "ops": benchmark,
    "training": benchmark,
    "convergence": benchmark,
}
SHORT = ("first", "second")  # see bench/gpu_check/first.py


def check(name: str, out: Path, device: torch.device, extra: Sequence[str] = ()) -> Stage:
    """Runs one stage, writes its file whatever happens, and returns it."""
    stage = Stage(name, out, device, extra)
    try:
        if name in SHORT:
            from bench.gpu_check import first

            getattr(first, name)(stage)
            return stage
        build(stage)
        if stage.status not in RED:
            STAGES[name](stage)
    finally:
        stage.finish()
    return stage


def main(arguments: Sequence[str] | None = None) -> int:
    parser = console.parser("gpu_check", __doc__, EXAMPLES)
    parser.add_argument(
        "stage", choices=(*SHORT, *STAGES, "all"), metavar="STAGE", help=f"{', '.join((*SHORT, *STAGES))}, or all"
    )
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
    wanted = list(STAGES) if options.stage == "all" else [options.stage]
    red = []
    for name in wanted:
        extra = own
        if options.data is not None and name == "convergence":
            extra = [*own, "--data", str(options.data.resolve())]
        if check(name, options.out.resolve(), device, extra).status in RED:
            red.append(name)
            if name == "tests" and len(wanted) > 1:
                console.say("the tests are red: no further stage is run")
                break
    if len(wanted) > 1:
        console.say(f"red: {', '.join(red)}" if red else "all stages passed")
    return 1 if red else 0
