"""Reading and writing of checkpoint files. Nothing that a file holds is ever executed.

A .pth file is read by PyTorch's restricted unpickler, which knows tensors and plain containers; `argparse.Namespace`,
which the published files carry, is the one class allowed beside them. A .safetensors file holds tensors only.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SHOWN = 3  # differing keys named of each kind
Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint file can't be read, or doesn't fit the model. The message names the file and the reason."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All that a .pth or .safetensors file holds, tensors on the CPU.

    Raises CheckpointError: no such file, truncated, not a checkpoint, or with pickled objects that would run code.
    """
    path = Path(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            contents = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a dict, the file holds {type(contents).__name__}")
    return contents


def load_checkpoint(model: Model, path: str | os.PathLike[str], *, use_ema: bool = False) -> Model:
    """Loads the weights of a published file, or of one of ours, into `model` and returns it.

    Args:
        model: any module; wrapped in DistributedDataParallel or torch.compile is fine.
        path: .pth (a state dict, or a dict that holds one under "model", with or without the prefix that
            DistributedDataParallel adds) or .safetensors.
        use_ema: take the averaged weights, under "model_ema", instead.

    Raises CheckpointError (a ValueError) that names the file and what is wrong: unreadable, foreign, or the first
    keys that are missing, unexpected or of another shape. The model is then as it was before.
    """
    weights = _state_dict(read_checkpoint(path), Path(path), "model_ema" if use_ema else "model")
    bare = _unwrapped(model)
    difference = _difference(bare.state_dict(), weights)
    if difference:
        raise CheckpointError(f"{path}: doesn't fit {type(bare).__name__}: {difference}")
    bare.load_state_dict(weights, strict=True)
    return model


def save_checkpoint(path: str | os.PathLike[str], **contents: Any) -> None:
    """Writes {name: value, ...} as a .pth file that `read_checkpoint` reads, e.g. model=model.state_dict(), epoch=3.

    The file appears whole or not at all: it is written beside its place and moved there. Raises TypeError when a
    value is of a class that could not be read back without running code (pathlib.Path, NumPy scalars, ...).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        with torch.serialization.safe_globals([argparse.Namespace]):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(partial)
        if unsafe:
            raise TypeError(f"contents: expected tensors, numbers, strings and containers, found {', '.join(unsafe)}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _why_unreadable(error: Exception) -> str:
    """One line in place of PyTorch's page, which advises to load the file unsafely."""
    foreign_class = re.search(r"GLOBAL (\S+)", str(error))
    if foreign_class:
        return f"holds a pickled {foreign_class[1]}; loading it could run code, so it is refused"
    if "TorchScript" in str(error):
        return "a TorchScript archive, which is a program; expected a state dict"
    if isinstance(error, (pickle.UnpicklingError, EOFError)):
        return "truncated, or not written by torch.save"
    reason = re.split(r"\. |\n", str(error))[0]
    return f"truncated or not a checkpoint ({type(error).__name__}: {reason})"


def _state_dict(contents: dict[str, Any], path: Path, name: str) -> dict[str, Tensor]:
    weights: Any = contents.get(name)
    if weights is None and name == "model" and all(isinstance(value, Tensor) for value in contents.values()):
        weights = contents
    if not isinstance(weights, Mapping) or not weights:
        found = ", ".join(repr(key) for key in list(contents)[:SHOWN]) or "nothing"
        raise CheckpointError(f"{path}: expected a state dict, or one under the key {name!r}; the file holds {found}")
    for prefix in ("module.", "_orig_mod."):
        if all(str(key).startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return dict(weights)


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    compiled = getattr(model, "_orig_mod", None)
    return model if compiled is None else _unwrapped(compiled)


def _difference(own: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """The first keys that keep `weights` from fitting `own`, by kind; empty when it fits."""
    kinds = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [str(key) for key in weights if key not in own],
        "different": [
            f"{key} ({_kind(weights[key])} in the file, {_kind(own[key])} in the model)"
            for key in own
            if key in weights and _kind(weights[key]) != _kind(own[key])
        ],
    }
    parts = []
    for kind, keys in kinds.items():
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        if keys:
            parts.append(f"{kind}: {', '.join(keys[:SHOWN])}{more}")
    return "; ".join(parts)


def _kind(value: Any) -> str:
    """What has to agree for a copy to be faithful: the shape, and that both are numbers of the same sort."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
        return type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} {value.dtype}"
    sort = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{sort}"
