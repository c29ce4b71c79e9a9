"""Images in folders: ``DIR/{train,val or test}/CLASS/*.jpg``, and iNaturalist's trees described by JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder, has_file_allowed_extension

from stvit.train.errors import UserError
from stvit.train.images import read_image


def subfolder(root: Path, *names: str) -> Path:
    """The first of ``root/name`` that is a folder.

    Raises:
        UserError: where none is.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(
        f"--data-path {root}: no folder {' or '.join(names)} in it (expected DIR/{{train,val or test}}/CLASS/*.jpg)"
    )


def find_classes(folder: Path) -> dict[str, int]:
    """Class name -> index, by sorted folder name.

    Raises:
        UserError: where there are no class folders.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: no class folders in it (expected {folder}/CLASS/*.jpg)")
    return {name: index for index, name in enumerate(names)}


def is_image(path: Path, root: Path) -> bool:
    """Whether a file counts: by its ending, and with no name from ``root`` on that begins with a dot.

    Such names are other programs' own: ``.ipynb_checkpoints/``, ``._0.png``.
    """
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and has_file_allowed_extension(str(path), IMG_EXTENSIONS)


class Folder(ImageFolder):
    """An ImageFolder with given classes, so that a test folder without some class keeps the training indices.

    Raises:
        UserError: for a class folder that is empty, unknown to ``classes``, or (``every_class``) missing.
    """

    def __init__(
        self,
        root: Path,
        classes: dict[str, int],
        transform: Any,
        every_class: bool = False,
        known: str = "the training classes",
    ) -> None:
        """``known`` says whose ``classes`` are, for errors."""
        present = find_classes(root)
        unknown = [name for name in present if name not in classes]
        if unknown:
            raise UserError(f"{root}: class {unknown[0]} is not among {known}")
        missing = [name for name in classes if every_class and name not in present]
        if missing:
            raise UserError(f"{root}: no folder for class {missing[0]} of {known}")
        self._classes = classes
        super().__init__(
            str(root),
            transform=transform,
            loader=read_image,
            is_valid_file=lambda path: is_image(Path(path), root),
            allow_empty=True,
        )
        filled = set(self.targets)
        empty = [name for name in (classes if every_class else present) if classes[name] not in filled]
        if empty:
            endings = " ".join(IMG_EXTENSIONS)
            raise UserError(f"{root}/{empty[0]}: no images in this class folder (looked for {endings})")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The given classes, whatever folders are there."""
        return list(self._classes), self._classes


class INaturalist(Dataset[Any]):
    """iNaturalist 2018 or 2019: ``{train,val}YEAR.json`` and ``categories.json`` beside the image tree.

    Classes are numbered in the order in which the training annotations name them.
    """

    def __init__(self, root: Path, train: bool, year: int, category: str, transform: Callable[[Any], Any]) -> None:
        listing = _read_json(root / f"{'train' if train else 'val'}{year}.json")
        training = listing if train else _read_json(root / f"train{year}.json")
        catalogue = _read_json(root / "categories.json")
        self.transform = transform
        numbers: dict[str, int] = {}
        try:
            for annotation in training["annotations"]:
                numbers.setdefault(catalogue[int(annotation["category_id"])][category], len(numbers))
            files = [image["file_name"] for image in listing["images"]]
            whole = (root / files[0]).exists()  # some copies of the tree lack the level of the kingdom
            self.samples = []
            for name in files:
                folder, _, number, file = name.split("/")
                path = root / name if whole else root / folder / number / file
                self.samples.append((path, numbers[catalogue[int(number)][category]]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{root}: its JSON files are not those of iNaturalist {year} ({error!r})") from error
        self.num_classes = len(numbers)
        self.classes = [str(name) for name in numbers]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't read it as JSON ({error})") from error
