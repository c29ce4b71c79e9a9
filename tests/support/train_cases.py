"""What the tests of the training program share: a folder of images, flags of a small run, and readers of its files."""

import json

import numpy as np
import torch
from PIL import Image

from stvit.train.cli import main

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


def write_photos(root):
    """48 training and 13 test images: an odd number, for two processes."""
    write_images(root / "train", dict.fromkeys(COLOURS, 16))
    write_images(root / "val", {"blue": 4, "green": 4, "red": 5}, seed=1)
    return root


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
        assert text in error, error


def assert_same_run(one, other):
    """The folders of two runs hold the same state and the same log, speeds aside."""
    for name in ("checkpoint.pth", "best.pth", "best_ema.pth"):
        first, second = contents(one / name), contents(other / name)
        for file in (first, second):
            del file["args"]
            if "sums" in file:
                file["sums"] = [values[:4] for values in file["sums"]]  # not the seconds
        assert_equal(first, second)
    assert rows(one / "steps.jsonl") == rows(other / "steps.jsonl")
    timed = ("seconds", "images_per_s", "waited")
    logs = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows(path / "log.txt")] for path in (one, other)
    ]
    assert logs[0] == logs[1]
