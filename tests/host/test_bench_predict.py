"""bench.predict: what a step takes with each kernel at its limit, and how far timed kernels are from it."""

import json

import pytest
import torch

from bench.machine import report as machine
from bench.machine.gpus import GPUS
from bench.predict import error, tables
from bench.predict import run as predict

needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="counts the ops of a CUDA build of PyTorch")
H100 = GPUS["H100"]


def case(side, mode="train"):
    return predict.Case("stvit_tiny", 64, mode, side, 2, False)


@needs_cuda_build
def test_each_op_takes_the_longer_of_its_limits():
    """A GPU whose tensor cores are slow is bound by products, one whose memory is slow by bytes."""
    found = predict.examine(case("authors", "inference"), H100)
    assert not found.launches and found.kernels > 100
    assert found.pytorch_s >= found.moved / H100.dram * (1 - 1e-9)  # up to the rounding of sums
    slow_memory = predict.examine(case("authors", "inference"), H100._replace(dram=1.0, tensor=1e30))
    assert slow_memory.pytorch_s == pytest.approx(found.moved)
    slow_products = predict.examine(case("authors", "inference"), H100._replace(dram=1e30, tensor=1.0))
    assert slow_products.pytorch_s > 2e6  # multiply-adds, twice each


@needs_cuda_build
def test_kernels_of_ours_are_launches_and_no_ops():
    found = predict.examine(case("ours"), H100)
    assert {launch.kernel for launch in found.launches} >= {"walk_kernel", "residual_depthwise_kernel"}
    assert len(found.launches) < found.kernels
    assert found.pytorch_s < found.moved / H100.dram + 1e-3


@needs_cuda_build
@pytest.mark.parametrize("side", ["authors", "ours"])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_what_the_readme_shows_is_what_the_code_moves(side, mode):
    """Of stvit_small; the other models run the same kernels. Kernels' times are those of bench.machine's ceiling, which
    test_bench_machine.py holds to the kernels."""
    recorded = json.loads(predict.RECORDED.read_text())
    stale = f"{predict.RECORDED.name} is not of this code any more: run python -m bench.predict --sizes 224 --record"
    case = predict.Case("stvit_small", 224, mode, side, 128, False)
    (row,) = [row for row in recorded["rows"] if case._asdict().items() <= row.items()]
    found = predict.examine(case, GPUS[recorded["gpu"]])
    assert (row["mb"], row["kernels"]) == (pytest.approx(found.moved / 128 / 1e6), found.kernels), stale
    of_pytorch = row["us"] - row["us_of_our_kernels"]
    assert of_pytorch == pytest.approx(found.pytorch_s / 128 * 1e6), stale
    if (side, mode) == ("ours", "train"):
        step = json.loads(machine.CEILING.read_text())["step_us"]
        assert row["us_of_our_kernels"] * 128 == pytest.approx(step, rel=0.005), stale


def test_lines_stand_side_by_side():
    rows = [
        {"model": "stvit_small", "size": 224, "mode": "train", "side": side, "mb": mb, "kernels": kernels, "us": us}
        for side, mb, kernels, us in (("authors", 800.4, 1600, 300.0), ("ours", 400.0, 1200, 150.0))
    ]
    (line,) = tables.predicted_lines(rows)[1]
    assert line == [
        "stvit_small", "224", "training step", "800", "400", "1600", "1200", "300", "150", "2.00x",
    ]  # fmt: skip


def test_timed_kernels_beside_predicted_ones(tmp_path, capsys):
    entries = [
        {"name": "walk_kernel", "ms": 0.3, "calls": 2.0},
        {"name": "walk_kernel", "ms": 0.1, "calls": 1.0},  # launched by another op
        {"name": "walking", "ms": 9.0, "calls": 1.0},
    ]
    profiles = [
        {"contender": "ours-triton", "mode": "train", "profile": {"kernels": entries}},
        {"contender": "ours-triton", "mode": "inference", "profile": {"kernels": entries}},
        {"contender": "authors", "mode": "train", "error": "out of memory"},
    ]
    costs = [
        {"kernel": "walk_kernel", "launches": 3, "limits": {"issue": 1e-4, "DRAM": 5e-5}},
        {"kernel": "fold_kernel", "launches": 1, "limits": {"issue": 1e-6}},
    ]
    walk, fold = error.compare(profiles, costs)
    assert walk["predicted_us"] == pytest.approx(300) and walk["timed_us"] == pytest.approx(400)
    assert walk["ratio"] == pytest.approx(4 / 3) and walk["timed_launches"] == 3
    assert fold["timed_us"] is None and fold["ratio"] is None
    files = tmp_path / "profile.json", tmp_path / "machine.json", tmp_path / "kernels.json"
    files[0].write_text(json.dumps({"rows": profiles, "environment": {"device": "cpu"}}))
    files[1].write_text(json.dumps({"rows": costs, "settings": {"gpu": "H100"}}))
    assert error.main([str(files[0]), str(files[1]), "--out", str(files[2])]) == 0
    assert json.loads(files[2].read_text())["rows"][0]["kernel"] == "walk_kernel"
    assert "walk_kernel" in capsys.readouterr().out
    files[0].write_text("{}")
    with pytest.raises(SystemExit) as ended:
        error.main([str(files[0]), str(files[1])])
    assert ended.value.code == 2
