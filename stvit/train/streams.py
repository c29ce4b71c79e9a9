"""timm's streams, ``wds/``, ``tfds/`` and ``hfids/``: images that come in an order and have no numbers.

A stream is made anew for each epoch, and its loader processes with it, under a seed of the epoch. So what comes is a
function of seed, epoch, process, loader process and how many there are of both, and a run that was cut off reads again,
without augmenting it, what it had seen of the epoch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from stvit.train import seeds
from stvit.train.distributed import Process
from stvit.train.errors import UserError
from stvit.train.images import as_rgb
from stvit.train.listed import create, keys, number_of_classes
from stvit.train.loader import Feeder


def sets(
    args: argparse.Namespace, augment: dict[bool, Callable[[Any], Any]]
) -> tuple[Stream | None, Stream, int, list[str] | None]:
    """Training set (None when only evaluating), test set, number of classes, their names where known.

    Raises:
        UserError: as `Stream`, and where nothing tells the number of classes.
    """
    train = None if args.eval else Stream(args, True, augment[True])
    test = Stream(args, False, augment[False])
    return train, test, *number_of_classes(args, (train or test).classes)


def training(
    stream: Stream, args: argparse.Namespace, process: Process, options: dict[str, Any], of_feeder: Any
) -> tuple[StreamFeeder, TrainingStream]:
    """Batches to train on, and where they begin. ``options`` are the loader's, ``of_feeder`` as for `Feeder`."""
    part = TrainingStream(stream, args, process)
    options = options | {"persistent_workers": False}
    loader = DataLoader(part, args.batch_size, drop_last=True, generator=part.generator, **options)
    return StreamFeeder(loader, len(part) // args.batch_size, process, *of_feeder), part


def testing(
    stream: Stream, args: argparse.Namespace, process: Process, options: dict[str, Any], of_feeder: Any
) -> StreamFeeder:
    """Batches to evaluate; see `training`."""
    size = int(1.5 * args.batch_size)
    loader = DataLoader(TestStream(stream, process), size, drop_last=False, **options)
    return StreamFeeder(loader, math.ceil(len(stream) / process.world_size / size), process, *of_feeder)


class Stream:
    """One split of a stream of timm's: how to make it, and how many images it says it has."""

    def __init__(self, args: argparse.Namespace, train: bool, transform: Callable[[Any], Any]) -> None:
        """Make it once, to see that it can be made and what it tells.

        Raises:
            UserError: where timm can't make it, or it doesn't tell how many images it has.
        """
        self.args, self.train, self.transform = args, train, transform
        self.name = args.data_set
        untold = (
            f"--data-set {self.name}: {self._split} doesn't tell how many images it has: "
            f"--{'train' if train else 'val'}-num-samples N"
        )
        try:
            reader = self.made(0).reader
        except UserError as error:
            raise UserError(untold) if "num_samples" in str(error) else error from None
        self.images = int(reader.num_samples or 0)
        self.classes: dict[str, int] | None = getattr(reader, "class_to_idx", None)
        if not self.images:
            raise UserError(untold)

    @property
    def _split(self) -> str:
        return self.args.train_split if self.train else self.args.val_split

    def __len__(self) -> int:
        return self.images

    def made(self, seed: int) -> Any:
        """timm's data set, in the order of ``seed``. A test set is the whole one in each process."""
        args = self.args
        data = create(
            args.data_set,
            args.data_path,
            split=self._split,
            is_training=self.train,
            batch_size=args.batch_size,
            seed=seed % 2**31,
            num_samples=args.train_num_samples if self.train else args.val_num_samples,
            # As stored, for `as_rgb`; TensorFlow decodes to RGB itself.
            input_img_mode="RGB" if self.name.lower().startswith("tfds/") else "",
            **keys(args),
        )
        if not self.train:
            data.reader.dist_rank, data.reader.dist_num_replicas = 0, 1
        return data

    def read(self, data: Any) -> Iterator[tuple[Any, int]]:
        """RGB images and labels, once.

        Raises:
            UserError: where an image or a shard can't be read.
        """
        try:
            for image, label in data:
                yield as_rgb(image, "an image"), int(label)
        except Exception as error:  # whatever the libraries behind the names raise
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--data-set {self.name} {self.args.data_path} {self._split}: {text[0]}") from error


class TrainingStream(IterableDataset[Any]):
    """This process's part of an epoch, from any batch on: (image, label, "").

    Each loader process reads a share of the shards, and from the beginning again where it ends early; batches come from
    them in turn, as many in every process as the stated number of images gives.
    """

    def __init__(self, stream: Stream, args: argparse.Namespace, process: Process) -> None:
        self.stream, self.seed, self.process = stream, args.seed, process
        self.batch_size, self.workers = args.batch_size, max(1, args.num_workers)
        self.generator = torch.Generator()
        self.start(0, 0)

    def __len__(self) -> int:
        return len(self.stream) // self.process.world_size

    def start(self, epoch: int, skip: int) -> None:
        """Go through ``epoch``, leaving out this process's first ``skip`` images."""
        self.epoch = epoch
        rounds, over = divmod(skip // self.batch_size, self.workers)
        self.skip = rounds * self.batch_size  # of each loader process
        last = len(self) // self.batch_size - rounds * self.workers
        self.span = over, max(over, last)  # the batches that count, of those that come
        self.generator.manual_seed(seeds.value(self.seed, seeds.ORDER, epoch, self.process.rank))
        self.data = self.stream.made(seeds.value(self.seed, seeds.ORDER, epoch))

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        worker = get_worker_info()
        place = (self.epoch, self.process.rank, worker.id if worker else 0)
        for number, (image, label) in enumerate(self._endless()):
            if number >= self.skip:
                seeds.set_cpu(self.seed, seeds.SAMPLE, *place, number)
                yield self.stream.transform(image), label, ""

    def _endless(self) -> Iterator[tuple[Any, int]]:
        while True:
            empty = True
            for sample in self.stream.read(self.data):
                empty = False
                yield sample
            if empty:
                raise UserError(
                    f"--data-set {self.stream.name}: one of {self.workers * self.process.world_size} loader processes "
                    "got no images: fewer --num_workers where there are fewer shards than that"
                )


class TestStream(IterableDataset[Any]):
    """This process's images of a test set: (image, label, "").

    Each process reads all of it and takes every ``world_size``-th image of each loader process: every image once.
    """

    span = (0, None)

    def __init__(self, stream: Stream, process: Process) -> None:
        self.stream, self.process = stream, process
        self.data = stream.made(0)

    def __iter__(self) -> Iterator[tuple[Any, int, str]]:
        samples = self.stream.read(self.data)
        for image, label in islice(samples, self.process.rank, None, self.process.world_size):
            yield self.stream.transform(image), label, ""


class StreamFeeder(Feeder):
    """Those batches of a stream that count."""

    def __init__(self, loader: DataLoader[Any], length: int, process: Process, *rest: Any) -> None:
        """``length``: the stated number of batches; ``rest``: as for `Feeder`."""
        # How many batches every process has is known of one process only: the others stop after an evaluation.
        super().__init__(loader, sys.maxsize if process.world_size == 1 else 0, *rest)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from islice(super()._batches(), *self.loader.dataset.span)  # type: ignore[attr-defined]
        finally:
            if not self.loader.persistent_workers:
                self.close()
