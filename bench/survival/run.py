"""A training run that nobody disturbs beside one that is killed at drawn moments: curves, and whether they end alike.

Both are the real program with one loader process, two epochs of stvit_tiny at 64 x 64 under mixup, cutmix, RandAugment,
erasing, drop-path and averaging, saving every 20 steps. The second is killed by SIGKILL or SIGTERM at moments drawn by
a seed, each of another kind: in a step, while the state is copied, in the middle of a write, between two renames. Each
time the same command starts again. The weights compared are the bytes of every tensor of the checkpoint.

Exit codes: 0 both ended alike, 1 they did not, 2 a wrong command line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import console, record

EXAMPLES = """examples:
  python -m bench.survival --data photographs                    photographs/{train,val or test}/CLASS/*.jpg
  python -m bench.survival --data photographs --images 5000 --kills 9"""
ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--data-set FOLDER --model stvit_tiny --input-size 64 --epochs 2 --batch-size 64 --lr 4e-3 --warmup-epochs 0 "
    "--sched-on-updates --model-ema-decay 0.98 --clip-grad 1 --save-every 20 --num_workers 1 --threads 1 --device cpu"
).split()
# Kinds of moments of tests/support/train_killer.py, and the latest that is drawn of each: its n-th in an attempt.
MOMENTS = {"step": 60, "write": 2000, "copy": 200, "renamed": 6, "batch": 70, "rotate": 3, "update": 50}
LOGS = ("steps.jsonl", "log.txt")
Row = dict[str, Any]


def draw(kills: int, seed: int) -> list[tuple[str, str, int, int]]:
    """(signal, kind of moment, its number, process) of each kill; kinds don't repeat before all were drawn."""
    chosen = random.Random(seed)
    kinds = [kind for _ in range(kills) for kind in chosen.sample(sorted(MOMENTS), len(MOMENTS))][:kills]
    signals = [chosen.choice(["SIGKILL", "SIGKILL", "SIGTERM"]) for _ in kinds]
    return [(number, kind, chosen.randint(1, MOMENTS[kind]), 0) for number, kind in zip(signals, kinds, strict=True)]


def links(data: Path, images: int, place: Path) -> None:
    """The first images of each class, and a fifth as many for testing, as links in `place`."""
    tests = next((data / name for name in ("val", "test") if (data / name).is_dir()), data / "val")
    for source, name, count in ((data / "train", "train", images), (tests, "val", max(1, images // 5))):
        if not source.is_dir():
            console.usage_error(f"--data {data}: no folder {source.name} in it")
        for folder in sorted(path for path in source.iterdir() if path.is_dir()):
            (place / name / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                (place / name / folder.name / image.name).symlink_to(image.resolve())


def train(arguments: list[str], kills: Sequence[tuple[str, str, int, int]], place: Path) -> list[int]:
    """Exit codes of all attempts, minus the signal where one killed."""
    output = place / "output.txt"
    job = {"arguments": arguments, "processes": 1, "kills": kills, "output": str(output)}
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.train_killer"]
    child = subprocess.run(
        command, input=json.dumps(job) + "\n", text=True, stdout=subprocess.PIPE, cwd=ROOT, env=environ
    )
    codes = [attempt[0] for attempt in json.loads(child.stdout)]
    if codes[-1] != 0:
        raise SystemExit(f"error: the last attempt ended with {codes[-1]}:\n{output.read_text()}")
    return codes


def digest(path: Path) -> str:
    """SHA-256 over names and bytes of the weights in a checkpoint, the averaged ones and the optimizer's included."""
    contents = torch.load(path, weights_only=True)
    taken = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            taken.update(name.encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                add(f"{name}.{key}", item)

    for part in ("model", "model_ema", "optimizer"):
        add(part, contents[part])
    return taken.hexdigest()


def run_one(name: str, data: Path, kills: Sequence[tuple[str, str, int, int]], place: Path) -> Row:
    """Train to the end, and what is left of it."""
    folder = place / name
    codes = train([*FLAGS, "--data-path", str(data), "--output_dir", str(folder)], kills, place)
    console.say(f"{name}: attempts ended with {', '.join(map(str, codes))}")
    if 0 in codes[:-1]:
        console.usage_error("--kills: the run was over before the last of them; take more --images")
    read = {file: [json.loads(line) for line in (folder / file).read_text().splitlines()] for file in LOGS}
    return {
        "run": name,
        "kills": [dict(zip(("signal", "moment", "number"), kill, strict=False)) for kill in kills],
        "exit_codes": codes,
        "weights_sha256": digest(folder / "checkpoint.pth"),
        "losses": [row["loss"] for row in read["steps.jsonl"]],
        "epochs": [{key: row[key] for key in row if key.startswith(("train_loss", "test"))} for row in read["log.txt"]],
    }


def alike(rows: Sequence[Row]) -> bool:
    """Whether two runs have the same weights, and logged the same losses and accuracies to the last digit."""
    first, second = ({key: row[key] for key in ("weights_sha256", "losses", "epochs")} for row in rows)
    return first == second


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Training loss of each step and test accuracy of each epoch, one run over the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2, width_ratios=(2, 1))
    for row, style in zip(rows, ({"linewidth": 3, "alpha": 0.35}, {"linewidth": 0.8}), strict=True):
        label = f"killed {len(row['kills'])} times" if row["kills"] else "unbroken"
        loss.plot(range(1, len(row["losses"]) + 1), row["losses"], label=label, **style)
        for key, mark in (("test_acc1", "o"), ("test_acc1_ema", "s")):
            values = [epoch[key] for epoch in row["epochs"]]
            what = "averaged" if "ema" in key else "model"
            accuracy.plot(range(1, len(values) + 1), values, marker=mark, label=f"{what}, {label}", **style)
    loss.set(xlabel="step", ylabel="training loss")
    accuracy.set(xlabel="epoch", ylabel="test accuracy, %", xticks=range(1, len(rows[0]["epochs"]) + 1))
    loss.legend()
    accuracy.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def parser() -> argparse.ArgumentParser:
    p = console.parser("survival", __doc__, EXAMPLES)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="DIR/{train,val or test}/CLASS/*.jpg")
    p.add_argument("--images", type=console.positive, default=1000, metavar="N", help="of each class (1000)")
    p.add_argument("--kills", type=console.positive, default=5, metavar="N", help="of the second run (5)")
    p.add_argument("--seed", type=int, default=2, metavar="N", help="draws the moments (2)")
    p.add_argument("--out", type=Path, default=record.RESULTS / "survival.json", metavar="FILE", help="the result file")
    p.add_argument("--picture", type=Path, default=ROOT / "docs" / "assets" / "survival.png", metavar="FILE")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        links(options.data, options.images, place / "images")
        kills = draw(options.kills, options.seed)
        rows = [run_one(run, place / "images", k, place) for run, k in (("unbroken", ()), ("killed", kills))]
    equal = alike(rows)
    about = {"flags": " ".join(FLAGS), "images_per_class": options.images, "alike": equal}
    record.write(options.out, "survival", torch.device("cpu"), rows, **about)
    draw_curves(rows, options.picture)
    console.say(f"{'alike' if equal else 'NOT ALIKE'}; written: {options.out}")
    return 0 if equal else 1
