"""bench.machine: the kernels of a step below their recorded ceilings, and the model on figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import triton

from bench.machine import cost, report
from bench.machine.cost import Cost
from bench.machine.gpus import GPUS

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="traces the ops of a CUDA build of PyTorch")
H100 = GPUS["H100"]


@pytest.fixture(scope="module")
def step() -> list[Cost]:
    recorded = json.loads(report.CEILING.read_text())
    settings = {name: recorded[name] for name in ("batch", "size", "capability")}
    return cost.step(recorded["model"], dtype=report.DTYPES[recorded["dtype"]], **settings)


@needs_cuda_build
def test_the_kernels_of_a_step_keep_below_their_ceilings(step: list[Cost]) -> None:
    """Lower them with `python -m bench.machine --record` when a kernel has become better."""
    recorded = json.loads(report.CEILING.read_text())
    if triton.__version__ != recorded["triton"]:  # another compiler, other machine code: not what a kernel became
        pytest.skip(f"the ceilings are those of what Triton {recorded['triton']} compiles")
    found = report.ceilings(step, GPUS[recorded["gpu"]])
    assert found.keys() == recorded["kernels"].keys(), "other kernels or shapes than recorded"
    both = {name: (kernel["us"], found[name]["us"]) for name, kernel in recorded["kernels"].items()}
    assert not {name: us for name, us in both.items() if us[1] > us[0]}, "recorded and present us of the worst limit"
    assert sum(kernel["launches"] * kernel["us"] for kernel in found.values()) <= recorded["step_us"]


def test_the_document_shows_what_is_recorded() -> None:
    text = report.DOCUMENT.read_text()
    assert report.documented(text, json.loads(report.CEILING.read_text())) == text


@needs_cuda_build
def test_nothing_spills_and_machine_code_is_matched(step: list[Cost]) -> None:
    for each in step:
        assert each.stack == 0, each.name
        assert 0.85 <= each.matched <= 1.25, f"{each.name}: {each.matched}"


@needs_cuda_build
def test_bytes_and_launches_are_those_worked_out(step: list[Cost]) -> None:
    """x is 128 x 64 x 56 x 56 in 2 bytes; LayerNorm writes two float32 numbers a pixel beside y."""
    x, pixels = 128 * 64 * 56 * 56 * 2, 128 * 56 * 56
    by_name = {each.name: each for each in step}
    branch = by_name["residual_branch 128x64x56x56"]
    assert branch.bytes_read == pytest.approx(2 * x, rel=1e-3) and branch.bytes_written == x
    norm = by_name["channel_layer_norm 128x64x56x56"]
    assert norm.bytes_read == pytest.approx(x, rel=1e-3) and norm.bytes_written == x + 8 * pixels
    pooling = by_name["sampling (pooling) 128x64x56x56"]
    assert pooling.bytes_read == x and pooling.bytes_written == x // 64
    assert pooling.launches == 3  # blocks of stage 1


EXAMPLE = Cost(
    op="op", phase="forward", kernel="example_kernel", shape=(1, 2, 3, 4), launches=5, grid=264, warps=4, registers=132,
    stack=0, shared=0, instructions=264 * 1000, pipes={"alu": 264 * 500, "float": 264 * 100, "multiply": 264 * 100},
    matched=1.0, ptx=264 * 900, classes={}, flops=989e6, loads=(200, 100), stores=(100, 100), wavefronts=(0, 0),
    passes=264 * 300, bytes_read=3.352e6, bytes_written=0, l2_bytes=5.5e6,
)  # fmt: skip


def test_limits_of_an_example_are_those_by_hand() -> None:
    """Two blocks for each of 132 multiprocessors: 2000 instructions by 4 schedulers, 1000 of them by 64 / 32 lanes.."""
    clocks = 1 / 1.83e9
    expected = {
        "issue": 500 * clocks, "alu": 500 * clocks, "fma": (50 + 100) * clocks, "special": 0.0,
        "load/store": 600 * clocks, "tensor": 1e-6, "L2": 1e-6, "DRAM": 1e-6,
    }  # fmt: skip
    assert EXAMPLE.limits(H100) == pytest.approx(expected)
    assert tuple(expected) == cost.LIMITS
    assert EXAMPLE.bound(H100)[0] in ("tensor", "L2", "DRAM")


def test_the_busiest_multiprocessor_counts() -> None:
    """One block more than fits evenly: a third round for one of them, each block doing as much as before."""
    more = replace(EXAMPLE, grid=265, instructions=265 * 1000)
    assert more.limits(H100)["issue"] == pytest.approx(1.5 * EXAMPLE.limits(H100)["issue"])


def test_residency() -> None:
    """132 registers: 4352 a warp in units of 256, 17408 for 4 warps, of 65536."""
    assert EXAMPLE.resident(H100) == 3 and EXAMPLE.waves(H100) == pytest.approx(264 / (3 * 132))
    assert replace(EXAMPLE, registers=32, shared=100 << 10).resident(H100) == 2  # 228 KiB, 1 of each reserved
    assert replace(EXAMPLE, registers=32, warps=1).resident(H100) == 32  # blocks
    assert replace(EXAMPLE, registers=32).resident(GPUS["RTX 4090"]) == 12  # 48 warps


def test_a_gpu_names_whose_code_is_counted() -> None:
    assert report.parse([]).gpu == "H100"
    assert report.parse(["--capability", "80"]).gpu == "A100"
    assert report.parse(["--gpu", "B200"]).capability == 90
    assert report.parse(["--gpu", "RTX 4090"]).capability == 80


def test_a_table_has_a_row_a_kernel_and_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("title", [EXAMPLE], H100)
    title, *_, row, total = capsys.readouterr().out.rstrip().splitlines()
    assert title == "title" and row.split()[:4] == ["op", "(example)", "1x2x3x4", "5"]
    assert total.split() == ["total", "5", "5"]
