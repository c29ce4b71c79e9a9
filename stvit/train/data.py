"""The data sets, their transforms, samplers and loaders."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import transforms
from torchvision.datasets import CIFAR100

from stvit.train.distributed import Process
from stvit.train.errors import UserError
from stvit.train.folders import Folder, INaturalist, find_classes, subfolder

Transform: TypeAlias = Callable[[Any], Any]


@dataclass
class Data:
    """Loaders and what to say about them. ``train`` and ``train_sampler`` are None when only evaluating."""

    train: DataLoader[Any] | None
    train_sampler: Any
    test: DataLoader[Any]
    num_classes: int
    description: str


class Digits(Dataset[Any]):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, enlarged; a fifth of each class is the test set.

    The split is the same for every seed, so that accuracies can be compared.
    """

    def __init__(self, train: bool, size: int, transform: Transform) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        images, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        grey = (images * (255 / 16)).astype("uint8")
        self.images = [Image.fromarray(g).resize((size, size), Image.Resampling.BICUBIC).convert("RGB") for g in grey]
        self.labels = [int(label) for label in labels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


class ShardSampler(Sampler[int]):
    """Every ``world_size``-th image from ``rank`` on: each image exactly once over all processes, none repeated."""

    def __init__(self, data: Sized, process: Process) -> None:
        self.indices = range(process.rank, len(data), process.world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def build_transform(args: argparse.Namespace, train: bool) -> Transform:
    """timm's training transform by the augmentation flags, or resize, centre crop and normalise for testing."""
    native = args.data_set == "CIFAR" and args.input_size <= 32  # CIFAR's own size: pad and crop, don't resize
    if train:
        transform = create_transform(
            input_size=args.input_size,
            is_training=True,
            scale=tuple(args.scale),
            ratio=tuple(args.ratio),
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa in ("", "none") else args.aa,
            interpolation=args.train_interpolation,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
        if native:
            transform.transforms[0] = transforms.RandomCrop(args.input_size, padding=4)
        return transform
    steps: list[Any] = []
    if not native:
        keep = args.crop_pct or (1.0 if args.input_size > 224 else 224 / 256)
        size = int(args.input_size / keep)
        steps += [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(args.input_size)]
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    return transforms.Compose(steps)


def build_sets(args: argparse.Namespace) -> tuple[Any, Any, int]:
    """Training set (None when only evaluating), test set, number of classes.

    Raises:
        UserError: for a path that does not hold the data set.
    """
    parts = (True, False) if not args.eval else (False,)
    try:
        augment = {train: build_transform(args, train) for train in parts}
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"the augmentation flags don't make a transform: {type(error).__name__}: {error}") from error
    sets: list[Any]
    if args.data_set == "DIGITS":
        sets = [Digits(train, args.input_size, augment[train]) for train in parts]
        return (None if args.eval else sets[0]), sets[-1], 10
    if not args.data_path:
        raise UserError(f"--data-set {args.data_set} needs --data-path")
    root = Path(args.data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-path {args.data_path}: no such folder")
    if args.data_set == "CIFAR":
        return _cifar(root, augment, parts)
    if args.data_set in ("FOLDER", "IMNET"):
        return _folders(root, augment, args)
    year = 2019 if args.data_set == "INAT19" else 2018
    sets = [INaturalist(root, train, year, args.inat_category, augment[train]) for train in parts]
    return (None if args.eval else sets[0]), sets[-1], sets[-1].num_classes


def _cifar(root: Path, augment: dict[bool, Transform], parts: tuple[bool, ...]) -> tuple[Any, Any, int]:
    try:
        sets = [CIFAR100(str(root), train=train, transform=augment[train], download=False) for train in parts]
    except RuntimeError as error:
        raise UserError(f"--data-path {root}: no CIFAR-100 here (expected a folder cifar-100-python)") from error
    return (sets[0] if len(sets) == 2 else None), sets[-1], 100


def _folders(root: Path, augment: dict[bool, Transform], args: argparse.Namespace) -> tuple[Any, Any, int]:
    test_folder = subfolder(root, "val", "test")
    if args.eval and not (root / "train").is_dir():
        classes = find_classes(test_folder)
        train = None
    else:
        train_folder = subfolder(root, "train")
        classes = find_classes(train_folder)
        train = None if args.eval else Folder(train_folder, classes, augment[True], every_class=True)
    test = Folder(test_folder, classes, augment[False])
    num_classes = 1000 if args.data_set == "IMNET" else len(classes)
    if len(classes) > num_classes:
        raise UserError(f"--data-path {root}: {len(classes)} classes, and IMNET has 1000; try --data-set FOLDER")
    return train, test, num_classes


def _init_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle


def build_data(args: argparse.Namespace, process: Process) -> Data:
    """Build both loaders. Under several processes each gets its share.

    Raises:
        UserError: for a path that does not hold the data set, or fewer training images than one batch.
    """
    train_set, test_set, num_classes = build_sets(args)
    common = {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and process.device.type == "cuda",
        "worker_init_fn": _init_worker,
    }
    train, sampler = None, None
    if train_set is not None:
        sampler = _train_sampler(train_set, args, process)
        if len(sampler) < args.batch_size:
            raise UserError(
                f"{len(sampler)} training images an epoch for each process are less than one batch of "
                f"{args.batch_size}: lower --batch-size"
            )
        # Workers start afresh each epoch: their random state is then a function of seed and epoch, as resuming needs.
        train = DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True, **common)
    shard = ShardSampler(test_set, process)
    test = DataLoader(test_set, int(1.5 * args.batch_size), sampler=shard, drop_last=False, **common)
    counts = (
        f"{len(test_set):,} test images"
        if train_set is None
        else f"{len(train_set):,} training and {len(test_set):,} test images"
    )
    where = f" {args.data_path}" if args.data_path and args.data_set != "DIGITS" else ""
    size = args.input_size
    description = f"{args.data_set}{where}: {counts}, {num_classes} classes, {size} x {size} pixels"
    return Data(train, sampler, test, num_classes, description)


def _train_sampler(train_set: Any, args: argparse.Namespace, process: Process) -> Any:
    if args.repeated_aug:
        return RepeatAugSampler(train_set, process.world_size, process.rank)
    return DistributedSampler(train_set, process.world_size, process.rank, shuffle=True, seed=args.seed)
