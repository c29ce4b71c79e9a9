"""bench.gpu_check: what it reads off its tools, how it stops them, and its stages on the CPU from end to end."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_check import first, sanitizer
from bench.gpu_check import run as gpu_check
from bench.gpu_check import stage as stages
from bench.gpu_check.counts import pytest_counts, sanitizer_counts
from bench.gpu_check.stage import Stage, Step
from bench.report import run as plot
from stvit.backends import explain
from tests.support import emulated
from tests.support.small_cases import Case, walk_cases

ROOT = Path(__file__).resolve().parents[2]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def no_driver_asked(monkeypatch):
    """A stage writes its report after each step, here also one that claims to be on a GPU."""
    monkeypatch.setattr(stages.record, "environment", lambda device: {"device": device.type, "name": "a stand-in"})


CLEAN = "========= COMPUTE-SANITIZER\n...\n3 passed in 2.11s\n"
CLEAN_RACES = CLEAN + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
CLEAN_MEMORY = CLEAN + "========= ERROR SUMMARY: 0 errors\n"
WRONG_MEMORY = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at walk_kernel+0x1a0 in pixels_to_tokens.py:61
=========     by thread (1,0,0) in block (0,0,0)
=========     Access at 0x7f31c2000c04 is out of bounds
3 passed in 2.11s
========= ERROR SUMMARY: 32 errors
"""
RACES = """\
========= Error: Race reported between Write access at fold_kernel(float *)+0xd0
=========     and Read access at fold_kernel(float *)+0xe0 [4 hazards]
3 passed in 2.11s
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("....\n4 passed in 2.11s\n", {"passed": 4}),
        (
            "..F.s [100%]\n== 1 failed, 3 passed, 1 skipped, 2 errors in 63.00s (0:01:03) ==\n",
            {"failed": 1, "passed": 3, "skipped": 1, "error": 2},
        ),
        ("...s.. [ 40%]\n..F\n", {"passed": 7, "failed": 1, "skipped": 1}),  # cut off
        ("", {}),
    ],
)
def test_counts_of_pytest(output, counts):
    assert pytest_counts(output) == counts


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        (CLEAN_MEMORY, {"status": "passed", "errors": 0}),
        (CLEAN_RACES, {"status": "passed", "errors": 0}),
        (WRONG_MEMORY, {"status": "failed", "errors": 32, "note": "in walk_kernel"}),
        (RACES, {"status": "failed", "errors": 1, "warnings": 1, "note": "in fold_kernel"}),
        (CLEAN, {"status": "failed", "note": "no summary by compute-sanitizer"}),
        (
            CLEAN_MEMORY.replace("3 passed", "Segmentation fault"),
            {"status": "failed", "errors": 0, "note": "the cases did not all run"},
        ),
    ],
)
def test_counts_of_compute_sanitizer(output, counts):
    assert sanitizer_counts(output, sanitizer.WHOLE) == counts


def is_running(process: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_a_step_out_of_time_is_stopped_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 1.0)
    program = tmp_path / "deaf.py"
    program.write_text(
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('partial', child.pid)\n"
        "time.sleep(600)\n"
    )
    stage = Stage("tests", tmp_path, CPU, limit=4.0)
    row = stage.step("deaf", [sys.executable, str(program)], lambda output: {"words": len(output.split())})
    assert row["status"] == "timed out" and row["words"] == 2 and row["exit"] == -9
    assert stage.seconds < 8
    child = int(row["tail"].split()[1])
    deadline = time.monotonic() + 5
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)
    assert "partial" in (tmp_path / "tests-deaf.log").read_text()
    assert stage.step("late", [sys.executable, "-c", ""])["status"] == "timed out"  # no time left: not even begun
    stage.finish()
    report = json.loads((tmp_path / "gpu-check-tests.json").read_text())
    assert report["status"] == "timed out" and [row["step"] for row in report["rows"]] == ["deaf", "late"]


def test_a_step_is_asked_to_stop_first(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 4.0)
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job inherits it ignored
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('kept')"
    )
    row = Stage("ops", tmp_path, CPU, limit=7.0).step("polite", [sys.executable, "-c", program])
    assert row["status"] == "timed out" and row["exit"] == 0 and "kept" in row["tail"]


def executable(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("tools", "failed"),
    [
        ({}, []),
        ({"triton": "0 errors"}, ["planted-triton"]),  # blind: a planted fault is not found
        ({"cuda": "0 errors"}, ["planted-cuda"]),
        ({"initcheck": "3 errors"}, ["initcheck"]),
    ],
)
def test_the_sanitizer_stage(tmp_path, monkeypatch, tools, failed):
    """With stand-ins for compute-sanitizer and for the program that it runs."""
    python = executable(tmp_path / "python", 'echo "3 passed in 2.11s"\n')
    executable(
        tmp_path / "compute-sanitizer",
        f"""tool=$2
case "$*" in
  *plant\\ triton) found="{tools.get("triton", "1 error")}";;
  *plant\\ cuda) found="{tools.get("cuda", "1 error")}";;
  *) found="0 errors";;
esac
[ $tool = initcheck ] && found="{tools.get("initcheck", "0 errors")}"
echo "3 passed in 2.11s"
if [ $tool = racecheck ]; then echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
else echo "========= ERROR SUMMARY: $found"; fi
""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitizer, "CASES", [python])
    monkeypatch.setattr(sanitizer.dispatch, "prepare", lambda *_: [])
    stage = Stage("sanitizer", tmp_path / "out", GPU)
    sanitizer.sanitizer(stage)
    steps = ["cases", "planted-cuda", "planted-triton", "memcheck", "racecheck", "initcheck"]
    assert [row["step"] for row in stage.rows] == steps
    assert [row["step"] for row in stage.rows if row["status"] != "passed"] == failed
    assert stage.status == ("failed" if failed else "passed")


def test_the_sanitizer_stage_without_compute_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    monkeypatch.setattr(sanitizer, "CASES", [executable(tmp_path / "python", 'echo "3 passed in 2.11s"\n')])
    stage = Stage("sanitizer", tmp_path, GPU)
    sanitizer.sanitizer(stage)
    assert stage.status == "failed" and "not on the PATH" in stage.rows[-1]["note"]


def test_a_backend_that_can_not_run_has_no_planted_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "find", lambda: executable(tmp_path / "tool", 'echo "= ERROR SUMMARY: 1 error"\n'))
    monkeypatch.setattr(sanitizer, "CASES", [executable(tmp_path / "python", 'echo "3 passed in 2.11s"\n')])
    monkeypatch.setattr(sanitizer.dispatch, "prepare", lambda name, _: ["no GPU"] if name == "cuda" else [])
    stage = Stage("sanitizer", tmp_path, GPU)
    sanitizer.sanitizer(stage)
    rows = {row["step"]: row for row in stage.rows}
    assert rows["planted-cuda"]["note"] == "no GPU" and rows["planted-triton"]["status"] == "passed"


def planned(case: Case, gpu: explain.Gpu) -> str:
    """How csrc/plan.cpp carries out the sampling of a case."""
    shape = explain.Shape(*case.shape, *case.settings["stoken_size"])
    limits = gpu.multiprocessors, gpu.shared_bytes
    found = emulated.extension().plan(0, True, False, *shape, case.dtype.itemsize, *limits)
    if not found["fits"]:
        return "general"
    return "two passes" if not found["pools"] else "one region" if found["regions"] == shape.batch else "regions"


@pytest.mark.parametrize("name", ["a100", "rtx4090", "h100", "h200", "b200"])
def test_the_walk_cases_are_planned_as_they_say(name):
    found: dict[str, set[str]] = {}
    for case in walk_cases():
        found.setdefault(case.name, set()).add(planned(case, explain.GPUS[name]))
    assert (found["whole"], found["regions"], found["passes"]) == ({"one region"}, {"regions"}, {"two passes"})
    assert "general" in found["channels"]


def test_the_fault_planted_in_the_extension_is_one(run_python):
    code = """
import torch
from tests.support import emulated
from tests.support.plant import plant
from stvit.backends import extension
extension.use(emulated.extension())
plant("cuda", torch.device("cpu"))
"""
    environment = {**emulated.sanitizer_environment(), "PYTHONPATH": "."}
    child = run_python("-c", code, env=environment, check=False)
    assert child.returncode and "ERROR: AddressSanitizer: heap-" in child.stderr and "sum_kernel" in child.stderr


@pytest.mark.parametrize(
    ("missing", "ready", "ending", "status"),
    [
        ([], False, "exit 0", "passed"),
        ([], False, "exit 1", "failed"),  # it does not compile
        (["no nvcc"], False, "exit 1", "skipped"),
        (["no nvcc"], True, "exit 0", "passed"),  # it was installed
    ],
)
def test_the_extension_is_built_before_a_stage(tmp_path, monkeypatch, missing, ready, ending, status):
    prints = 'echo "stvit            0.1"; echo "extension        built on request: there"; '
    monkeypatch.setattr(gpu_check.sys, "executable", executable(tmp_path / "python", prints + ending))
    monkeypatch.setattr(gpu_check.building, "obstacles", lambda: missing)
    monkeypatch.setattr(gpu_check.extension, "ready", lambda: ready)
    stage = Stage("ops", tmp_path / "out", GPU)
    gpu_check.build(stage)
    (row,) = stage.rows
    assert row["status"] == status
    said = {"skipped": "the CUDA extension is left out: no nvcc"}
    assert row["note"] == said.get(status, "built on request: there")


def test_what_is_left_out_on_a_gpu_exists():
    for name in ("host", "fuzz", *gpu_check.PICTURES):
        assert (ROOT / "tests" / name).exists(), name


def test_red_tests_stop_the_rest(tmp_path, monkeypatch, capsys):
    ran = []

    def stand_in(stage: Stage) -> None:
        ran.append(stage.name)
        code = int(stage.name in red)
        stage.step("step", [sys.executable, "-c", f"raise SystemExit({code})"])

    monkeypatch.setattr(gpu_check, "STAGES", dict.fromkeys(gpu_check.STAGES, stand_in))
    red = {"tests"}
    assert gpu_check.main(["all", "--out", str(tmp_path), "--on-cpu"]) == 1
    assert ran == ["tests"]
    ran.clear()
    red = {"ops"}
    assert gpu_check.main(["all", "--out", str(tmp_path), "--on-cpu"]) == 1
    assert ran == ["tests", "sanitizer", "ops", "training", "convergence"]
    assert capsys.readouterr().out.endswith("red: ops\n")
    red = set()
    assert gpu_check.main(["all", "--out", str(tmp_path), "--on-cpu"]) == 0


def test_a_stage_that_raises_leaves_its_report(tmp_path, monkeypatch):
    def stand_in(stage: Stage) -> None:
        stage.step("first", [sys.executable, "-c", ""])
        raise RuntimeError("bug")

    monkeypatch.setattr(gpu_check, "STAGES", {"ops": stand_in})
    with pytest.raises(RuntimeError, match="bug"):
        gpu_check.check("ops", tmp_path, CPU)
    assert json.loads((tmp_path / "gpu-check-ops.json").read_text())["rows"][-1]["step"] == "first"


@pytest.mark.parametrize("name", ["first", "second"])
def test_no_part_of_the_first_stages_stops_the_rest(tmp_path, monkeypatch, name):
    """Numbers hang, models fail; every part ends within its time and the file tells of each."""
    assert sum(first.SECONDS.values()) <= first.LIMIT - stages.GRACE
    body = 'case "$*" in *--gate*) sleep 60;; *bench.training*) exit 1;; esac\n'
    python = executable(tmp_path / "python", body)
    monkeypatch.setattr(gpu_check.sys, "executable", python)
    monkeypatch.setattr(first, "SECONDS", {**first.SECONDS, "numbers": 0.5})
    monkeypatch.setattr(stages, "GRACE", 1.0)
    stage = Stage(name, tmp_path / "out", CPU)
    getattr(first, name)(stage)
    states = [
        (row["step"], row["status"])
        for row in json.loads((tmp_path / f"out/gpu-check-{name}.json").read_text())["rows"]
    ]
    assert states == [
        ("numbers", "timed out"),
        ("ops", "passed"),
        ("models", "failed"),
        ("extension", "skipped"),
        ("costs", "passed"),
        ("kernels", "passed"),
        *([("memcheck", "skipped"), ("racecheck", "skipped")] if name == "first" else []),
    ]


def test_a_background_step_ends_with_its_stage(tmp_path):
    stage = Stage("first", tmp_path, CPU)
    background = Step(stage, "build", [sys.executable, "-c", "import time; print('begun'); time.sleep(600)"])
    row = background.end(0.2)
    assert row["status"] == "timed out" and background.child.code is not None


def test_wrong_command_lines(run_python, tmp_path):
    def refused(*arguments: str) -> str:
        child = run_python("-m", "bench.gpu_check", *arguments, "--out", str(tmp_path), check=False)
        assert child.returncode == 2 and "Traceback" not in child.stderr
        return child.stderr

    assert "choose from" in refused("nothing")
    assert "is not a folder" in refused("convergence", "--data", str(tmp_path / "none"))
    if not torch.cuda.is_available():
        expected = "error: no CUDA device found; --on-cpu runs reduced stages on the CPU\n"
        assert refused("tests") == expected


def tables_of(result: dict[str, Any], folder: Path) -> None:
    """A real file goes through bench.plot, its device and the name of one contender changed for the purpose."""
    result["environment"]["device"] = "cuda"
    for row in result["rows"]:
        if result["benchmark"] == "ops" and row["contender"] == "reference":
            row.update(contender="triton", baseline=False)
    path = folder / "results" / "gpu" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    document = folder / "README.md"
    document.write_text(f"{plot.BEGIN}{plot.END}")
    assert plot.main(["--readme", "--results", str(folder / "results"), "--document", str(document)]) == 0
    assert document.read_text().count("| ---") > 0
    assert list(path.parent.glob("*.png"))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tests", ()),
        ("sanitizer", ()),
        ("ops", ()),
        ("training", "-- --quick --contenders authors ours-reference".split()),
    ],
    ids=["tests", "sanitizer", "ops", "training"],
)
def test_stages_on_the_cpu(run_python, tmp_path, name, flags):
    shown = run_python("-m", "bench.gpu_check", name, "--out", str(tmp_path), "--on-cpu", *flags).stdout
    report = json.loads((tmp_path / f"gpu-check-{name}.json").read_text())
    assert report["environment"]["device"] == "cpu" and report["stage"] == name and report["status"] == "passed"
    rows = {row["step"]: row for row in report["rows"]}
    assert rows.pop("build")["status"] == "skipped"
    if name == "tests":
        assert rows["pytest"]["passed"] > 0
    elif name == "sanitizer":
        assert rows["cases"]["passed"] > 0 and rows["memcheck"]["status"] == "skipped"
    else:
        result = json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
        assert rows["bench"]["rows"] == len(result["rows"]) > 0
        assert result["environment"]["device"] == "cpu"
        tables_of(result, tmp_path)
    assert f"{name}: passed in" in shown


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("venv", [False, True])
def test_the_make_target_fetches_nothing(tmp_path, venv):
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = "python3"
    if venv:
        python = ".venv/bin/python"
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        executable(tmp_path / python, "")
    command = ["make", "-n", "gpu-check", "STAGE=ops", "OUT=there", "ARGS=--on-cpu"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"{python} -m bench.gpu_check ops --out there --on-cpu" in shown
    assert "pip" not in shown and "PYTHONPATH=" in shown
