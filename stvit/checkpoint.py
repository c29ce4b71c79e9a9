"""Reading and writing of checkpoint files. Nothing that a file holds is ever executed.

A .pth file is read by PyTorch's restricted unpickler, which knows tensors and plain containers. Allowed beside them are
`argparse.Namespace`, which the published files carry, and NumPy's scalars and arrays of numbers, which other programs
leave as accuracies and losses: none of them runs code when it is read. A .safetensors file holds tensors only.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .checks import shown
from .model import STViT

SHOWN = 3  # differing keys named of each kind
PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
# NumPy's pickles name the function that rebuilds a scalar or an array, by its place before and since NumPy 2.
_NUMPY_FUNCTIONS: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]  # scalar, _reconstruct
_NUMPY_PLACES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY: list[Any] = [
    np.dtype,
    np.ndarray,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefdFD"),
    *((rebuild, f"{place}.{rebuild.__name__}") for place in _NUMPY_PLACES for rebuild in _NUMPY_FUNCTIONS),
]
SHARDED = (
    "expected whole tensors, found one process's parts of a sharded model: save what "
    "torch.distributed.checkpoint.state_dict.get_model_state_dict returns with full_state_dict=True"
)
READABLE: list[Any] = [argparse.Namespace, *_NUMPY]
Model = TypeVar("Model", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint file can't be read, or doesn't fit the model. The message names the file and the reason."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All that a .pth or .safetensors file holds, tensors on the CPU.

    Raises CheckpointError: no such file, truncated, not a checkpoint, or with pickled objects that would run code.
    """
    path = _as_path(path)
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        if path.suffix == ".safetensors":
            contents = load_file(path)
        else:
            with torch.serialization.safe_globals(READABLE):
                contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes the readers raise
        raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a dict, the file holds {type(contents).__name__}")
    return contents


def load_checkpoint(
    model: Model, path: str | os.PathLike[str], *, use_ema: bool = False, head: str = "strict"
) -> Model:
    """Loads the weights of a published file, or of one of ours, into `model` and returns it.

    Args:
        model: any module; wrapped in DistributedDataParallel or torch.compile is fine. A backbone, which is what
            `timm.create_model(..., features_only=True)` returns, takes from the file what it has, and so does one whose
            BatchNorms were replaced by frozen ones, as detectors do. One on the meta device becomes real, on the CPU.
            Of one sharded by `fully_shard` each process keeps its own parts.
        path: .pth (a state dict, or a dict that holds one under "model", with or without the prefix that
            DistributedDataParallel adds) or .safetensors.
        use_ema: take the averaged weights, under "model_ema", instead.
        head: "strict", or "skip" to leave the classifier `head` as it is: for another number of classes.

    Raises CheckpointError (a ValueError) that names the file and what is wrong: unreadable, foreign, or the first
    keys that are missing, unexpected or of another shape. The model is then as it was before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {shown(model)}")
    _check_head(head)
    return load_contents(model, read_checkpoint(path), path, use_ema=use_ema, head=head)


def load_contents(
    model: Model,
    contents: dict[str, Any],
    path: str | os.PathLike[str],
    *,
    use_ema: bool = False,
    head: str = "strict",
) -> Model:
    """`load_checkpoint` for a file that `read_checkpoint` has read; `path` only names it in errors."""
    _check_head(head)
    weights = _state_dict(contents, Path(path), "model_ema" if use_ema else "model")
    bare = _unwrapped(model)
    own = bare.state_dict()
    pruned = tuple(getattr(bare, "pruned", ()))  # of a backbone
    weights = {key: value for key, value in weights.items() if key in own or not _dispensable(str(key), own, pruned)}
    if head == "skip":
        weights = {key: value for key, value in weights.items() if not str(key).startswith("head.")}
        weights |= {key: value for key, value in own.items() if key.startswith("head.")}
    difference = _difference(own, weights)
    if difference:
        raise CheckpointError(f"{path}: doesn't fit {type(bare).__name__}: {difference}")
    meta = any(value.is_meta for value in own.values())  # a copy onto the meta device would be lost
    bare.load_state_dict({key: _placed(weights[key], own[key], meta) for key in own}, strict=True, assign=meta)
    return model


def _dispensable(key: str, own: Mapping[str, Any], pruned: tuple[str, ...]) -> bool:
    """Whether a model can do without what a file holds: a layer taken away, the counter of a BatchNorm since frozen."""
    counter = key.endswith(".num_batches_tracked") and key.replace("num_batches_tracked", "running_mean") in own
    return counter or key.startswith(pruned)


def _check_head(head: object) -> None:
    if not isinstance(head, str) or head not in ("strict", "skip"):
        raise ValueError(f"head: expected 'strict' or 'skip', got {shown(head)}")


def _as_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a str or os.PathLike, got {shown(path)}")
    return Path(path)


def _placed(value: Tensor, own: Tensor, assigned: bool) -> Tensor:
    """What `load_state_dict` takes for `own`: this process's parts of it, a tensor of its kind if it is `assigned`."""
    if _is_sharded({"": own}):
        return _sharded(value, own)
    if not assigned:
        return value
    return torch.empty_like(own, device="cpu" if own.is_meta else own.device).copy_(value)


def _sharded(value: Tensor, own: Any) -> Tensor:
    """This process's parts of a tensor that every process has read, as a DTensor; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.dtype), own.device_mesh, own.placements, src_data_rank=None)


def save_checkpoint(path: str | os.PathLike[str], **contents: Any) -> None:
    """Writes {name: value, ...} as a .pth file that `read_checkpoint` reads, e.g. model=model.state_dict(), epoch=3.

    A path that ends in .safetensors gets a safetensors file, which holds one state dict, model=..., and nothing else.

    The file appears whole or not at all: it is written beside its place and moved there. Raises TypeError when a
    value is of a class that could not be read back without running code (pathlib.Path, ...), a sharded tensor, or one
    that a .safetensors file can't hold; OSError naming `path` when it can't be written, such as on a full disk.
    """
    path = _as_path(path)
    if any(isinstance(value, Mapping) and _is_sharded(value) for value in contents.values()):
        raise TypeError(f"contents: {SHARDED}")
    with whole_file(path) as partial:
        if path.suffix == ".safetensors":
            return _save_tensors(contents, partial)
        with open(partial, "wb") as file:
            _save(contents, file)
        with torch.serialization.safe_globals(READABLE):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(partial)
        if unsafe:
            raise TypeError(f"contents: expected tensors, numbers, strings and containers, found {', '.join(unsafe)}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields where to write: a file beside `path` that takes its place, on the disk, when the block ends.

    When the block raises, or the disk is full, `path` stays as it was and the other file is removed; of a process that
    is killed `.NAME.PID.partial` stays. An OSError names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


class _Recorder:
    """A file for torch.save, which replaces the OSError of a failed write by a RuntimeError about positions."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(contents: dict[str, Any], file: IO[bytes]) -> None:
    recorder = _Recorder(file)
    try:
        torch.save(contents, recorder)  # type: ignore[arg-type]
        file.flush()
    except Exception:
        if recorder.error is not None:
            raise recorder.error from None
        raise


def _save_tensors(contents: dict[str, Any], path: Path) -> None:
    weights: Any = contents.get("model")
    plain = isinstance(weights, Mapping) and all(isinstance(value, Tensor) for value in weights.values())
    if set(contents) != {"model"} or not plain:
        found = ", ".join(f"{key}={type(value).__name__}" for key, value in contents.items()) or "nothing"
        raise TypeError(f"contents: a .safetensors file holds one state dict of tensors, model=...; got {found}")
    save_file({key: value.contiguous() for key, value in weights.items()}, path, metadata={"format": "pt"})


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
    if _is_sharded(weights):
        raise CheckpointError(f"{path}: {SHARDED}")
    return without_prefixes(weights)


def _is_sharded(weights: Mapping[str, Any]) -> bool:
    return any(type(value).__name__ == "DTensor" for value in weights.values())


def without_prefixes(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under their own names: prefixes that every name has are taken off until none is left."""
    weights = dict(weights)
    while prefix := next((p for p in PREFIXES if weights and all(str(key).startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    if isinstance(getattr(model, "model", None), STViT):  # timm's backbones
        inner = model.model
    return model if inner is None else _unwrapped(inner)


def _difference(own: Mapping[str, Tensor], weights: Mapping[str, Any]) -> str:
    """The first keys that keep `weights` from fitting `own`, by kind; empty when it fits."""
    kinds = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [str(key) for key in weights if key not in own],
        "different": [
            f"{key} ({_in_file(weights[key])} in the file, {_kind(own[key])} in the model)"
            for key in own
            if key in weights and _in_file(weights[key]) != _kind(own[key])
        ],
    }
    parts = []
    for kind, keys in kinds.items():
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        if keys:
            parts.append(f"{kind}: {', '.join(keys[:SHOWN])}{more}")
    return "; ".join(parts)


def _in_file(value: Any) -> str:
    """`_kind` of what a file holds, or in its place why it can't be copied."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested or value.is_meta:
        return "a nested tensor" if value.is_nested else "a tensor without values"
    return _kind(value)


def _kind(value: Any) -> str:
    """What has to agree for a copy to be faithful: the shape, and that both are numbers of the same sort."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized:
        return type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} {value.dtype}"
    sort = "" if value.is_floating_point() else f" {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{sort}"
