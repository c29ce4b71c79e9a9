"""Checkpoint files of a run: written in the background, the previous one kept, a damaged one passed over."""

from __future__ import annotations

import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stvit.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from stvit.train.errors import UserError

LAST, PREVIOUS, BEST, BEST_EMA = "checkpoint.pth", "previous.pth", "best.pth", "best_ema.pth"
INCOMING = "incoming.pth"  # the next checkpoint.pth, until it is whole
Contents = dict[str, Any]


@dataclass
class Saved:
    """A checkpoint that was read, and where."""

    path: Path
    contents: Contents
    note: str = ""  # why it is not the file that was asked for


def read(path: Path) -> Saved:
    """Read ``path``.

    Raises:
        UserError: where it can't be read.
    """
    try:
        contents = read_checkpoint(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if "batch_images" in contents and zipfile.is_zipfile(path):  # ours, hence with checksums, which torch.load ignores
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise UserError(f"{path}: damaged ({damaged} has another checksum than when it was written)")
    return Saved(path, contents)


def find(folder: Path) -> Saved | None:
    """The last good checkpoint in a run's folder: checkpoint.pth, or previous.pth where that is damaged or missing.

    Raises:
        UserError: where there are checkpoints, all damaged.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if not last.exists():
        if not previous.exists():
            return None
        found = read(previous)
        found.note = f"{last} is missing: a run was killed while it saved; the one before is used"
        return found
    try:
        return read(last)
    except UserError as error:
        if not previous.exists():
            raise
        found = read(previous)
        found.note = f"{error}; {PREVIOUS}, the one before, is used"
        return found


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed writes left; returns the names."""
    leftovers = [*folder.glob(".*.partial"), *folder.glob(INCOMING)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return [path.name for path in leftovers]


def to_host(value: Any) -> Any:
    """A copy of nested containers with tensors in host memory. Copies from a GPU are queued behind its work."""
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            return value.detach().clone()
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_host(item) for item in value)
    return value


class Saver:
    """Writes a run's checkpoints from a thread, one save at a time.

    `save` copies to the host and returns; training goes on while the file is written. checkpoint.pth is written under
    another name, then the old one becomes previous.pth and the new one takes its place: whenever the process is killed,
    one whole file or the other is there.
    """

    def __init__(self, folder: Path, keep_previous: bool = True) -> None:
        """``keep_previous`` False: the present checkpoint.pth is damaged and must not replace previous.pth."""
        self.folder, self.keep_previous = folder, keep_previous
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def save(self, contents: Contents, best: bool = False, best_ema: Contents | None = None) -> None:
        """Save as checkpoint.pth and, where asked for, before that as best.pth and best_ema.pth.

        Raises:
            OSError: naming the file, where this save or the one before can't be written.
        """
        self.wait()
        copies = to_host({"last": contents, "ema": best_ema})
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        arguments = (copies["last"], best, copies["ema"], copied)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until everything is on the disk.

        Raises:
            OSError: naming the file that can't be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, contents: Contents, best: bool, best_ema: Contents | None, copied: Any) -> None:
        if copied is not None:
            copied.synchronize()
        try:
            if best_ema is not None:
                save_checkpoint(self.folder / BEST_EMA, **best_ema)
            if best:
                save_checkpoint(self.folder / BEST, **contents)
            self._write_last(contents)
        except OSError as error:
            self._error = error

    def _write_last(self, contents: Contents) -> None:
        last, incoming = self.folder / LAST, self.folder / INCOMING
        try:
            save_checkpoint(incoming, **contents)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(last)) from error
        if last.exists() and self.keep_previous:
            last.replace(self.folder / PREVIOUS)
        incoming.replace(last)
        self.keep_previous = True
