"""The training program: what it writes, resuming, evaluating, fine-tuning, several processes, and errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stvit
from stvit.train.cli import main

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}
# A run of three steps an epoch, with everything random on: mixup, cutmix, AutoAugment, erasing, drop path, averaging.
SMALL = "--model stvit_tiny --input-size 32 --batch-size 16 --num_workers 0 --threads 1 --device cpu --lr 0.02".split()


def write_images(folder, counts, seed=0):
    """``folder``/CLASS/*.png of noisy colours: {class: number of images}."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = random.integers(-30, 30, (40, 36, 3))
            pixels = np.clip(np.array(COLOURS.get(name, (128, 128, 128))) + noise, 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """48 training and 13 test images: an odd number, for two processes."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "train", dict.fromkeys(COLOURS, 16))
    write_images(root / "val", {"blue": 4, "green": 4, "red": 5}, seed=1)
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The output folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main([*flags(photos), "--epochs", "2", "--output_dir", str(folder)]) == 0
    return folder


def flags(photos, *more):
    return [*SMALL, "--data-set", "FOLDER", "--data-path", str(photos), *more]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(path):
    return torch.load(path, weights_only=True)


def assert_equal(one, other):
    """Nested containers with bitwise equal tensors."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other


def one_line_error(capsys, arguments, *expected, code=2):
    """Run in this process; the exit code is `code` and stderr one line with all of `expected`."""
    assert main(arguments) == code
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("main.py: "), error
    for text in expected:
        assert text in error


# --- what a run does and leaves behind


def test_digits_are_learnt(tmp_path, capsys):
    arguments = ["--input-size", "32", "--epochs", "2", "--device", "cpu", "--output_dir", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    introduction = printed.splitlines()[0]
    for text in ("stvit_tiny, 2,277,594 parameters", "CPU", "backend reference", "1,437 training and 360 test images"):
        assert text in introduction
    assert "DIGITS implies" in printed and "--mixup 0" in printed and "--input-size" not in printed
    epochs, steps = rows(tmp_path / "log.txt"), rows(tmp_path / "steps.jsonl")
    assert [row["epoch"] for row in epochs] == [0, 1]
    assert [row["step"] for row in steps] == list(range(1, 45))
    assert epochs[1]["test_acc1"] > 70 and epochs[1]["test_acc5"] > epochs[1]["test_acc1"]
    assert epochs[1]["train_loss"] == pytest.approx(np.mean([row["loss"] for row in steps[22:]]), abs=1e-5)
    assert epochs[0]["n_parameters"] == 2277594
    assert {"test_loss", "images_per_s", "lr", "seconds"} <= epochs[0].keys()


def test_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {"log.txt", "steps.jsonl", "curve.png", "checkpoint.pth", "best.pth"}  # nothing partial left over
    with Image.open(trained / "curve.png") as curve:
        assert curve.width > 500
        assert len(curve.convert("L").getcolors()) > 20  # not blank
    last = contents(trained / "checkpoint.pth")
    assert last["epoch"] == 1 and last["step"] == 6 and last["args"]["model"] == "stvit_tiny"
    assert last["max_accuracy"] == max(row["test_acc1"] for row in rows(trained / "log.txt"))
    assert last.keys() == {"model", "model_ema", "optimizer", "lr_scheduler", "epoch", "step", "max_accuracy", "args"}
    stvit.load_checkpoint(stvit.stvit_tiny(num_classes=3), trained / "best.pth")


def test_resuming_repeats_an_unbroken_run(photos, trained, tmp_path):
    """Two epochs at once, and one, then one more: bitwise the same state, and no line lost or doubled."""
    arguments = flags(photos, "--epochs", "2", "--output_dir", str(tmp_path))
    assert main([*arguments, "--max-steps", "3"]) == 0
    assert contents(tmp_path / "checkpoint.pth")["epoch"] == 0
    with (tmp_path / "steps.jsonl").open("a") as file:  # what a killed second epoch leaves
        file.write('{"step": 4, "epoch": 1, "loss": 9.0, "lr": 1.0}\n{"step": 5, "epo')
    assert main(arguments) == 0
    whole, parts = contents(trained / "checkpoint.pth"), contents(tmp_path / "checkpoint.pth")
    del whole["args"], parts["args"]
    assert_equal(whole, parts)
    assert rows(trained / "steps.jsonl") == rows(tmp_path / "steps.jsonl")
    assert [row["epoch"] for row in rows(tmp_path / "log.txt")] == [0, 1]


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_plateau_is_resumed(photos, tmp_path):
    """The one schedule with a memory: without it, the rate decays a second time too late."""
    arguments = flags(
        photos, "--sched", "plateau", "--patience-epochs", "0", "--decay-rate", "0.5", "--warmup-epochs", "0"
    )
    for name, pieces in (("whole", ["5"]), ("parts", ["2", "5"])):
        for epochs in pieces:
            assert main([*arguments, "--epochs", epochs, "--output_dir", str(tmp_path / name)]) == 0
    whole, parts = (rows(tmp_path / name / "steps.jsonl") for name in ("whole", "parts"))
    assert whole == parts
    assert whole[-1]["lr"] < whole[0]["lr"]


def test_more_epochs_follow_the_longer_schedule(photos, tmp_path):
    arguments = flags(photos, "--warmup-epochs", "0", "--sched-on-updates")
    for name, pieces in (("whole", ["3"]), ("parts", ["1", "3"])):
        for epochs in pieces:
            assert main([*arguments, "--epochs", epochs, "--output_dir", str(tmp_path / name)]) == 0
    whole, parts = ([row["lr"] for row in rows(tmp_path / name / "steps.jsonl")] for name in ("whole", "parts"))
    assert whole[0] == parts[0] == 0.02 * 16 / 512
    assert whole[3:] == parts[3:]


def test_workers_draw_the_same_numbers_after_resuming(photos, tmp_path):
    losses = []
    for name, pieces in (("whole", ["4"]), ("parts", ["2", "4"])):
        for steps in pieces:
            arguments = flags(photos, "--batch-size", "24", "--num_workers", "1", "--max-steps", steps, "--epochs", "9")
            assert main([*arguments, "--output_dir", str(tmp_path / name)]) == 0
        losses.append(rows(tmp_path / name / "steps.jsonl"))
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_a_finished_run_says_so(photos, trained, capsys):
    before = (trained / "checkpoint.pth").read_bytes()
    assert main([*flags(photos), "--epochs", "2", "--output_dir", str(trained)]) == 0
    printed = capsys.readouterr().out
    best = contents(trained / "best.pth")["max_accuracy"]
    for text in ("already finished", f"{best:.2f} %", "--eval", "--epochs", "rm -r"):
        assert text in printed
    assert (trained / "checkpoint.pth").read_bytes() == before


def test_evaluation_gives_the_logged_accuracy(photos, trained, capsys):
    assert main([*flags(photos), "--eval", "--resume", str(trained / "checkpoint.pth")]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    last = rows(trained / "log.txt")[-1]
    assert f"accuracy {last['test_acc1']:.2f} %" in printed and f"loss {last['test_loss']:.4f}" in printed
    assert "on 13 test images" in printed


def test_evaluation_needs_no_training_images(photos, trained, tmp_path, capsys):
    (tmp_path / "test").symlink_to(photos / "val")  # the folder's other name, too
    assert main([*flags(tmp_path), "--eval", "--eval-ema", "--resume", str(trained / "best.pth")]) == 0
    assert "(averaged weights): accuracy" in capsys.readouterr().out


def test_finetuning_replaces_the_head(trained, tmp_path, capsys):
    write_images(tmp_path / "train", {"blue": 8, "grey": 8})
    write_images(tmp_path / "test", {"blue": 2, "grey": 2}, seed=1)
    output = tmp_path / "run"
    arguments = [*flags(tmp_path), "--finetune", str(trained / "best.pth"), "--epochs", "1", "--warmup-epochs", "0"]
    # At a rate of 0 the file's weights must come out as they went in: the mode leaves BatchNorm's statistics alone.
    assert main([*arguments, "--lr", "0", "--min-lr", "0", "--warmup-lr", "0", "--output_dir", str(output)]) == 0
    assert "head for 3 classes is replaced by a fresh one for 2" in capsys.readouterr().out
    old, new = contents(trained / "best.pth")["model"], contents(output / "checkpoint.pth")["model"]
    assert new["head.weight"].shape == (2, 1024)
    assert_equal(*({k: v for k, v in weights.items() if not k.startswith("head")} for weights in (old, new)))
    train_mode = [*arguments, "--finetune-mode", "train", "--output_dir", str(tmp_path / "run2")]
    assert main(train_mode) == 0
    new = contents(tmp_path / "run2" / "checkpoint.pth")["model"]
    assert not torch.equal(new["norm.running_mean"], old["norm.running_mean"])


def test_other_models_of_timm_and_distillation(photos, trained, tmp_path, capsys):
    arguments = flags(
        photos, "--max-steps", "1", "--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--no-repeated-aug"
    )
    teacher = ["--teacher-model", "stvit_tiny", "--teacher-path", str(trained / "best.pth")]
    for kind in ("soft", "hard"):
        output = str(tmp_path / kind)
        assert (
            main([*arguments, "--model", "test_vit", *teacher, "--distillation-type", kind, "--output_dir", output])
            == 0
        )
    assert "backend none (timm's model)" in capsys.readouterr().out
    assert np.isfinite(rows(tmp_path / "soft" / "steps.jsonl")[0]["loss"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision(photos, tmp_path, capsys, dtype):
    more = ["--amp", "--amp-dtype", dtype, "--max-steps", "2", "--clip-grad", "1", "--no-channels-last"]
    assert main([*flags(photos), *more, "--output_dir", str(tmp_path), "--tensorboard"]) == 0
    assert f"{'bfloat16' if dtype == 'bf16' else 'float16'} autocast" in capsys.readouterr().out
    assert ("scaler" in contents(tmp_path / "checkpoint.pth")) == (dtype == "fp16")
    assert list((tmp_path / "tensorboard").iterdir())


def test_progress_on_a_terminal(photos, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard output for a terminal
    assert main([*flags(photos), "--max-steps", "2", "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "━" in printed and re.search(r"loss \d+\.\d+, [\d,]+ images/s", printed)


def test_no_output_dir_saves_nothing(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*flags(photos), "--max-steps", "1"]) == 0
    assert list(tmp_path.iterdir()) == []


# --- several processes


def run_program(*arguments, env=None, launcher=("-m", "stvit.train")):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, text=True, capture_output=True, timeout=300)


def test_two_processes(photos, tmp_path, capsys):
    """13 test images counted by two processes give exactly the accuracy that one process finds."""
    output = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "stvit.train")
    more = ["--epochs", "1", "--batch-size", "8", "--output_dir", str(output)]
    child = run_program(*flags(photos), *more, launcher=launcher)
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("2 processes") == 1  # one of them prints
    assert len(rows(output / "steps.jsonl")) == 3
    assert main([*flags(photos), "--eval", "--resume", str(output / "checkpoint.pth")]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    (logged,) = rows(output / "log.txt")
    assert f"accuracy {logged['test_acc1']:.2f} %" in printed and f"loss {logged['test_loss']:.4f}" in printed
    assert logged["test_acc1"] * 13 / 100 == pytest.approx(round(logged["test_acc1"] * 13 / 100), abs=1e-9)


# --- errors and interruption


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--model stvit_smal", "stvit_small"),
        ("--backend opencl", "opencl"),
        ("--backend cuda --device cpu", "cuda"),
        ("--amp-dtype int8 --amp", "int8"),
        ("--data-set FOLDER", "--data-path"),
        ("--data-path /nowhere/at/all", "/nowhere/at/all"),
        ("--resume /nowhere.pth", "/nowhere.pth"),
        ("--device tpu", "tpu"),
        ("--opt nope", "nope"),
        ("--sched nope", "nope"),
        ("--aa nope", "nope"),
        ("--batch-size 5000", "--batch-size"),
        ("--batch-size 15 --mixup 0.8", "even"),
        ("--epochs 0", "--epochs"),
        ("--epochs many", "--epochs"),
        ("--bogus", "--bogus"),
        ("--eval", "--resume"),
        ("--distillation-type soft", "--teacher-path"),
    ],
)
def test_user_errors(arguments, expected, capsys):
    one_line_error(capsys, ["--input-size", "32", "--output_dir", "", *arguments.split()], expected)


def test_bad_folders(tmp_path, photos, capsys):
    one_line_error(capsys, flags(tmp_path), str(tmp_path), "train")
    write_images(tmp_path / "train", {"blue": 16, "red": 16})
    one_line_error(capsys, flags(tmp_path), "val or test")
    write_images(tmp_path / "val", {"blue": 1, "teal": 1})
    one_line_error(capsys, flags(tmp_path), "teal")
    (tmp_path / "train" / "teal").mkdir()
    one_line_error(capsys, flags(tmp_path), "train/teal", "no images")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_is_named(tmp_path, photos, capsys, workers):
    write_images(tmp_path / "train", {"blue": 16})
    (tmp_path / "val").symlink_to(tmp_path / "train")
    victim = tmp_path / "train" / "blue" / "7.png"
    victim.write_bytes(victim.read_bytes()[:200])
    one_line_error(capsys, [*flags(tmp_path), "--num_workers", workers], "blue/7.png", "not a readable image")


def test_bad_checkpoints(tmp_path, photos, trained, capsys):
    (tmp_path / "junk.pth").write_bytes(b"no checkpoint")
    one_line_error(capsys, [*flags(photos), "--resume", str(tmp_path / "junk.pth")], "junk.pth")
    best = str(trained / "best.pth")
    one_line_error(capsys, [*flags(photos), "--resume", best, "--model", "stvit_small"], "stvit_tiny", "stvit_small")
    one_line_error(capsys, ["--input-size", "32", "--eval", "--resume", best], "best.pth", "head.weight")
    one_line_error(capsys, [*flags(photos), "--finetune", best, "--model", "test_vit"], "best.pth")
    one_line_error(capsys, [*flags(photos), "--resume", best, "--opt", "sgd", "--epochs", "3"], "best.pth", "sgd")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, photos, capsys):
    explosive = ["--epochs", "3", "--warmup-epochs", "1", "--lr", "1e30", "--output_dir", str(tmp_path)]
    one_line_error(capsys, flags(photos, *explosive), "the loss is", "step", code=1)
    assert contents(tmp_path / "checkpoint.pth")["epoch"] == 0
    assert len(rows(tmp_path / "log.txt")) == 1


def test_ctrl_c_while_a_loader_starts(photos, tmp_path, run_python):
    """PyTorch's loader is then half made, and its destructor raises."""
    arguments = flags(photos, "--epochs", "2", "--num_workers", "1", "--output_dir", str(tmp_path))
    code = f"""
import sys
from torch.utils.data import dataloader
from stvit.train.cli import main
def start(self, loader):
    raise KeyboardInterrupt
dataloader._MultiProcessingDataLoaderIter.__init__ = start
sys.exit(main({arguments!r}))
"""
    child = run_python("-c", code, check=False)
    assert child.returncode == 130 and "interrupted" in child.stderr, child.stderr
    assert "Traceback" not in child.stderr + child.stdout


def test_ctrl_c(photos, tmp_path):
    arguments = flags(photos, "--epochs", "500", "--num_workers", "1", "--output_dir", str(tmp_path))
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "main.py", *arguments]
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pth").exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the workers too
    output, error = child.communicate(timeout=60)
    assert child.returncode == 130, error
    assert "Traceback" not in error + output
    assert "interrupted" in error and "checkpoint.pth" in error and "resumes" in error
    done = contents(tmp_path / "checkpoint.pth")["epoch"] + 1
    assert main([*arguments, "--num_workers", "0", "--epochs", str(done + 1)]) == 0
    assert [row["epoch"] for row in rows(tmp_path / "log.txt")] == list(range(done + 1))
