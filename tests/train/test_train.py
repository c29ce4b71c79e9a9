"""The training program: what it writes, resuming, evaluating, fine-tuning, several processes, and errors."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stvit
from stvit.train.cli import main
from stvit.train.log import JsonLines
from tests.support.train_cases import (
    COLOURS,
    SMALL,
    assert_equal,
    contents,
    flags,
    one_line_error,
    rows,
    write_images,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """The output folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert main([*flags(photos), "--epochs", "2", "--output_dir", str(folder)]) == 0
    return folder


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
    logs, weights = (
        {"config.yaml", "log.txt", "steps.jsonl", "curve.png"},
        {"checkpoint", "previous", "best", "best_ema"},
    )
    assert names == logs | {f"{name}.pth" for name in weights}  # nothing partial left over
    with Image.open(trained / "curve.png") as curve:
        assert curve.width > 500
        assert len(curve.convert("L").getcolors()) > 20  # not blank
    last = contents(trained / "checkpoint.pth")
    assert last["epoch"] == 1 and last["step"] == 6 and last["args"]["model"] == "stvit_tiny"
    assert last["max_accuracy"] == max(row["test_acc1"] for row in rows(trained / "log.txt"))
    published = {"model", "model_ema", "optimizer", "lr_scheduler", "epoch", "max_accuracy", "args"}
    own = {"step", "batch", "batch_images", "sums", "classes", "max_accuracy_ema"}
    assert last.keys() == published | own and last["classes"] == sorted(COLOURS)
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
    last = rows(trained / "log.txt")[-1]
    for more, name in (([], ""), (["--eval-ema"], "_ema")):
        assert main([*flags(photos), "--eval", *more, "--resume", str(trained / "checkpoint.pth")]) == 0
        printed = capsys.readouterr().out.splitlines()[-1]
        assert f"accuracy {last['test_acc1' + name]:.2f} %" in printed
        assert f"loss {last['test_loss' + name]:.4f}" in printed
        assert "on 13 test images" in printed and "images/s" in printed
    assert main([*flags(photos), "--eval", "--resume", str(trained / "best_ema.pth")]) == 0
    best = max(row["test_acc1_ema"] for row in rows(trained / "log.txt"))
    assert f"accuracy {best:.2f} %" in capsys.readouterr().out.splitlines()[-1]


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
    assert "━" in printed and re.search(r"loss \d+\.\d+, lr \S+, [\d,]+ images/s", printed)


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
    (logged,) = rows(output / "log.txt")
    for more, name in (([], ""), (["--eval-ema"], "_ema")):
        assert main([*flags(photos), "--eval", *more, "--resume", str(output / "checkpoint.pth")]) == 0
        printed = capsys.readouterr().out.splitlines()[-1]
        assert f"accuracy {logged['test_acc1' + name]:.2f} %" in printed
        assert f"loss {logged['test_loss' + name]:.4f}" in printed
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
        ("--clip-grad -1", "--clip-grad must be above 0"),
        ("--mixup-mode foo", "elem"),
        ("--model-ema-decay 7", "at most 1"),
        ("--smoothing 5", "below 1"),
        ("--reprob -3", "at least 0"),
        ("--weight-decay -1", "--weight-decay"),
        ("--weight-decay nan", "nan"),
        ("--lr inf", "finite"),
        ("--remode foo", "pixel"),
        ("--opt-betas 0.9 1.5", "--opt-betas"),
        ("--scale 0.9 0.5", "MIN <= MAX"),
        ("--cutmix-minmax 0.2 3", "--cutmix-minmax"),
        ("--drop-path 1", "below 1"),
        ("--drop-path-schedule 5:0.1", "from epoch 0"),
        ("--drop-path-schedule 0:0.4,x", "EPOCH:P"),
        ("--save-every -1", "--save-every"),
        ("--batch-size 1 --mixup 0 --cutmix 0", "BatchNorm"),
        ("--recipe huge-224", "small-224"),
        ("--config /nowhere.yaml", "/nowhere.yaml"),
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
def test_a_damaged_image_is_named(tmp_path, capsys, workers):
    """Or skipped, if so many may be: another takes its place in training, and the test set is smaller by it."""
    write_images(tmp_path / "train", {"blue": 16})
    write_images(tmp_path / "val", {"blue": 5})
    for victim in ("train/blue/7.png", "val/blue/2.png"):
        (tmp_path / victim).write_bytes((tmp_path / victim).read_bytes()[:200])
    arguments = [*flags(tmp_path), "--num_workers", workers, "--epochs", "1", "--no-repeated-aug"]
    one_line_error(capsys, arguments, "blue/7.png", "not a readable image")
    assert main([*arguments, "--max-bad-images", "1"]) == 2
    skipped, error = capsys.readouterr().err.strip().splitlines()
    assert "skipped" in skipped and "train/blue/7.png" in skipped
    assert "val/blue/2.png" in error and "more than --max-bad-images 1" in error


def test_damaged_images_are_skipped(tmp_path, capsys):
    write_images(tmp_path / "train", {"blue": 8, "red": 8})
    write_images(tmp_path / "val", {"blue": 5})
    for victim in ("train/blue/7.png", "val/blue/2.png"):
        (tmp_path / victim).write_bytes(b"")
    output = tmp_path / "run"
    arguments = [*flags(tmp_path), "--epochs", "1", "--no-repeated-aug", "--max-bad-images", "2"]
    assert main([*arguments, "--output_dir", str(output)]) == 0
    printed = capsys.readouterr()
    assert "2 unreadable images skipped" in printed.out
    assert [line for line in printed.err.splitlines() if "skipped" in line and "7.png" in line]
    assert rows(output / "log.txt")[0]["bad_images"] == 2
    assert main([*arguments, "--eval", "--output_dir", str(output)]) == 0
    assert "on 4 test images" in capsys.readouterr().out


def test_classes_are_those_of_the_checkpoint(photos, trained, tmp_path, capsys):
    """A test folder without the first class is numbered as the model was trained; another class is named."""
    for name in ("green", "red"):
        write_images(tmp_path / "val", {name: 4}, seed=1)
    resume = [*flags(tmp_path), "--eval", "--resume", str(trained / "best.pth")]
    assert main(resume) == 0
    part = capsys.readouterr().out
    write_images(tmp_path / "val", {"blue": 4}, seed=1)
    assert main(resume) == 0
    assert "on 8 test images" in part and "on 12 test images" in capsys.readouterr().out
    (tmp_path / "val" / "red").rename(tmp_path / "val" / "crimson")
    one_line_error(capsys, resume, "crimson", "3 classes of", "best.pth", "--finetune")
    (tmp_path / "train").symlink_to(tmp_path / "val")
    resume = [*flags(tmp_path), "--resume", str(trained / "best.pth"), "--epochs", "9"]
    one_line_error(capsys, resume, "crimson", "--finetune")
    (tmp_path / "val" / "crimson").rename(tmp_path / "elsewhere")
    one_line_error(capsys, resume, "no folder for class red")


def test_renamed_classes_change_no_label(photos, trained, tmp_path, capsys):
    """Only red images, under the name that sorts first: their label is still red's."""
    write_images(tmp_path / "val", {"red": 6}, seed=1)
    red = [*flags(tmp_path), "--eval", "--resume", str(trained / "best.pth")]
    assert main(red) == 0
    loss = re.search(r"loss ([\d.]+)", capsys.readouterr().out.splitlines()[-1])[1]
    (tmp_path / "val" / "blue").mkdir()
    (tmp_path / "val" / "blue" / "0.png").symlink_to(tmp_path / "val" / "red" / "0.png")
    assert main(red) == 0
    assert loss != re.search(r"loss ([\d.]+)", capsys.readouterr().out.splitlines()[-1])[1]


def test_the_best_of_another_folder_is_not_this_ones(photos, trained, tmp_path, capsys):
    """Resuming elsewhere: the table's best accuracy is that of the best.pth beside it."""
    best = contents(trained / "best.pth")
    torch.save(best | {"max_accuracy": 99.5}, tmp_path / "other.pth")
    output = tmp_path / "run"
    arguments = flags(photos, "--resume", str(tmp_path / "other.pth"), "--epochs", "3", "--output_dir", str(output))
    assert main(arguments) == 0
    assert "99.5" not in capsys.readouterr().out
    assert contents(output / "best.pth")["max_accuracy"] == max(row["test_acc1"] for row in rows(output / "log.txt"))


def test_the_seed_orders_repeated_images(photos, tmp_path):
    losses = []
    for seed in ("0", "1", "0"):
        output = tmp_path / str(len(losses))
        plain = "--mixup 0 --cutmix 0 --aa none --reprob 0 --scale 1 1 --hflip 0 --color-jitter 0 --drop-path 0".split()
        arguments = flags(photos, *plain, "--seed", seed, "--max-steps", "2", "--lr", "0", "--output_dir", str(output))
        assert main([*arguments, "--finetune", str(tmp_path / "0" / "best.pth")] if losses else arguments) == 0
        losses.append([row["loss"] for row in rows(output / "steps.jsonl")])
    assert losses[0] != losses[1]


def test_a_killed_loader_process_is_one_line(photos, capsys, monkeypatch):
    from stvit.train import images

    def die(image, path):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(images, "_as_rgb", die)
    one_line_error(capsys, flags(photos, "--num_workers", "1"), "memory", "--num_workers", code=1)


@contextmanager
def disk_of(size):
    """No file can grow beyond ``size`` bytes: the system refuses, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(photos, tmp_path, capsys):
    """Older files stay as they are, and nothing half written is left."""
    output = tmp_path / "run"
    arguments = flags(photos, "--epochs", "2", "--output_dir", str(output))
    assert main([*arguments, "--max-steps", "3"]) == 0
    capsys.readouterr()
    kept = {path.name: path.read_bytes() for path in output.iterdir()}
    for size, name in ((100, "config.yaml"), (100_000, ".pth")):
        with disk_of(size):
            one_line_error(capsys, arguments, str(output), name, "file too large; files that were there", code=1)
        assert {path.name for path in output.iterdir()} == kept.keys()
        assert (output / "log.txt").read_bytes().startswith(kept["log.txt"])
        for name in ("checkpoint.pth", "curve.png"):
            assert kept[name] == (output / name).read_bytes()
    assert main(arguments) == 0


def test_a_log_on_a_full_disk_names_the_file(tmp_path):
    lines = JsonLines(tmp_path / "log.txt", lambda row: True)
    lines.append({"epoch": 0})
    with disk_of(20), pytest.raises(OSError, match=r"too large.*log\.txt"):
        lines.append({"epoch": 1})
    assert JsonLines(tmp_path / "log.txt", lambda row: True).rows == [{"epoch": 0}]


def test_recipes_and_config(photos, tmp_path, capsys):
    assert main(["--list-recipes"]) == 0
    assert "large-224-schedule" in capsys.readouterr().out
    first, second = tmp_path / "first", tmp_path / "second"
    size = ["--opt-betas", "0.9", "0.98", "--layer-decay", "0.8", "--max-steps", "2"]
    assert main([*flags(photos, *size), "--recipe", "large-224-schedule", *SMALL, "--output_dir", str(first)]) == 0
    config = (first / "config.yaml").read_text()
    assert "drop_path_schedule: 0:0.4,260:0.6" in config and "output_dir" not in config
    assert main(["--config", str(first / "config.yaml"), "--output_dir", str(second)]) == 0
    assert rows(first / "steps.jsonl") == rows(second / "steps.jsonl")
    (tmp_path / "bad.yaml").write_text("learning_rate: 3\n")
    one_line_error(capsys, ["--config", str(tmp_path / "bad.yaml")], "bad.yaml", "learning_rate")
    (tmp_path / "bad.yaml").write_text("lr: [much\n")
    one_line_error(capsys, ["--config", str(tmp_path / "bad.yaml")], "bad.yaml", "YAML")


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
    one_line_error(capsys, flags(photos, *explosive), "the loss is", "step", "checkpoint.pth is from before", code=1)
    assert contents(tmp_path / "checkpoint.pth")["epoch"] == 0
    assert len(rows(tmp_path / "log.txt")) == 1
    early = flags(photos, "--warmup-epochs", "0", "--lr", "1e30", "--output_dir", str(tmp_path / "early"))
    one_line_error(capsys, early, "no checkpoint was saved before", code=1)


def test_ctrl_c_while_a_loader_starts(photos, tmp_path, run_python):
    """PyTorch's loader is then half made, and its destructor raises."""
    arguments = flags(photos, "--epochs", "2", "--num_workers", "1", "--output_dir", str(tmp_path))
    code = f"""
import sys
from torch.utils.data import dataloader
from stvit.train.cli import main
from stvit.train.log import JsonLines
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
