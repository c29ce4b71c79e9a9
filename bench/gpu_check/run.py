"""What needs a GPU, in stages that each end inside nine minutes: tests, sanitizer, ops, training, convergence.

Each stage ends with a table and leaves DIR/gpu-check-STAGE.json (environment, seconds, exit codes, counts) and the
output of its steps, DIR/STAGE-STEP.log. The benchmarks' result files go to DIR/<gpu>/, ready to be copied to
bench/results/. `all` runs the stages in order and stops after red tests. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bench.harness import console, record
from stvit.backends import build as building
from stvit.backends import extension

EXAMPLES = """\
examples:
  python -m bench.gpu_check tests --out runs/gpu-check
  python -m bench.gpu_check all --out runs/gpu-check
  python -m bench.gpu_check convergence --out runs/gpu-check --data photographs    DIR/{train,val}/CLASS/*.jpg
  python -m bench.gpu_check training --out runs/gpu-check -- --models stvit_base   to the benchmark, for --quick
  python -m bench.gpu_check ops --out runs/gpu-check --on-cpu                      reduced: does the tool work?

exit codes: 0 all passed, 1 something failed or ran out of time, 2 no GPU or a wrong command line
"""
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 540.0  # seconds that a stage may take, building included
GRACE = 20.0  # of these, the seconds between asking a step to stop and killing it

# Folders and files of tests/ that need more than torch, triton, timm, pytest and hypothesis: left out, and named, where
# it is missing.
NEEDS = {"train": ("torchvision", "sklearn", "matplotlib", "PIL"), "model/test_visualize.py": ("PIL", "matplotlib")}
ON_CPU_TESTS = ("tests/host/test_conftest.py", "tests/kernels/test_sampling.py", "-k", "test_conftest or 1x7x1x1")
CHECKS = ("memcheck", "racecheck", "initcheck")
ON_CPU_CASES = "tiny"
RED = ("failed", "timed out")


class Stage:
    """One stage while it runs: its clock, its steps and their results."""

    def __init__(self, name: str, out: Path, device: torch.device, extra: Sequence[str] = (), limit: float = LIMIT):
        self.name, self.out, self.device, self.extra, self.limit = name, out, device, list(extra), limit
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        out.mkdir(parents=True, exist_ok=True)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds that a step may take before it is asked to stop."""
        return max(0.0, self.limit - GRACE - self.seconds)

    @property
    def status(self) -> str:
        states = [row["status"] for row in self.rows]
        return next((state for state in (*RED, "passed") if state in states), "skipped")

    def skip(self, step: str, why: str) -> None:
        self.rows.append({"step": step, "status": "skipped", "seconds": 0.0, "exit": None, "note": why})

    def step(
        self,
        step: str,
        command: Sequence[str],
        counts: Callable[[str], dict[str, Any]] = lambda output: {},
        environment: dict[str, str] | None = None,
        share: float = 1.0,
    ) -> dict[str, Any]:
        """Runs a command, in a share of the time left, and records it. `counts` reads its output; where the command
        ended well and in time, a "status" among them is what counts."""
        log = self.out / f"{self.name}-{step}.log"
        console.say(f"== {self.name}: {step}: {' '.join(command)}")
        began = time.monotonic()
        if self.left > 0:
            code, in_time = run(command, log, share * self.left, environment or {})
        else:
            log.write_text("")
            code, in_time = None, False
        output = log.read_text(errors="replace")
        status = "timed out" if not in_time else "failed" if code else "passed"
        row = {"step": step, "status": status, "seconds": round(time.monotonic() - began, 1), "exit": code}
        found = counts(output)
        if status != "passed":
            found.pop("status", None)
            row["tail"] = output[-2000:]
        self.rows.append({**row, **found, "command": " ".join(command)})
        return self.rows[-1]

    def finish(self) -> None:
        """Writes the stage's file and prints its table."""
        path = self.out / f"gpu-check-{self.name}.json"
        seconds = round(self.seconds, 1)
        record.write(path, "gpu_check", self.device, self.rows, stage=self.name, status=self.status, seconds=seconds)
        hidden = ("step", "status", "seconds", "exit", "tail", "command")
        cells = [
            [
                row["step"],
                row["status"],
                f"{row['seconds']:.0f} s",
                ", ".join(str(value) if name == "note" else f"{value} {name}" for name, value in row.items()
                          if name not in hidden and value is not None),
            ]
            for row in self.rows
        ]  # fmt: skip
        where = record.environment(self.device)["name"] or self.device.type
        title = f"{self.name}: {self.status} in {self.seconds:.0f} s on {where} ({path})"
        console.table(title, ("step", "status", "time", "counts"), cells, left=4)


def run(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> tuple[int | None, bool]:
    """(exit code, whether it ended in time). Output goes to the terminal and to `log`.

    The command gets a process group of its own. At the limit the group is asked to stop (SIGINT: pytest prints what
    it has, a benchmark keeps its rows), and killed GRACE later; what a dead command leaves behind is killed as well.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**inherited, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("wb") as file:
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            file.write(f"error: {error}\n".encode())
            return 127, True
        assert child.stdout is not None
        copier = threading.Thread(target=_copy, args=(child.stdout, file), daemon=True)
        copier.start()
        in_time = True
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            in_time = False
            _signal(child, signal.SIGINT)
            try:
                child.wait(GRACE * 0.75)
            except subprocess.TimeoutExpired:
                pass
        finally:  # also when this program is interrupted
            _signal(child, signal.SIGKILL)
            code = child.wait()
            copier.join(5)
    return code, in_time


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(child.pid, number)
    except (ProcessLookupError, PermissionError):
        pass  # the whole group has ended


def _copy(source: BinaryIO, log: BinaryIO) -> None:
    for line in source:
        try:
            log.write(line)
            log.flush()
        except ValueError:  # the log was closed on a straggler
            return
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()


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
    # API errors off: torch probes for things that a driver may not have, and handles the answer.
    options = ["--target-processes", "application-only", "--report-api-errors", "no", "--print-limit", "50"]
    for backend in ran.get("backends", "").split(", "):
        command = [program, "--tool", "memcheck", *options, *cases, "--plant", backend]
        planted = stage.step(f"planted-{backend}", command, lambda output: sanitizer_counts(output, ""))
        found = planted.get("errors", 0) > 0
        note = "a planted fault is found" if found else "a planted fault is NOT found"
        planted.update(status="passed" if found else "failed", note=note)
    for place, check in enumerate(CHECKS):
        command = [program, "--tool", check, *options, *cases]
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


def check(name: str, out: Path, device: torch.device, extra: Sequence[str] = ()) -> Stage:
    """Runs one stage, writes its file whatever happens, and returns it."""
    stage = Stage(name, out, device, extra)
    try:
        build(stage)
        if stage.status not in RED:
            STAGES[name](stage)
    finally:
        stage.finish()
    return stage


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("stage", choices=(*STAGES, "all"), metavar="STAGE", help=f"{', '.join(STAGES)}, or all")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for reports, logs, result files")
    parser.add_argument("--data", type=Path, metavar="DIR", help="images for convergence, by default the tool's own")
    parser.add_argument("--on-cpu", action="store_true", help="reduced stages on the CPU, to try the program itself")
    parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [-- FLAGS of pytest or the benchmark]"
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options, own = parser.parse_args(given[:end]), given[end + 1 :]
    if own and options.stage in ("all", "sanitizer"):
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


if __name__ == "__main__":
    sys.exit(main())
