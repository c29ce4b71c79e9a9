"""Runs that are killed at any moment end bit for bit as the unbroken one; nothing is lost to damage or a full disk."""

import itertools
import os
import random
from pathlib import Path

import pytest

from stvit.train.cli import main
from tests.support.train_cases import assert_same_run, contents, flags, one_line_error, rows
from tests.support.train_killer import EVENTS

ROOT = Path(__file__).resolve().parents[2]
# Beside the tests' own draws: how many kills each of them adds, for `make survive`.
MORE_KILLS = int(os.environ.get("STVIT_KILLS", "0"))
LENGTH = ["--epochs", "2", "--save-every", "2", "--clip-grad", "1", "--model-ema-decay", "0.9"]


def draw(seed, count, processes):
    """``count`` moments to kill at, events of all kinds before one of them again."""
    chosen = random.Random(seed)
    kinds = chosen.sample(sorted(EVENTS), len(EVENTS))
    kills = []
    for kind, _ in zip(itertools.cycle(kinds), range(count), strict=False):
        most = {"write": 500, "copy": 500, "step": 2, "batch": 3}.get(kind, 1)
        number = chosen.choice(["SIGKILL", "SIGKILL", "SIGTERM"])
        kills.append([number, kind, chosen.randint(1, most), chosen.randrange(processes)])
    return kills


@pytest.fixture(scope="module")
def unbroken(photos, train, tmp_path_factory):
    """Folders of runs that nobody kills, by number of processes."""
    made = {}

    def make(processes):
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("unbroken") / str(processes)
            size = ["--batch-size", str(16 // processes)]
            codes, _ = train(flags(photos, *LENGTH, *size, "--output_dir", str(made[processes])), (), processes)
            assert codes == [[0] * processes]
        return made[processes]

    return make


@pytest.mark.parametrize("processes, workers, kills", [(1, 0, 5), (1, 2, 4), (2, 0, 3), (2, 2, 3)])
def test_a_killed_run_ends_as_the_unbroken_one(photos, train, unbroken, tmp_path, processes, workers, kills):
    """SIGKILL and SIGTERM at drawn moments: in a step, while copying, in the middle of a write, between renames."""
    size = ["--batch-size", str(16 // processes), "--num_workers", str(workers)]
    arguments = flags(photos, *LENGTH, *size, "--output_dir", str(tmp_path))
    codes, printed = train(arguments, draw(processes * 10 + workers, kills + MORE_KILLS, processes), processes)
    assert codes[-1] == [0] * processes, printed
    assert sum(map(any, codes)) > kills // 2  # most kills did strike
    assert_same_run(unbroken(processes), tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name or "incoming" in path.name]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_ends(photos, train, tmp_path, number):
    arguments = flags(photos, "--epochs", "9", "--output_dir", str(tmp_path))
    codes, printed = train([*arguments, "--max-steps", "6"], [[number, "step", 5, 0]])
    assert codes == [[143], [0]]
    (line,) = [line for line in printed.splitlines() if line.startswith("main.py: ")]
    assert f"{number}: {tmp_path}/checkpoint.pth holds the state after step 5 (1 of 9 epochs)" in line
    assert "2 of 3 batches done" in printed  # the second attempt resumes there
    assert contents(tmp_path / "checkpoint.pth")["step"] == 6


def test_a_signal_in_the_evaluation(photos, train, unbroken, tmp_path):
    """The epoch's steps are kept; resuming begins with its evaluation."""
    arguments = flags(photos, *LENGTH, "--output_dir", str(tmp_path))
    codes, printed = train(arguments, [["SIGTERM", "evaluate", 1, 0]])
    assert codes == [[143], [0]] and "3 of 3 batches done" in printed
    assert_same_run(unbroken(1), tmp_path)


def test_without_a_folder_nothing_is_saved(photos, train):
    codes, printed = train(flags(photos, "--max-steps", "1"), [["SIGTERM", "step", 1, 0]])
    assert codes == [[143], [0]] and "nothing was saved" in printed


@pytest.fixture
def half(photos, tmp_path):
    """The folder and arguments of a run of one epoch, with a previous checkpoint after its second step."""
    arguments = flags(photos, *LENGTH, "--output_dir", str(tmp_path))
    assert main([*arguments, "--max-steps", "3"]) == 0
    assert contents(tmp_path / "previous.pth")["step"] == 2
    return tmp_path, arguments


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(half, unbroken, capsys, damage):
    folder, arguments = half
    last = folder / "checkpoint.pth"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        last.unlink()
    else:
        last.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    assert main([*arguments, "--max-steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(last) in printed and "previous.pth" in printed and "2 of 3 batches done" in printed
    assert contents(folder / "previous.pth")["step"] == 2  # the damaged file did not take its place
    assert main(arguments) == 0
    assert_same_run(unbroken(1), folder)


def test_two_damaged_checkpoints_are_an_error(half, capsys):
    folder, arguments = half
    for name in ("checkpoint.pth", "previous.pth"):
        (folder / name).write_bytes(b"no checkpoint")
    one_line_error(capsys, arguments, "previous.pth")


def test_leftovers_are_removed(half, capsys):
    folder, arguments = half
    for name in (".best.pth.123.partial", ".log.txt.9.partial", "incoming.pth"):
        (folder / name).write_text("half")
    (folder / "notes.partial").write_text("the user's own")
    assert main(arguments) == 0
    assert ".best.pth.123.partial" in capsys.readouterr().out
    names = {path.name for path in folder.iterdir()}
    assert "notes.partial" in names and not [name for name in names if name.startswith(".") or "incoming" in name]


def test_saving_does_not_wait_for_the_disk(photos, tmp_path, monkeypatch):
    """While one checkpoint is written, steps go on; the next save waits for it."""
    import threading

    from stvit.train import engine, saving

    writing, released, steps = threading.Event(), threading.Event(), []
    write, step = saving.save_checkpoint, engine.Trainer.step

    def slow_write(*args, **kwargs):
        writing.set()
        assert released.wait(60)
        write(*args, **kwargs)

    def watched_step(self, batches):
        if writing.is_set() and not released.is_set():
            steps.append(self.state.step)
            released.set()
        return step(self, batches)

    monkeypatch.setattr(saving, "save_checkpoint", slow_write)
    monkeypatch.setattr(engine.Trainer, "step", watched_step)
    arguments = flags(photos, "--save-every", "1", "--max-steps", "3", "--output_dir", str(tmp_path))
    assert main(arguments) == 0
    assert steps == [1]
    assert rows(tmp_path / "steps.jsonl")[-1]["step"] == 3
