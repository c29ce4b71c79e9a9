"""What ends the training program early: wrong flags and files, a loss that is not finite, Ctrl-C, a full disk."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import stvit
from stvit.train.cli import main, parse_args
from stvit.train.data import build_transform
from stvit.train.images import read_image
from stvit.train.log import JsonLines
from stvit.train.writers import TensorBoard
from tests.support.disk import disk_of
from tests.support.train_cases import (
    SMALL,
    contents,
    flags,
    one_line_error,
    rows,
    write_images,
)

ROOT = Path(__file__).resolve().parents[2]


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
        ("--save-every 5", "--save-every writes into --output_dir"),
        ("--tensorboard", "--tensorboard writes into --output_dir"),
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


def test_labels_are_those_of_the_checkpoint(photos, trained, tmp_path, capsys):
    """A test folder that holds only the last class: its images keep that class's number."""
    write_images(tmp_path / "val", {"red": 6}, seed=1)
    arguments = [*flags(tmp_path), "--eval", "--resume", str(trained / "best.pth")]
    assert main(arguments) == 0
    printed = float(re.search(r"loss ([\d.]+)", capsys.readouterr().out.splitlines()[-1])[1])
    model = stvit.load_checkpoint(stvit.stvit_tiny(num_classes=3), trained / "best.pth").eval()
    transform = build_transform(parse_args(arguments), False)
    images = torch.stack([transform(read_image(path)) for path in (tmp_path / "val" / "red").iterdir()]) / 255
    shape = (3, 1, 1)
    images = (images - torch.tensor(IMAGENET_DEFAULT_MEAN).view(shape)) / torch.tensor(IMAGENET_DEFAULT_STD).view(shape)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(images), torch.full((6,), label)) for label in range(3)]
    assert printed == pytest.approx(float(losses[2]), abs=1e-4)
    assert printed != pytest.approx(float(losses[0]), abs=1e-3)


def test_a_part_of_imagenet_is_not_numbered_by_guess(photos, tmp_path, capsys):
    """A published checkpoint has no class names; three folders would be its first three classes."""
    torch.save({"model": stvit.stvit_tiny().state_dict()}, tmp_path / "published.pth")
    arguments = [*flags(photos), "--data-set", "IMNET", "--eval", "--resume", str(tmp_path / "published.pth")]
    one_line_error(capsys, arguments, "3 of IMNET's 1000 class folders", "no class names")


def test_the_best_of_another_folder_is_not_this_ones(photos, trained, tmp_path, capsys):
    """Resuming elsewhere: the table's best accuracy is that of the best.pth beside it."""
    best = contents(trained / "best.pth")
    torch.save(best | {"max_accuracy": 99.5}, tmp_path / "other.pth")
    output = tmp_path / "run"
    arguments = flags(photos, "--resume", str(tmp_path / "other.pth"), "--epochs", "3", "--output_dir", str(output))
    assert main(arguments) == 0
    assert "99.5" not in capsys.readouterr().out
    assert contents(output / "best.pth")["max_accuracy"] == max(row["test_acc1"] for row in rows(output / "log.txt"))


def test_a_killed_loader_process_is_one_line(photos, capsys, monkeypatch):
    from stvit.train import images

    def die(image, name):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(images, "as_rgb", die)
    one_line_error(capsys, flags(photos, "--num_workers", "1"), "memory", "--num_workers", code=1)


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


def test_tensorboard_on_a_full_disk_names_its_folder(tmp_path):
    """Its own thread does the writing; the error comes with a later row or at the end."""
    board = TensorBoard(tmp_path / "tensorboard", 0)
    with disk_of(200), pytest.raises(OSError, match="tensorboard"):
        for step in range(50):
            board.add_epoch({"epoch": step, "test_acc1": 1.0})
        board.close()


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
from stvit.train.cli import main, parse_args
from stvit.train.data import build_transform
from stvit.train.images import read_image
from stvit.train.log import JsonLines
from stvit.train.writers import TensorBoard
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
    deadline = time.monotonic() + 300
    while not (tmp_path / "checkpoint.pth").exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the workers too
    output, error = child.communicate(timeout=180)
    assert child.returncode == 130, error
    assert "Traceback" not in error + output
    assert "interrupted" in error and "checkpoint.pth" in error and "resumes" in error
    done = contents(tmp_path / "checkpoint.pth")["epoch"] + 1
    assert main([*arguments, "--num_workers", "0", "--epochs", str(done + 1)]) == 0
    assert [row["epoch"] for row in rows(tmp_path / "log.txt")] == list(range(done + 1))
