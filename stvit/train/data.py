"""The data sets, their transforms, samplers and loaders."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms
from torchvision.datasets import CIFAR100

from stvit.train import streams
from stvit.train.distributed import Process
from stvit.train.errors import UserError
from stvit.train.folders import Folder, INaturalist, find_classes, subfolder
from stvit.train.listed import is_stream, is_timm_name, list_or_tar, timm_sets
from stvit.train.loader import BadImages, Feeder, Order, ShardSampler, Testing, Training
from stvit.train.saving import Saved
from stvit.train.signals import ignore_in_worker

Transform: TypeAlias = Callable[[Any], Any]


@dataclass
class Data:
    """Batches and what to say about them. ``train`` and ``order`` are None when only evaluating."""

    train: Feeder | None
    order: Any
    test: Feeder
    steps: int  # an epoch
    num_classes: int
    classes: list[str] | None  # names by index, where the data set has names
    bad: BadImages
    description: str

    def close(self) -> None:
        """End the loader processes: they ignore the signal by which Python ends those that are left."""
        for feeder in (self.train, self.test):
            if feeder is not None:
                feeder.close()
        for child in multiprocessing.active_children():  # of a loader that was cut off while it started
            if child.daemon:
                child.kill()


class Sets(NamedTuple):
    """Training set (None when only evaluating), test set, number of classes, their names where known."""

    train: Any
    test: Any
    num_classes: int
    classes: list[str] | None = None


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


class Synthetic(Dataset[Any]):
    """A random image under a thousand labels, without any work for the loader."""

    def __init__(self, images: int, size: int) -> None:
        self.images = images
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randint(256, (3, size, size), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.image, index % 1000


def build_transform(args: argparse.Namespace, train: bool) -> Transform:
    """timm's training transform by the augmentation flags, or resize and centre crop; both give (3, H, W) of uint8."""
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
            use_prefetcher=True,  # bytes: the device normalises them and erases
        )
        if native:
            transform.transforms[0] = transforms.RandomCrop(args.input_size, padding=4)
        return transform
    steps: list[Any] = []
    if not native:
        keep = args.crop_pct or (1.0 if args.input_size > 224 else 224 / 256)
        size = int(args.input_size / keep)
        steps += [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(args.input_size)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


def build_sets(args: argparse.Namespace, saved: Saved | None, world_size: int = 1) -> Sets:
    """The data set named by the flags; classes are numbered as in the checkpoint ``saved`` where that names them.

    Raises:
        UserError: for a path that does not hold the data set, or holds other classes than the checkpoint.
    """
    parts = (True, False) if not args.eval else (False,)
    try:
        augment = {train: build_transform(args, train) for train in parts}
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"the augmentation flags don't make a transform: {type(error).__name__}: {error}") from error
    sets: list[Any]
    if args.data_set == "SYNTHETIC":
        images = args.batch_size * args.grad_accum_steps * world_size
        train = None if args.eval else Synthetic(100 * images, args.input_size)
        return Sets(train, Synthetic(10 * images, args.input_size), 1000)
    if args.data_set == "DIGITS":
        sets = [Digits(train, args.input_size, augment[train]) for train in parts]
        return Sets(None if args.eval else sets[0], sets[-1], 10)
    if is_stream(args.data_set):
        return Sets(*streams.sets(args, augment))
    if is_timm_name(args.data_set):
        return Sets(*timm_sets(args, augment))
    if not args.data_path:
        raise UserError(f"--data-set {args.data_set} needs --data-path")
    root = Path(args.data_path).expanduser()
    if not root.is_dir():
        raise UserError(f"--data-path {args.data_path}: no such folder")
    if args.data_set == "CIFAR":
        return _cifar(root, augment, parts)
    if args.data_set in ("FOLDER", "IMNET"):
        return _folders(root, augment, args, saved)
    year = 2019 if args.data_set == "INAT19" else 2018
    sets = [INaturalist(root, train, year, args.inat_category, augment[train]) for train in parts]
    return Sets(None if args.eval else sets[0], sets[-1], sets[-1].num_classes, sets[-1].classes)


def _cifar(root: Path, augment: dict[bool, Transform], parts: tuple[bool, ...]) -> Sets:
    try:
        sets = [CIFAR100(str(root), train=train, transform=augment[train], download=False) for train in parts]
    except RuntimeError as error:
        raise UserError(f"--data-path {root}: no CIFAR-100 here (expected a folder cifar-100-python)") from error
    return Sets(sets[0] if len(sets) == 2 else None, sets[-1], 100, list(sets[-1].classes))


def _folders(root: Path, augment: dict[bool, Transform], args: argparse.Namespace, saved: Saved | None) -> Sets:
    names = saved.contents.get("classes") if saved else None
    classes = {name: index for index, name in enumerate(names or [])}
    listed = list_or_tar(root, augment, args, classes or None)
    if listed is not None:
        return Sets(*listed)
    known = "the training classes"
    train = None
    if names:
        assert saved is not None
        known = f"the {len(names)} classes of {saved.path} (--finetune {saved.path} starts from it with other classes)"
    else:
        of_test = args.eval and not (root / "train").is_dir()
        classes = find_classes(subfolder(root, "val", "test") if of_test else subfolder(root, "train"))
    if not args.eval:
        train = Folder(subfolder(root, "train"), classes, augment[True], every_class=True, known=known)
    test = Folder(subfolder(root, "val", "test"), classes, augment[False], known=known)
    num_classes = 1000 if args.data_set == "IMNET" else len(classes)
    if len(classes) > num_classes:
        raise UserError(f"--data-path {root}: {len(classes)} classes, and IMNET has 1000; try --data-set FOLDER")
    if args.eval and not names and len(classes) < num_classes:
        raise UserError(
            f"--data-path {root}: {len(classes)} of IMNET's 1000 class folders, and the checkpoint has no class names: "
            "they would get wrong numbers; train/ with all 1000 folders would give them"
        )
    return Sets(train, test, num_classes, list(classes))


def build_data(args: argparse.Namespace, process: Process, saved: Saved | None = None) -> Data:
    """Build both loaders. Under several processes each gets its share.

    Raises:
        UserError: for a path that does not hold the data set, or fewer training images than one step needs.
    """
    sets = build_sets(args, saved, process.world_size)
    bad = BadImages(args.max_bad_images, lambda text: print(f"main.py: {text}", file=sys.stderr))
    options: dict[str, Any] = {
        "num_workers": args.num_workers,
        "persistent_workers": args.num_workers > 0,
        "pin_memory": args.pin_mem and process.device.type == "cuda",
        "worker_init_fn": ignore_in_worker,
    }
    of_feeder = (process.device, args.channels_last, bad, sets.num_classes)
    stream = isinstance(sets.test, streams.Stream)
    training: Any
    training, testing = (streams.training, streams.testing) if stream else (_training, _testing)
    train, order, steps = None, None, 0
    if sets.train is not None:
        train, order = training(sets.train, args, process, options, of_feeder)
        steps = len(order) // args.batch_size // args.grad_accum_steps
        if not steps:
            raise UserError(_too_few(len(order), args))
    test = testing(sets.test, args, process, options, of_feeder)
    counts = f"{len(sets.test):,} test images"
    if sets.train is not None:
        counts = f"{len(sets.train):,} training and {counts}"
    where = f" {args.data_path}" if args.data_path and args.data_set not in ("DIGITS", "SYNTHETIC") else ""
    size = args.input_size
    description = f"{args.data_set}{where}: {counts}, {sets.num_classes} classes, {size} x {size} pixels"
    if stream and train is not None and args.repeated_aug:
        description += "; a stream, hence without --repeated-aug"
    return Data(train, order, test, steps, sets.num_classes, sets.classes, bad, description)


def _training(
    data: Any, args: argparse.Namespace, process: Process, options: dict[str, Any], of_feeder: Any
) -> tuple[Feeder, Order]:
    order = Order(_sampler(data, args, process), args.seed, process)
    images = Training(data, args.seed, args.max_bad_images)
    loader = DataLoader(images, args.batch_size, sampler=order, drop_last=True, **options)
    return Feeder(loader, len(loader), *of_feeder), order


def _testing(data: Any, args: argparse.Namespace, process: Process, options: dict[str, Any], of_feeder: Any) -> Feeder:
    images = Testing(data, args.input_size, args.max_bad_images)
    size = int(1.5 * args.batch_size)
    loader = DataLoader(images, size, sampler=ShardSampler(data, process), drop_last=False, **options)
    return Feeder(loader, math.ceil(len(data) // process.world_size / size), *of_feeder)


def _sampler(train_set: Any, args: argparse.Namespace, process: Process) -> Any:
    if args.repeated_aug:
        return RepeatAugSampler(train_set, process.world_size, process.rank)
    return DistributedSampler(train_set, process.world_size, process.rank, shuffle=True)


def _too_few(images: int, args: argparse.Namespace) -> str:
    lower = "--batch-size" if args.grad_accum_steps == 1 else "--batch-size or --grad-accum-steps"
    step = f"one batch of {args.batch_size}"
    if args.grad_accum_steps > 1:
        step = f"one step of {args.grad_accum_steps} batches of {args.batch_size}"
    return f"{images} training images an epoch for each process are less than {step}: lower {lower}"
