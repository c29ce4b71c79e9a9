"""bench.convergence end to end on the CPU, its verdict, and what costs a run."""

import json
import math

import pytest
import torch

from bench.convergence import run as convergence
from bench.convergence.run import Run
from tests.support.train_cases import write_photos

ABOUT = {"model": "stvit_tiny", "size": 32, "batch": 16, "dtype": "float32"}
TINY = "--model stvit_tiny --input-size 32 --batch-size 16 --num_workers 0 --threads 1 --no-repeated-aug".split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


def test_end_to_end(photos, tmp_path, capsys):
    """The reference as its own contender repeats itself; with another seed it doesn't."""
    out = tmp_path / "convergence.json"
    arguments = ["--device", "cpu", "--data", str(photos), "--epochs", "2", *TINY, "--out", str(out)]
    assert convergence.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "passed" in printed and "CPU: a trial of the tool" in printed
    content = json.loads(out.read_text())
    assert content["benchmark"] == "convergence" and content["environment"]["device"] == "cpu" and content["passed"]
    first, second, again = content["rows"]
    assert (first["seed"], second["seed"], again["seed"]) == (0, 1, 0) and first["size"] == 32
    for row in content["rows"]:
        assert [step for step, _ in row["curves"]["loss"]] == list(range(1, 7))
        assert row["curves"]["accuracy"][-1] == [6, row["final_accuracy"]]
        assert 0 < row["seconds_to_target"] <= row["seconds"]
    assert second["distance"] == content["yardstick"] and "distance" not in first and "passed" not in second
    assert content["yardstick"]["mean"] > 0 and again["distance"] == {"mean": 0, "largest": 0} and again["passed"]
    assert content["target_accuracy"] <= min(row["final_accuracy"] for row in content["rows"]) + 1


def test_what_fails_is_an_error_of_its_run(photos, tmp_path):
    flags = ["--data-set", "FOLDER", "--data-path", str(photos), "--device", "cpu", *TINY]
    diverged, late = Run("reference", 0), Run("reference", 0)
    convergence.train(diverged, [*flags, "--lr", "1e30", "--warmup-epochs", "0"], 16, math.inf)
    assert "the loss is" in diverged.error
    convergence.train(late, flags, 16, 0.1)
    assert late.error and not late.losses


def test_a_compiled_contender_draws_as_an_uncompiled_one(run_python):
    program = convergence.PROGRAM.format(f"{convergence.SAME_DRAWS}; print(torch._inductor.config.fallback_random)")
    assert run_python("-c", program, "--list-recipes").stdout.startswith("True\n")


def run(name, seed, losses, accuracies=(0.5,)):
    return Run(name, seed, list(losses), [(i + 1, i + 1.0, a) for i, a in enumerate(accuracies)])


@pytest.mark.parametrize(
    ("loss", "passed"), [(1.0, True), (1.09, True), (1.11, False), (0.89, False), (math.nan, False), (math.inf, False)]
)
def test_verdict(loss, passed):
    runs = [run("reference", 0, [1.0] * 40), run("reference", 1, [1.1] * 40), run("triton", 0, [loss] * 40)]
    rows, about = convergence.as_rows(runs, ABOUT)
    assert about["passed"] == rows[2]["passed"] == passed
    assert about["yardstick"] == pytest.approx({"mean": 0.1, "largest": 0.1})
    json.dumps([rows, about], allow_nan=False)


def test_no_verdict_without_a_yardstick_or_a_contender():
    runs = [run("reference", 0, [1.0] * 9), run("reference", 1, []), run("triton", 0, [1.0] * 9)]
    runs[1].error = "broke"
    rows, about = convergence.as_rows(runs, ABOUT)
    assert not about["passed"] and not rows[2]["passed"] and about["yardstick"] is None
    assert not convergence.as_rows(runs[:1] + [run("reference", 1, [2.0])], ABOUT)[1]["passed"]


def test_distance_is_that_of_smoothed_losses_as_far_as_both_go():
    noise = torch.tensor([1.0, -1.0] * 100)
    a, b = run("a", 0, noise.tolist()), run("b", 0, (-noise + 0.25).tolist())
    assert convergence.distance(a, b) == pytest.approx(
        {"mean": 0.25, "largest": 0.25}
    )  # the window of 10 steps averages the noise away
    assert convergence.distance(a, a) == {"mean": 0, "largest": 0}
    longer = run("longer", 0, [*a.losses, 99.0])
    assert convergence.distance(a, longer) == {"mean": 0, "largest": 0}


def test_time_to_the_same_accuracy():
    runs = [run("reference", 0, [1.0] * 3, (0.2, 0.6, 0.5)), run("triton", 0, [1.0] * 3, (0.6, 0.9, 0.7))]
    rows, about = convergence.as_rows(runs, ABOUT)
    assert about["target_accuracy"] == 0.6
    assert [row["seconds_to_target"] for row in rows] == [2.0, 1.0]
    runs[1].points.clear()  # it ended before its first test
    rows, about = convergence.as_rows(runs, ABOUT)
    assert about["target_accuracy"] is rows[0]["seconds_to_target"] is rows[1]["final_accuracy"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contenders", "triton"], "triton can't take part: it needs tensors on a CUDA device"),
        (["--contenders", "reference+other"], "expected one of cuda, triton, reference"),
        (["--data", "nowhere", "--epochs", "few"], "--epochs: invalid int value"),
        (["--learning", "1"], "unrecognized arguments: --learning"),
        (["--minutes", "0"], "--minutes: expected more than 0"),
    ],
)
def test_wrong_command_lines(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        convergence.main(["--device", "cpu", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err
