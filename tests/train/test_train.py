"""The training program: what it writes, resuming, evaluating, fine-tuning, several processes, and errors."""

import argparse
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
from stvit.train import distributed
from stvit.train.cli import main
from tests.support.train_cases import (
    COLOURS,
    assert_equal,
    contents,
    flags,
    rows,
    write_images,
)

ROOT = Path(__file__).resolve().parents[2]


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


def find_worker(parent, rank):
    """The process that torchrun started for this rank."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"PPid:\t{parent}\n" in status.read_text():
                if f"\0RANK={rank}\0" in (status.parent / "environ").read_text():
                    return int(status.parent.name)
        except OSError:  # ended meanwhile
            continue
    return None


def test_processes_started_again_find_no_addresses_of_those_that_are_gone(monkeypatch):
    """torchrun keeps one store for all of its starts."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in {**place, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    stores = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, store, **options: stores.append(store))
    for start in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        distributed.start(argparse.Namespace(device="cpu", dist_url="env://", world_size=1))
    stores[0].set("address", "gone")
    assert [store.check(["address"]) for store in stores] == [True, True, False]


def test_torchrun_starts_a_lost_process_again(photos, tmp_path, capsys):
    """A process is killed; the new ones continue, and 13 test images counted by two give what one process finds."""
    output = tmp_path / "run"
    launcher = "-m torch.distributed.run --standalone --nproc_per_node 2 --max-restarts 1 -m stvit.train".split()
    more = ["--epochs", "1", "--batch-size", "4", "--save-every", "1", "--output_dir", str(output)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, *flags(photos, *more)]
    with subprocess.Popen(command, env=environ, cwd=ROOT, text=True, stdout=-1, stderr=subprocess.STDOUT) as child:
        deadline = time.monotonic() + 300
        while not (output / "previous.pth").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(find_worker(child.pid, 1), signal.SIGKILL)
        printed = child.communicate(timeout=300)[0]
    assert child.returncode == 0, printed
    assert "of 6 batches done" in printed  # it resumed within the epoch
    assert [row["step"] for row in rows(output / "steps.jsonl")] == list(range(1, 7))
    (logged,) = rows(output / "log.txt")
    for evaluated, name in (([], ""), (["--eval-ema"], "_ema")):
        assert main([*flags(photos), "--eval", *evaluated, "--resume", str(output / "checkpoint.pth")]) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert f"accuracy {logged['test_acc1' + name]:.2f} %" in line
        assert f"loss {logged['test_loss' + name]:.4f}" in line


def test_our_own_launcher_is_told_to_stop_without_a_word_of_its_own(photos, tmp_path):
    command = [sys.executable, "main.py", *flags(photos, "--processes", "2", "--batch-size", "8", "--epochs", "99")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--backend", "reference", "--output_dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environ,
    ) as child:
        until = time.monotonic() + 300
        steps = tmp_path / "steps.jsonl"
        while child.poll() is None and not (steps.exists() and steps.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        child.terminate()
        _, printed = child.communicate(timeout=300)
    assert child.returncode == 143
    (line,) = printed.splitlines()
    assert line.startswith("main.py: SIGTERM: ") and "holds the state after step" in line


TOLD_WHILE_IT_WAITS = """
import os, signal, subprocess, sys, threading, time
import torch.distributed.launcher.api as launcher
from stvit.train.launch import launch

def run(*arguments):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)"])
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    child.wait()
    print("waited", child.returncode)
    time.sleep(60)

launcher.elastic_launch = lambda config, entry: print(repr(config.signals_to_handle)) or run
print(launch([], 2))
"""


def test_a_signal_does_not_break_into_waiting_for_a_process(run_python):
    """Whose lock could stay taken: the launcher waited for ever then."""
    printed = run_python("-c", TOLD_WHILE_IT_WAITS, env={"PYTHONPATH": str(ROOT)}).stdout
    assert printed.splitlines() == ["''", "waited 0", "143"]


def test_our_own_launcher_reports_an_error_in_one_line(run_python):
    arguments = ["main.py", "--processes", "2", "--device", "cpu", "--backend", "reference", "--resume", "/nowhere.pth"]
    child = run_python(*arguments, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert child.returncode == 2
    assert [line for line in child.stderr.splitlines() if line] == ["main.py: /nowhere.pth: No such file or directory"]
