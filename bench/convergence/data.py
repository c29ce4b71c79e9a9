"""Images for `bench.convergence`: decoded once, and the same augmented batches for every contender.

Images are decoded, resized and kept as uint8 on the device. Which images a batch holds, where each is cropped and
whether it is mirrored depend on the seed and the number of the step alone, never on what else has drawn random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TESTS = ("val", "test")


class DataError(ValueError):
    """The folder holds no images in the expected places; says what was looked for."""


class Images(NamedTuple):
    """pixels (N, 3, size, size) uint8, labels (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


class Data(NamedTuple):
    """`mirror`: whether a mirrored image is still one of its class."""

    train: Images
    test: Images
    classes: int
    mirror: bool
    description: str


def image_folder(root: Path, size: int, most_train: int, most_test: int) -> Data:
    """Images of root/train/CLASS and of root/val/CLASS or root/test/CLASS, at most so many of each, evenly drawn.

    The shorter side is resized to `size` and the middle taken. Raises DataError.
    """
    from torchvision.datasets import ImageFolder

    test = next((root / name for name in TESTS if (root / name).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        raise DataError(f"{root}: expected the folders train and one of {', '.join(TESTS)}")
    try:
        folders = [ImageFolder(str(root / "train")), ImageFolder(str(test))]
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{root}: {error}") from error
    if folders[0].classes != folders[1].classes:
        raise DataError(f"{root}: train and {test.name} hold different classes")
    train = _decoded(_drawn(folders[0].samples, most_train), size)
    tested = _decoded(_drawn(folders[1].samples, most_test), size)
    description = f"{len(train.labels)} of {len(folders[0])} images in {root.name}/train, {len(tested.labels)} to test"
    return Data(train, tested, len(folders[0].classes), True, description)


def digits(size: int) -> Data:
    """scikit-learn's handwritten digits, enlarged; a fifth is the test set. Raises DataError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the default, scikit-learn's digits, needs scikit-learn; name images by --data") from error
    found = load_digits()
    small = torch.from_numpy(found.images).float()[:, None] * (255 / 16)
    pixels = F.interpolate(small, (size, size), mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(found.target).long()
    test = torch.arange(len(labels)) % 5 == 0
    train = Images(pixels[~test].contiguous(), labels[~test])
    return Data(train, Images(pixels[test].contiguous(), labels[test]), 10, False, "scikit-learn's handwritten digits")


def _drawn(samples: Sequence[tuple[str, int]], most: int) -> list[tuple[str, int]]:
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return [samples[index] for index in order[:most]]


def _decoded(samples: Sequence[tuple[str, int]], size: int) -> Images:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:  # PIL decodes outside of Python's lock
        pixels = list(threads.map(_reader(size), [path for path, _ in samples]))
    return Images(torch.stack(pixels), torch.tensor([label for _, label in samples]))


def _reader(size: int) -> Callable[[str], Tensor]:
    from PIL import Image
    from torchvision.transforms import functional as transforms

    def read(path: str) -> Tensor:
        try:
            with Image.open(path) as image:
                resized = transforms.center_crop(transforms.resize(image.convert("RGB"), [size]), [size])
        except OSError as error:
            raise DataError(f"{path}: {error}") from error
        return transforms.pil_to_tensor(resized)

    return read


class Batches:
    """Augmented batches by number: `at(step)` gives (images, labels), the same for the same seed and step.

    An epoch is a permutation; each image is shifted by up to an eighth of its side and, where it may be, mirrored.
    """

    def __init__(self, images: Images, batch: int, seed: int, mirror: bool) -> None:
        if len(images.labels) < batch:
            raise DataError(f"a batch of {batch} needs as many images to train on, there are {len(images.labels)}")
        self.images, self.batch, self.seed, self.mirror = images, batch, seed, mirror
        self.an_epoch = len(images.labels) // batch
        self._epoch, self._order = -1, torch.empty(0)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, self.an_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.images.labels), generator=self._generator(2 * epoch))
        chosen = self._order[place * self.batch : (place + 1) * self.batch]
        size, generator = self.images.pixels.shape[3], self._generator(2 * step + 1)
        shift = torch.randint(-(size // 8), size // 8 + 1, (2, self.batch, 1), generator=generator)
        rows, columns = (torch.arange(size) + shift).clamp(0, size - 1)
        if self.mirror:
            mirrored = torch.rand(self.batch, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, size - 1 - columns, columns)
        device = self.images.labels.device
        chosen, rows, columns = (index.to(device, non_blocking=True) for index in (chosen, rows, columns))
        channels = torch.arange(3, device=device)[:, None, None]
        where = (chosen[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :])
        return normalised(self.images.pixels[where]), self.images.labels[chosen]

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)


def normalised(pixels: Tensor) -> Tensor:
    """uint8 images as the network takes them: float32, channels_last."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    return ((pixels / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
