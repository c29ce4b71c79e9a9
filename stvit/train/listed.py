"""Images that a list or timm names: ``train.csv``, ``train.tar``, and timm's ``hfds/NAME`` and ``torch/NAME``."""

from __future__ import annotations

import argparse
import csv
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset

from stvit.train.errors import UserError
from stvit.train.images import as_rgb, read_image

STREAMS = ("wds", "tfds", "hfids")
# What timm's names need: the package to import, and what pip calls it.
PACKAGES = {
    "wds": ("webdataset", "webdataset"),
    "tfds": ("tensorflow_datasets", "tensorflow tensorflow-datasets"),
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
}
Transform = Callable[[Any], Any]


class Listed(Dataset[Any]):
    """Images by a CSV file of lines "PATH,CLASS"; paths are relative to the file's folder."""

    def __init__(self, path: Path, transform: Transform, classes: dict[str, int] | None = None) -> None:
        """``classes``: those of the training list, so that both are numbered alike.

        Raises:
            UserError: for a file that can't be read, is no such list, or has a class that ``classes`` lacks.
        """
        try:
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}: can't read it ({error})") from error
        if rows and [cell.strip().lower() for cell in rows[0]] in (["path", "class"], ["path", "label"]):
            rows = rows[1:]
        if not rows or any(len(row) != 2 for row in rows):
            raise UserError(f"{path}: expected lines PATH,CLASS")
        self.classes = classes or {name: i for i, name in enumerate(sorted({name for _, name in rows}))}
        unknown = [name for _, name in rows if name not in self.classes]
        if unknown:
            raise UserError(f"{path}: class {unknown[0]} is not among the training classes")
        self.samples = [(path.parent / name, self.classes[label]) for name, label in rows]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


class FromTimm(Dataset[Any]):
    """A data set of `timm.data.create_dataset` whose unreadable images are named instead of replaced."""

    def __init__(self, data: Any, transform: Transform) -> None:
        """``data`` is timm's."""
        self.data, self.transform = data, transform
        self.reader = getattr(self.data, "reader", None)

    @property
    def classes(self) -> dict[str, int] | None:
        """Names and numbers of the classes, where the set tells them."""
        source = self.data if self.reader is None else self.reader
        return getattr(source, "class_to_idx", None) or getattr(source, "class_name_to_idx", None)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self.reader is None:  # torchvision's: decoded
            image, label = self.data[index]
            return self.transform(as_rgb(image, f"image {index}")), int(label)
        file, label, *_ = self.reader[index]
        if isinstance(file, Image.Image):
            return self.transform(as_rgb(file, f"image {index}")), int(label)
        return self.transform(read_image(file, name=self.data.filename(index))), int(label)


def is_timm_name(name: str) -> bool:
    """Whether a ``--data-set`` is timm's, such as hfds/food101."""
    return "/" in name


def is_stream(name: str) -> bool:
    """Whether a ``--data-set`` is one of timm's streams, such as wds/."""
    return is_timm_name(name) and name.split("/")[0].lower() in STREAMS


def create(name: str, root: str, **options: Any) -> Any:
    """timm's data set of this name; nothing is downloaded but by hfds/.

    Raises:
        UserError: where timm can't make it, for want of a package say.
    """
    module, packages = PACKAGES.get(name.split("/")[0].lower(), ("timm", ""))
    if find_spec(module) is None:
        raise UserError(f"--data-set {name} needs another package: pip install {packages}")
    with _warnings() as warned:
        try:
            return create_dataset(name, root=root or None, search_split=False, **options)
        except Exception as error:  # whatever the libraries behind the names raise
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--data-set {name or 'FOLDER'} {root}: {'; '.join([text[0], *warned])}") from error


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What timm warns of meanwhile, such as a file that is there in some data sets only; it isn't printed."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("timm")
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def keys(args: argparse.Namespace) -> dict[str, str]:
    """Where image and label are in a record, where a flag says so."""
    given = {"input_key": args.input_key, "target_key": args.target_key}
    return {name: key for name, key in given.items() if key}


def timm_sets(args: argparse.Namespace, augment: dict[bool, Transform]) -> tuple[Any, Any, int, list[str] | None]:
    """Training set (None when only evaluating), test set, number of classes, their names where known.

    Raises:
        UserError: where timm can't make them, or the number of classes isn't known.
    """

    def made(split: str, train: bool) -> FromTimm:
        return FromTimm(create(args.data_set, args.data_path, split=split, **keys(args)), augment[train])

    train = None if args.eval else made(args.train_split, True)
    test = made(args.val_split, False)
    return train, test, *number_of_classes(args, (train or test).classes)


def number_of_classes(args: argparse.Namespace, classes: dict[str, int] | None) -> tuple[int, list[str] | None]:
    """How many classes a set of timm's has, and their names where it tells them.

    Raises:
        UserError: where neither it nor a flag tells the number.
    """
    number = args.num_classes or (len(classes) if classes else 0)
    if not number:
        raise UserError(f"--data-set {args.data_set} doesn't tell how many classes it has: --num-classes N")
    return number, list(classes) if classes else None


def list_or_tar(
    root: Path, augment: dict[bool, Transform], args: argparse.Namespace, known: dict[str, int] | None
) -> tuple[Any, Any, int, list[str] | None] | None:
    """The same for a folder with train.csv or train.tar, and val or test; None where there is neither.

    ``known``: the classes of a checkpoint, where it names them.
    """
    test_file = _first(root, [f"{part}.{ending}" for ending in ("csv", "tar") for part in ("val", "test")])
    train_file = _first(root, ["train.csv", "train.tar"])
    if test_file is None or (train_file is None and not args.eval):
        return None

    def build(path: Path, train: bool, classes: dict[str, int] | None) -> Any:
        if path.suffix == ".csv":
            return Listed(path, augment[train], classes)
        options = {} if classes is None else {"class_map": classes}
        return FromTimm(create("", str(path), **options), augment[train])

    first = build(train_file, not args.eval, known) if train_file else None
    test = build(test_file, False, known or (first.classes if first else None))
    classes = known or (first or test).classes
    return None if args.eval else first, test, len(classes), list(classes)


def _first(root: Path, names: list[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)
