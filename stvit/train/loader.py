"""From data sets to batches on the device: order, seeds, shares, copies."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from stvit.train import seeds
from stvit.train.distributed import Process
from stvit.train.errors import Stop, UserError

UNREADABLE = -1  # the label of a test image that was skipped


class Order(Sampler[tuple[int, int, int]]):
    """What to train on: (epoch, place in the epoch over all processes, index of the image), from any batch on.

    Another order each epoch, by seed and epoch; ``inner`` is a sampler of PyTorch or timm.
    """

    def __init__(self, inner: Any, seed: int, process: Process) -> None:
        self.inner, self.seed, self.process = inner, seed, process
        self.epoch = self.skip = 0

    def start(self, epoch: int, skip: int) -> None:
        """Go through ``epoch``, leaving out this process's first ``skip`` images."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        self.inner.set_epoch(seeds.value(self.seed, seeds.ORDER, self.epoch))
        for place, index in islice(enumerate(self.inner), self.skip, None):
            yield self.epoch, place * self.process.world_size + self.process.rank, index

    def __len__(self) -> int:
        return len(self.inner)


class ShardSampler(Sampler[int]):
    """Every ``world_size``-th image from ``rank`` on: each image exactly once over all processes, none repeated."""

    def __init__(self, data: Sized, process: Process) -> None:
        self.indices = range(process.rank, len(data), process.world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class Training(Dataset[Any]):
    """Images augmented under a seed of their own, by the keys of `Order`: (image, label, what was unreadable)."""

    def __init__(self, data: Any, seed: int, max_bad: int) -> None:
        self.data, self.seed, self.max_bad = data, seed, max_bad

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Any, int, str]:
        epoch, place, index = key
        bad: list[str] = []
        while True:
            seeds.set_cpu(self.seed, seeds.SAMPLE, epoch, place)
            try:
                image, label = self.data[index]
                return image, label, "\n".join(bad)
            except UserError as error:
                bad.append(str(error))
                if len(bad) > self.max_bad:
                    raise
            index = (index + 1) % len(self.data)  # the next image in its place keeps the batch whole


class Testing(Dataset[Any]):
    """Images as they are, (image, label, what was unreadable): an unreadable one is black, labelled UNREADABLE."""

    def __init__(self, data: Any, size: int, max_bad: int) -> None:
        self.data, self.size, self.max_bad = data, size, max_bad

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        try:
            return *self.data[index], ""
        except UserError as error:
            if not self.max_bad:
                raise
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), UNREADABLE, str(error)


class Batch(NamedTuple):
    """images (B, 3, H, W), float32, normalised; targets (B,); both on the device."""

    images: Tensor
    targets: Tensor


class Feeder:
    """Batches on the device, each copied while the one before it is worked on, as uint8, and normalised there.

    ``waited`` counts the seconds that the training process spent waiting for data, ``bad`` the unreadable images.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        common: int,
        device: torch.device,
        channels_last: bool,
        bad: BadImages,
        num_classes: int,
    ) -> None:
        """``common``: how many batches every process has at least."""
        self.loader, self.common, self.device, self.bad, self.num_classes = loader, common, device, bad, num_classes
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.waited = 0.0
        self._running: Any = None  # the loader's iterator, which has its processes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device).view(shape)
        self._std = torch.tensor(IMAGENET_DEFAULT_STD, device=device).view(shape)

    def __len__(self) -> int:
        return len(self.loader)

    def close(self) -> None:
        """End the loader's processes."""
        running = self.loader._iterator if self._running is None else self._running
        self._running = self.loader._iterator = None
        shutdown = getattr(running, "_shutdown_workers", None)  # PyTorch ends them in a destructor only
        if shutdown is not None:
            shutdown()

    def __iter__(self) -> Iterator[Batch]:
        if self._stream is None:
            yield from (self._normalised(images, targets) for images, targets in self._batches())
            return
        ready = None
        for images, targets in self._batches():
            upcoming = self._copied(images, targets)
            if ready is not None:
                yield self._arrived(*ready)
            ready = upcoming
        if ready is not None:
            yield self._arrived(*ready)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the loader gives, with the time that it takes.

        Raises:
            UserError: for a label that is none of the classes'.
        """
        self._running = None
        while True:
            began = time.perf_counter()
            try:
                if self._running is None:
                    self._running = iter(self.loader)
                images, targets, bad = next(self._running)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise Stop(
                    "a process that loads images was killed, often because memory ran out: fewer --num_workers "
                    f"need less (now {self.loader.num_workers})"
                ) from None
            self.waited += time.perf_counter() - began
            self.bad.add(bad)
            if (label := int(targets.max())) >= self.num_classes:
                raise UserError(f"an image has label {label}; labels of {self.num_classes} classes are below that")
            yield images, targets

    def _copied(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Any]:
        with torch.cuda.stream(self._stream):
            images = images.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            assert self._stream is not None
            return images, targets, self._stream.record_event()

    def _arrived(self, images: Tensor, targets: Tensor, copied: Any) -> Batch:
        """The present stream waits for this copy only, and keeps the memory until it is done with it."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        for tensor in (images, targets):
            tensor.record_stream(stream)
        return self._normalised(images, targets)

    def _normalised(self, images: Tensor, targets: Tensor) -> Batch:
        """torchvision's ToTensor and Normalize, to the last bit."""
        images = images.to(torch.float32, memory_format=self.memory_format)
        return Batch(images.div_(255).sub_(self._mean).div_(self._std), targets)


class BadImages:
    """Counts and names unreadable images, and ends the run when there are too many."""

    def __init__(self, limit: int, tell: Any) -> None:
        self.limit, self.tell, self.seen = limit, tell, set[str]()

    def add(self, notes: list[str]) -> None:
        """Take the notes of a batch.

        Raises:
            UserError: when more than ``limit`` images were unreadable.
        """
        for note in (line for lines in notes if lines for line in lines.splitlines()):
            if note in self.seen:
                continue
            self.seen.add(note)
            if len(self.seen) > self.limit:
                raise UserError(f"{note}; that is more than --max-bad-images {self.limit}")
            self.tell(f"skipped {note}")
