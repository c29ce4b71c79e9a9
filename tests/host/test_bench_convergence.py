"""bench.convergence end to end on the CPU, its verdict, and that every contender sees the same batches."""

import json
import math
import time

import pytest
import torch
from PIL import Image

from bench.convergence import data as convergence_data
from bench.convergence import run as convergence
from bench.convergence import trainer as convergence_runs
from bench.convergence.data import Batches, DataError, Images
from bench.convergence.trainer import Run


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """An ImageFolder tree of two classes, told apart by colour, wider than high."""
    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("val", 10)):
        for label, name in enumerate(("blue", "red")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 120, (40, 48, 3), generator=generator, dtype=torch.uint8)
                pixels[..., 2 - 2 * label] += 120
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{index}.jpg")
    return root


TINY = "--device cpu --size 32 --batch 8 --steps 12".split()


def test_end_to_end(run_python, photographs, tmp_path):
    out = tmp_path / "convergence.json"
    arguments = ["-m", "bench.convergence", "--data", str(photographs), *TINY, "--out", str(out)]
    done = run_python(*arguments, env={"OMP_NUM_THREADS": "1"})
    assert "passed" in done.stdout and "CPU: a trial of the tool" in done.stdout
    content = json.loads(out.read_text())
    assert content["benchmark"] == "convergence" and content["environment"]["device"] == "cpu" and content["passed"]
    first, second, compiled = content["rows"]
    assert [first["contender"], second["contender"], compiled["contender"]] == ["reference"] * 2 + ["reference+compile"]
    assert (first["seed"], second["seed"], compiled["seed"]) == (0, 1, 0)
    for row in content["rows"]:
        assert [step for step, _ in row["curves"]["loss"]] == list(range(1, 13))
        assert row["curves"]["accuracy"][-1] == [12, row["final_accuracy"]]
        assert 0 < row["seconds_to_target"] <= row["seconds"] and row["images_per_s"] > 0
    assert second["distance"] == content["yardstick"] and "distance" not in first and "passed" not in second
    # Equal batches and equal draws of stochastic depth: what differs is rounding.
    assert compiled["distance"]["largest"] < 0.05 * content["yardstick"]["mean"] and compiled["passed"]
    assert content["target_accuracy"] <= min(row["final_accuracy"] for row in content["rows"]) + 1


def test_a_contender_that_trains_otherwise_fails(monkeypatch, photographs, tmp_path, capsys):
    build = convergence_runs.build

    def broken(name, options, classes):
        model = build(name, options, classes)
        if name == "authors":
            for parameter in model.parameters():
                parameter.register_hook(torch.neg)
        return model

    monkeypatch.setattr(convergence_runs, "build", broken)
    out = tmp_path / "convergence.json"
    arguments = ["--data", str(photographs), *TINY, "--contenders", "authors", "--out", str(out)]
    assert convergence.main(arguments) == 1
    row = json.loads(out.read_text())["rows"][2]
    assert row["contender"] == "authors" and not row["passed"] and "too far" in capsys.readouterr().out


def test_a_contender_that_raises_costs_itself_only(monkeypatch, photographs, tmp_path):
    build = convergence_runs.build
    monkeypatch.setattr(
        convergence_runs, "build", lambda name, *rest: 1 / 0 if name == "authors" else build(name, *rest)
    )
    out = tmp_path / "convergence.json"
    contenders = ["--contenders", "authors", "reference+compile"]
    assert convergence.main(["--data", str(photographs), *TINY, *contenders, "--out", str(out)]) == 1
    rows = json.loads(out.read_text())["rows"]
    assert rows[2]["error"] == "ZeroDivisionError: division by zero" and rows[3]["passed"]


def options(**changes):
    made = convergence.parser().parse_args(["--device", "cpu"])
    convergence.settle(made, torch.device("cpu"))
    vars(made).update(changes)
    return made


def run(name, seed, losses, accuracies=(0.5,)):
    return Run(name, seed, list(losses), [(i + 1, i + 1.0, a) for i, a in enumerate(accuracies)], seconds=9.0)


@pytest.mark.parametrize(
    ("loss", "passed"), [(1.0, True), (1.09, True), (1.11, False), (0.89, False), (math.nan, False), (math.inf, False)]
)
def test_verdict(loss, passed):
    runs = [run("reference", 0, [1.0] * 40), run("reference", 1, [1.1] * 40), run("triton", 0, [loss] * 40)]
    rows, about = convergence.as_rows(runs, options())
    assert about["passed"] == rows[2]["passed"] == passed
    assert about["yardstick"] == pytest.approx({"mean": 0.1, "largest": 0.1})
    json.dumps([rows, about], allow_nan=False)


def test_no_verdict_without_a_yardstick_or_a_contender():
    runs = [run("reference", 0, [1.0] * 9), run("reference", 1, []), run("triton", 0, [1.0] * 9)]
    runs[1].error = "broke"
    rows, about = convergence.as_rows(runs, options())
    assert not about["passed"] and not rows[2]["passed"] and about["yardstick"] is None
    assert not convergence.as_rows([run("reference", 0, [1.0]), run("reference", 1, [2.0])], options())[1]["passed"]


def test_distance_is_that_of_smoothed_losses():
    noise = torch.tensor([1.0, -1.0] * 100)
    a, b = run("a", 0, noise.tolist()), run("b", 0, (-noise + 0.25).tolist())
    assert convergence.distance(a, b) == pytest.approx((0.25, 0.25))  # the window of 10 steps averages the noise away
    assert convergence.distance(a, a) == (0, 0)


def test_time_to_the_same_accuracy():
    runs = [run("reference", 0, [1.0] * 3, (0.2, 0.6, 0.5)), run("triton", 0, [1.0] * 3, (0.6, 0.9, 0.7))]
    rows, about = convergence.as_rows(runs, options())
    assert about["target_accuracy"] == 0.6
    assert [row["seconds_to_target"] for row in rows] == [2.0, 1.0]


def test_steps_fit_the_budget():
    made = options(contenders=["authors", "reference+compile"], steps=1000)
    assert convergence.planned_steps(made, 0.1, math.inf) == 1000
    assert convergence.planned_steps(made, 0.1, 300) == (0.8 * 300 - 60) / (4 * 0.1)
    assert convergence.planned_steps(made, 0.1, 10_000) == 1000
    assert convergence.planned_steps(made, 10.0, 60) == 20


def test_a_run_without_time_is_an_error(photographs):
    found = convergence_data.image_folder(photographs, 32, 100, 100)
    late = Run("reference", 0)
    convergence.run_one(late, options(), found, {}, time.monotonic() - 1)
    assert late.error == "OutOfTime: no time was left to begin"


def test_images(photographs):
    found = convergence_data.image_folder(photographs, 32, 30, 100)
    assert found.train.pixels.shape == (30, 3, 32, 32) and found.train.pixels.dtype == torch.uint8
    assert found.test.pixels.shape[0] == 20 and found.classes == 2 and found.mirror
    colour = found.test.pixels.float().mean((2, 3))
    assert torch.equal(found.test.labels, (colour[:, 0] > colour[:, 2]).long())  # class 1 is "red"
    again = convergence_data.image_folder(photographs, 32, 30, 100)
    assert torch.equal(found.train.pixels, again.train.pixels)


def numbered(count, size=16):
    """Image n is n everywhere in channel 0, and its columns are numbered in channel 1."""
    pixels = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    pixels[:, 0] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    pixels[:, 1] = torch.arange(size, dtype=torch.uint8)
    return Images(pixels, torch.arange(count))


def test_batches_depend_on_seed_and_step_alone():
    batches = Batches(numbered(20), 4, 0, mirror=True)
    expected = [batches.at(step) for step in range(12)]
    torch.manual_seed(5)
    torch.rand(7)
    later = Batches(numbered(20), 4, 0, mirror=True)
    for step in (11, 3, 7):  # in any order
        images, labels = later.at(step)
        assert torch.equal(images, expected[step][0]) and torch.equal(labels, expected[step][1])
    other = Batches(numbered(20), 4, 1, mirror=True)
    assert any(not torch.equal(other.at(step)[1], expected[step][1]) for step in range(5))


@pytest.mark.parametrize("mirror", [True, False])
def test_batches_are_augmented_permutations(mirror):
    batches = Batches(numbered(20), 4, 3, mirror)
    mean, std = (torch.tensor(v)[:, None, None] for v in (convergence_data.MEAN, convergence_data.STD))
    shifts, mirrored = set(), set()
    for epoch in range(3):
        seen = []
        for step in range(epoch * 5, epoch * 5 + 5):
            images, labels = batches.at(step)
            assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
            pixels = ((images * std + mean) * 255).round().int()
            assert torch.equal(pixels[:, 0, 3, 3], labels.int())  # an image keeps its label
            for row in pixels[:, 1, 0]:
                middle = row[8] - row[7]
                mirrored.add(int(middle))
                shifts.add(int(row[8] - 8 if middle > 0 else row[7] - 8))
            seen += labels.tolist()
        assert sorted(seen) == list(range(20))
    assert mirrored == ({1, -1} if mirror else {1})
    assert shifts == {-2, -1, 0, 1, 2}  # an eighth of 16


def test_too_few_images_for_a_batch():
    with pytest.raises(DataError, match="a batch of 4 needs as many images"):
        Batches(numbered(3), 4, 0, mirror=False)


def test_digits_are_the_default_data():
    found = convergence_data.digits(32)
    assert len(found.train.labels) + len(found.test.labels) == 1797 and found.classes == 10 and not found.mirror
    assert found.train.pixels.shape[1:] == (3, 32, 32) and found.train.pixels.max() == 255


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contenders", "triton"], "triton can't take part: it needs tensors on a CUDA device"),
        (["--contenders", "reference"], "it is the baseline"),
        (["--contenders", "reference+other"], "expected one of cuda, triton, reference, authors"),
        (["--data", "nowhere"], "nowhere: expected the folders train and one of val, test"),
        (["--steps", "0"], "--steps: expected a whole number, at least 1"),
        (["--minutes", "0"], "--minutes: expected more than 0"),
        (["--drop-path", "1"], "--drop-path: expected a rate"),
        (["--batch", "5000"], "a batch of 5000 needs as many images"),
    ],
)
def test_wrong_command_lines(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        convergence.main(["--device", "cpu", *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_damaged_image_is_named(photographs, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "blue").mkdir(parents=True)
        (tmp_path / split / "blue" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken.jpg"):
        convergence_data.image_folder(tmp_path, 32, 9, 9)
