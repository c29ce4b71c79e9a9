"""timm's streams: exact steps, evaluation and resumption without numbered images."""

import io
import random
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from stvit.train import listed, streams
from stvit.train.cli import main, parse_args
from stvit.train.distributed import Process
from tests.support.train_cases import SMALL, assert_same_run, flags, one_line_error, rows

STREAM = [*SMALL, "--save-every", "2", "--epochs", "2", "--model-ema-decay", "0.9", "--train-split", "train"]
FAKE = "tests.support.fake_stream"
KILLS = {
    (1, 0): [["SIGKILL", "step", 4, 0], ["SIGTERM", "step", 3, 0]],
    (1, 3): [["SIGKILL", "step", 3, 0], ["SIGTERM", "step", 2, 0]],
    (2, 2): [["SIGKILL", "step", 3, 1], ["SIGTERM", "step", 1, 0]],
}


def write_shards(photos, folder):
    """Four .tar of each split, as webdataset has them."""
    for split in ("train", "val"):
        files = sorted((photos / split).rglob("*.png"))
        random.Random(0).shuffle(files)
        names = sorted({file.parent.name for file in files})
        for shard in range(4):
            with tarfile.open(folder / f"{split}-{shard}.tar", "w") as tar:
                for file in files[shard::4]:
                    label = str(names.index(file.parent.name)).encode()
                    for ending, data in (("png", file.read_bytes()), ("cls", label)):
                        entry = tarfile.TarInfo(f"{file.parent.name}{file.stem}.{ending}")
                        entry.size = len(data)
                        tar.addfile(entry, io.BytesIO(data))
    return folder


@pytest.fixture(params=["fake", "webdataset"])
def stream(request, photos, tmp_path_factory):
    """Arguments of a stream of the photographs, and what puts a fake one in its place."""
    if request.param == "fake":
        return ["--dataset", "tfds/photos", "--data-dir", str(photos), "--val-split", "val"], FAKE
    pytest.importorskip("webdataset")
    shards = write_shards(photos, tmp_path_factory.mktemp("shards"))
    splits = ["--train-split", "train-{0..3}.tar|48", "--val-split", "val-{0..3}.tar|13"]
    return ["--dataset", "wds/", "--data-dir", str(shards), *splits, "--num-classes", "3"], ""


@pytest.mark.parametrize("processes, workers", KILLS)
def test_a_killed_run_ends_as_the_unbroken_one(stream, train, tmp_path, processes, workers):
    """In the middle of a round of three loader processes too."""
    arguments, plant = stream
    shape = ["--batch-size", "6" if processes == 1 else "4", "--num_workers", str(workers)]
    folders = [tmp_path / "unbroken", tmp_path / "killed"]
    for folder, kills in zip(folders, ([], KILLS[processes, workers]), strict=True):
        given = [*STREAM, *arguments, *shape, "--output_dir", str(folder)]
        codes, printed = train(given, kills, processes, plant)
        assert codes[-1] == [0] * processes, printed
        assert sum(map(any, codes)) == len(kills), codes
    assert_same_run(*folders)
    steps = rows(folders[0] / "steps.jsonl")
    assert len(steps) == 2 * (48 // processes // (6 if processes == 1 else 4))


@pytest.mark.parametrize("processes, workers", [(1, 2), (2, 0), (3, 2)])
def test_every_test_image_counts_once(stream, photos, trained, train, capsys, processes, workers):
    """The accuracy is that of the folder, whatever 13 images in four shards are divided by."""
    assert main(flags(photos, "--eval", "--resume", str(trained / "best.pth"))) == 0
    expected = capsys.readouterr().out.partition("accuracy")[2].rpartition(",")[0]
    arguments, plant = stream
    evaluation = ["--eval", "--resume", str(trained / "best.pth"), "--batch-size", "4", "--num_workers", str(workers)]
    codes, printed = train([*SMALL, *arguments, *evaluation], (), processes, plant)
    assert codes == [[0] * processes], printed
    assert expected and expected in printed and "on 13 test images" in printed


class Numbers(IterableDataset):
    """Black images, labelled by their place."""

    def __init__(self, images, stated):
        self.images, self.reader = images, SimpleNamespace(num_samples=stated, class_to_idx={})

    def __iter__(self):
        for number in range(self.images):
            yield Image.new("RGB", (8, 8)), number


def training(monkeypatch, images, stated, *more):
    monkeypatch.setattr(listed, "create_dataset", lambda name, **options: Numbers(images, stated))
    monkeypatch.setattr(listed, "PACKAGES", {})
    args = parse_args(["--dataset", "tfds/x", "--input-size", "8", "--batch-size", "4", "--num_workers", "0", *more])
    stream = streams.Stream(args, True, lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8))
    options = {"num_workers": 0}
    bad = SimpleNamespace(add=lambda notes: None)
    return streams.training(
        stream, args, Process(0, 1, torch.device("cpu")), options, (torch.device("cpu"), False, bad, 99)
    )


def test_an_epoch_has_the_stated_length(monkeypatch):
    """A stream that is shorter begins again, one that is longer is cut off; resuming leaves out what was seen."""
    for images, labels in ((6, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]), (99, list(range(12)))):
        feeder, order = training(monkeypatch, images, 14)
        for done in range(4):
            order.start(5, 4 * done)
            assert [int(label) for _, targets in feeder for label in targets] == labels[4 * done :]


def test_user_errors(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    wds = [*SMALL, "--dataset", "wds/", "--data-dir", str(tmp_path)]
    one_line_error(capsys, wds, "--data-set wds/", "pip install webdataset")

    def untold(name, **options):
        raise RuntimeError("Invalid split definition, num_samples not specified in train mode.")

    monkeypatch.setattr(listed, "PACKAGES", {})
    monkeypatch.setattr(listed, "create_dataset", untold)
    one_line_error(capsys, wds, "train doesn't tell how many images it has: --train-num-samples N")
    tfds = [*SMALL, "--dataset", "tfds/x", "--no-model-ema", "--mixup", "0", "--cutmix", "0"]
    for images, stated, more, expected in (
        (9, 0, [], "--train-num-samples N"),
        (9, 9, [], "--num-classes N"),
        (9, 9, ["--num-classes", "9"], "lower --batch-size"),
        (0, 48, ["--num-classes", "9"], "one of 1 loader processes got no images: fewer --num_workers"),
        (48, 48, ["--num-classes", "9"], "an image has label 15; labels of 9 classes are below that"),
    ):
        monkeypatch.setattr(listed, "create_dataset", lambda name, **options: Numbers(images, stated))  # noqa: B023
        one_line_error(capsys, [*tfds, *more], expected)


def test_a_stream_that_fails_is_one_line(monkeypatch, capsys):
    class Broken(Numbers):
        def __iter__(self):
            yield from super().__iter__()
            raise OSError("shard 3 is gone\nand more")

    monkeypatch.setattr(listed, "PACKAGES", {})
    monkeypatch.setattr(listed, "create_dataset", lambda name, **options: Broken(20, 48))
    arguments = [*SMALL, "--dataset", "tfds/x", "--num-classes", "99", "--num_workers", "1"]
    one_line_error(capsys, arguments, "--data-set tfds/x", "train: shard 3 is gone")


def test_what_timm_warns_of_is_part_of_the_error(monkeypatch, capsys):
    import logging

    def failing(name, **options):
        logging.getLogger("timm.data.readers").warning("no info.json here")
        raise RuntimeError("split train not found")

    monkeypatch.setattr(listed, "PACKAGES", {})
    monkeypatch.setattr(listed, "create_dataset", failing)
    one_line_error(capsys, [*SMALL, "--dataset", "tfds/x"], "split train not found; no info.json here")
