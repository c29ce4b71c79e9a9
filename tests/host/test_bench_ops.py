"""bench.ops end to end on the CPU: what is timed passed its gate, and what did not has no speed."""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import record
from bench.ops import cases, gate
from bench.ops import options as ops_options
from bench.ops import run as ops
from bench.ops.cases import BLOCK_OPS, Implementation, Op, Problem
from stvit.backends import dispatch, extension
from tests.host.test_bench_official import checkout  # noqa: F401  (a fixture)
from tests.support import emulated

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--shape", "3x5x5x3/4x2", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "REPEATS", 3)
    monkeypatch.setattr(ops, "SECONDS", 0.0)
    monkeypatch.setattr(ops.timing, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def rows_of(path: Path) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    rows = json.loads(path.read_text())["rows"]
    return {(row["op"], row["mode"], row["contender"], row["pass"]): row for row in rows}


def problem(text: str, batch: int = 1, **options: Any) -> Problem:
    return Problem(cases.parse_shape(text), batch, torch.float32, CPU, **options)


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension for CPU tensors is the one in use."""
    monkeypatch.setattr(extension, "_state", extension._state)  # undoes use()
    extension.use(emulated.extension())


def test_every_op_and_mode(emulation: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "ops.json"
    assert ops.main([*SMALL, "--contenders", "triton,cuda,authors,reference", "--out", str(out)]) == 0
    content, rows = json.loads(out.read_text()), rows_of(out)
    for op in cases.OPS:
        for mode in cases.MODES:
            for pass_ in cases.PASSES:
                # With a GPU the tests run Triton there, and nothing here.
                for name in ("triton", "cuda") if dispatch.interpreting() else ("cuda",):
                    kernel = rows[op.name, mode, name, pass_]
                    assert kernel["status"] == "gate only" and kernel["interpreted"] and kernel["gate"]["passed"]
                    assert not {"median_ms", "percent_of_floor"} & set(kernel) and not kernel["speedup"]
                timed = rows[op.name, mode, "reference", pass_]
                assert timed["status"] == "timed" and 0 < timed["p20_ms"] <= timed["median_ms"] <= timed["p80_ms"]
                seconds = timed["floor_bytes"] / 1e9
                assert timed["percent_of_floor"] == pytest.approx(100 * seconds / (timed["median_ms"] * 1e-3))
    faster = rows["core", "detached", "reference", "forward"]
    authors = rows["core", "detached", "authors", "forward"]
    assert faster["speedup"] == {"authors": authors["median_ms"] / faster["median_ms"]}
    assert ("core", "association_grad", "authors", "forward") not in rows
    assert content["environment"]["device"] == "cpu" and content["bandwidth_bytes_per_s"] == 1e9
    assert content["environment"]["extension"]["device"] == "cpu"
    (reason,) = content["unavailable"]["cuda"]
    assert "the extension holds super token sampling and upsampling alone" in reason
    assert not [key for key in rows if key[2] == "cuda" and key[0] in {op.name for op in BLOCK_OPS}]
    refined = rows["attention", "detached", "authors", "forward+backward"]
    assert "d stoken_refine.qkv.weight" in refined["gate"]["errors"]
    printed = capsys.readouterr().out
    assert "cuda (interpreted)" in printed and ("triton (interpreted)" in printed) == dispatch.interpreting()


def test_an_extension_that_can_not_be_built_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is built before anything is timed, and the reasons are told."""
    tried = []

    def load() -> None:
        tried.append(True)
        raise extension.ExtensionError("compiling failed")

    monkeypatch.setattr(extension, "_state", extension._State(looked=True))
    monkeypatch.setattr(extension, "load", load)
    monkeypatch.setattr(dispatch, "_gpu_missing", lambda device: [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    out = tmp_path / "ops.json"
    assert ops.main([*SMALL, "--mode", "detached", "--contenders", "cuda,reference", "--out", str(out)]) == 0
    assert tried and {key[2] for key in rows_of(out)} == {"reference"}
    assert "compiling failed" in json.loads(out.read_text())["unavailable"]["cuda"]
    assert capsys.readouterr().out.startswith("not everywhere available: cuda: compiling failed")


def test_low_precision(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    run = [*SMALL[:4], "--dtype", "bf16,fp16", "--contenders", "authors,reference", "--out", str(out)]
    assert ops.main(run) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16"}
    assert all(row["status"] == "timed" and 0 < row["gate"]["worst"] < 3 for row in rows)


def test_the_gate_alone_times_nothing(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    assert ops.main([*SMALL, "--ops", "core", "--contenders", "reference", "--gate", "--out", str(out)]) == 0
    rows = rows_of(out).values()
    assert len(rows) == 4 and {row["status"] for row in rows} == {"gate only"}
    assert all(row["gate"]["passed"] and "median_ms" not in row for row in rows)


def test_compiled_contenders(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    names = "authors compiled,reference compiled,authors"
    assert ops.main([*SMALL, "--ops", "core", "--contenders", names, "--mode", "detached", "--out", str(out)]) == 0
    rows = rows_of(out)
    assert len(rows) == 6 and {row["status"] for row in rows.values()} == {"timed"}
    assert set(rows["core", "detached", "reference compiled", "forward"]["speedup"]) == {"authors", "authors compiled"}


def test_official_checkout(checkout: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "ops.json"
    run = [*SMALL, "--mode", "detached", "--official", str(checkout), "--out", str(out)]
    assert ops.main([*run, "--contenders", "authors,reference"]) == 0
    content, rows = json.loads(out.read_text()), rows_of(out)
    assert content["authors"] == "official checkout"
    assert {key[0] for key in rows if key[2] == "authors"} == {"core", "attention"}
    assert content["unavailable"]["authors"] == [
        "the authors' code has sampling and upsampling in one function",
        "PyTorch's own operators stand for the authors' code here; leave --official out",
    ]
    model = checkout / "models" / "stvit.py"
    model.write_text(
        model.read_text()
        + "right = stvit.StokenAttention.forward\nStokenAttention.forward = lambda self, x: 1.2 * right(self, x)\n"
    )
    assert ops.main([*run, "--contenders", "authors"]) == 1, "a checkout that computes something else"
    assert {row["status"] for row in rows_of(out).values()} == {"failed gate"}


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.01 * grad


def last_image_wrong(x: Tensor) -> Tensor:
    return 2 * x + torch.tensor([0.0] * (x.shape[0] - 1) + [0.01])[:, None, None, None]


def raises(error: type[Exception]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        raise error("first line\nsecond line")

    return run


def doubling(monkeypatch: pytest.MonkeyPatch, **families: Callable[[Tensor], Tensor]) -> list[str]:
    """Registers y = 2 x, run by some families in another way; the arguments that time it."""

    def implement(problem: Problem, family: str, authors: Any) -> Implementation:
        run = families.get(family, lambda x: 2 * x)
        return Implementation(lambda x: (run(x),))

    op = Op("doubling", lambda problem: {"x": True}, ("y",), implement, lambda p: (2 * p.bytes("x"), 2 * p.bytes("x")))
    monkeypatch.setattr(ops_options, "OPS", [op])
    monkeypatch.setattr(dispatch, "why_not", lambda *_: [])
    return [*SMALL[:2], "--shape", "3x4x6x5/2x2", "--dtype", "fp32", "--mode", "detached", "--ops", "doubling"]


@pytest.mark.parametrize(
    "wrong, failed",
    [
        (WrongBackward.apply, ("forward+backward",)),
        (lambda x: 2.01 * x, cases.PASSES),
        (last_image_wrong, cases.PASSES),
        (lambda x: 2 * x + math.nan, cases.PASSES),
    ],
)
def test_a_wrong_kernel_has_no_speed(
    wrong: Callable[[Tensor], Tensor], failed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "ops.json"
    run = [*doubling(monkeypatch, triton=wrong), "--contenders", "triton,authors", "--out", str(out)]
    monkeypatch.setattr(ops, "interpreted", lambda contender, device: False)  # as if it could be timed
    assert ops.main(run) == 1
    rows = rows_of(out)
    for pass_ in cases.PASSES:
        row = rows["doubling", "detached", "triton", pass_]
        assert row["status"] == ("failed gate" if pass_ in failed else "timed")
        assert ("median_ms" in row) == (pass_ not in failed)
        assert rows["doubling", "detached", "authors", pass_]["status"] == "timed"
    assert capsys.readouterr().out.count("failed gate: ") == len(failed)


def test_a_baseline_may_round_more_but_not_compute_something_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "ops.json"
    for factor, code in ((2.01, 0), (2.3, 1)):
        run = doubling(monkeypatch, authors=lambda x, factor=factor: factor * x)
        assert ops.main([*run, "--contenders", "authors", "--out", str(out)]) == code
        row = rows_of(out)["doubling", "detached", "authors", "forward"]
        assert row["status"] == ("failed gate" if code else "timed") and row["gate"]["worst"] > 1


@pytest.mark.parametrize("error, status, code", [(torch.OutOfMemoryError, "out of memory", 0), (OSError, "error", 1)])
def test_a_failing_case_leaves_the_others(
    error: type[Exception], status: str, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "ops.json"
    run = doubling(monkeypatch, triton=raises(error))
    assert ops.main([*run, "--contenders", "triton,authors", "--out", str(out)]) == code
    rows = rows_of(out)
    row = rows["doubling", "detached", "triton", "forward+backward"]
    assert row["status"] == status and row["error"] == f"{error.__name__}: first line" and "median_ms" not in row
    assert rows["doubling", "detached", "authors", "forward+backward"]["status"] == "timed"


def test_a_failing_truth_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    run = doubling(monkeypatch, reference=raises(OSError))
    assert ops.main([*run, "--contenders", "authors", "--out", str(out)]) == 1
    assert [row["error"] for row in rows_of(out).values()] == ["OSError: first line"]


@pytest.mark.parametrize("stop, code", [(SystemExit(1), 1), (KeyboardInterrupt(), 130)])
def test_an_ended_run_keeps_its_rows(
    stop: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "ops.json"
    timed = ops.run_contender

    def run_contender(run: ops.Run, op: Op, problem: Problem, contender: cases.Contender, right: gate.Truth) -> None:
        if contender.name == "reference":
            raise stop
        timed(run, op, problem, contender, right)

    monkeypatch.setattr(ops, "run_contender", run_contender)
    run = [*doubling(monkeypatch), "--contenders", "authors,reference", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        ops.main(run)
    assert ended.value.code == code and {key[2] for key in rows_of(out)} == {"authors"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, synchronising works")
def test_a_gpu_that_does_not_survive_an_error_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    row: dict[str, Any] = {"status": "not run", "error": None}
    with pytest.raises(SystemExit), ops.failures_in(row, torch.device("cuda")):
        raise ValueError("boom")
    assert row["status"] == "error" and "no more after: ValueError: boom" in capsys.readouterr().err


def test_what_does_not_fit_the_time_is_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ops.json"
    assert ops.main([*SMALL, "--contenders", "reference", "--minutes", "1e-9", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["rows"] == [] and content["skipped"] == 2 * (2 * len(cases.OPS) + len(BLOCK_OPS))
    assert "28 measurements skipped" in capsys.readouterr().out


def test_floors_are_those_of_the_design() -> None:
    x, a = 51_380_224, 51_380_224 * 9 // 64  # 128 x 64 x 56 x 56 bfloat16; 9/C of it
    detached = problem("S/1/224", 128)._replace(dtype=torch.bfloat16)
    full = detached._replace(association_grad=True)
    floors = {op.name: (op.floor(detached), op.floor(full)) for op in cases.OPS}
    assert floors["sampling"] == ((x + a, x + a), (x + a, 2 * x + 2 * a))
    assert floors["upsampling"] == ((x + a, x + a), (x + a, x + 2 * a))
    assert floors["core"] == ((2 * x + 2 * a, 2 * x + 2 * a), (2 * x + 2 * a, 3 * x + 4 * a))
    assert floors["attention"] == floors["core"]


def test_shapes() -> None:
    sizes = {shape.name: (shape.channels, shape.height, shape.width, shape.tile) for shape in cases.published_shapes()}
    assert len(sizes) == 12
    assert sizes["S/1/224"] == (64, 56, 56, (8, 8)) and sizes["S/2/384"] == (128, 48, 48, (4, 4))
    assert sizes["B/1/800x1344"] == (96, 200, 336, (8, 8)) and sizes["B/2/800x1344"] == (192, 100, 168, (4, 4))
    assert cases.parse_shape("L/2/224") == cases.parse_shape("B/2/224")
    explicit = cases.parse_shape("2x96x50x70/8x4")
    assert (explicit.batch, explicit.channels, explicit.height, explicit.tile) == (2, 96, 50, (8, 4))
    for text in ("S/3/224", "S/1/225", "2x96x50x70", "0x1x1x1/1x1", ""):
        with pytest.raises(ValueError, match="expected S/1/224"):
            cases.parse_shape(text)


def test_what_matters_most_comes_first() -> None:
    options = argparse.Namespace(device=CPU, **ops_options.preset(on_gpu=True, quick=False))
    units = ops_options.plan(options)
    for unit in units[:8]:
        found = unit.problem
        assert unit.op.name == "core" and found.batch == 128 and not found.association_grad
        assert found.dtype == torch.bfloat16 and unit.contenders == cases.CONTENDERS
    assert [unit.problem.shape.name for unit in units[:8]] == [shape.name for shape in cases.published_shapes()[:8]]
    compiled = [all(contender.compiled for contender in unit.contenders) for unit in units]
    assert compiled == sorted(compiled) and any(compiled), "compiling waits"
    problems = {(unit.op.name, unit.problem, c.name) for unit in units for c in unit.contenders}
    ops_and_modes = 2 * len(cases.OPS) + len(BLOCK_OPS)
    assert len(problems) == ops_and_modes * 12 * 3 * 3 * 6 == sum(len(unit.contenders) for unit in units)


def test_only_a_full_run_on_a_gpu_writes_the_result_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    folder = record.RESULTS / "nvidia-h100-80gb-hbm3"
    assert ops_options.parse(["--device", "cuda"]).out == folder / "ops.json"
    assert ops_options.parse(["--device", "cuda", "--minutes", "5"]).out == folder / "ops.json"
    for narrowed in (["--quick"], ["--ops", "core"], ["--gate"], ["--official", "."]):
        assert ops_options.parse(["--device", "cuda", *narrowed]).out is None
    assert ops_options.parse(["--device", "cpu"]).out is None
    assert ops_options.parse(["--device", "cuda", "--quick", "--out", "a.json"]).out == Path("a.json")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--ops", "sampling,pooling"], "expected some of core, attention, sampling, upsampling, gelu_depthwise"),
        (["--shape", "S/9/224"], "got 'S/9/224'"),
        (["--batch", "0"], "expected a whole number, at least 1"),
        (["--minutes", "-1"], "expected more than 0"),
        (["--device", "toaster"], "invalid choice: 'toaster'"),
        (["--official", "/nowhere"], "is not a file"),
        (["--contenders", "cuda"], "no contender asked for can run here"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ops.main(["--device", "cpu", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1] and "Traceback" not in error
