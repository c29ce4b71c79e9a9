"""Checkpoint files: every published form loads, nothing pickled runs, a bad file leaves the model as it was."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import stvit
from stvit.checkpoint import read_checkpoint
from stvit.model import CONFIGS, STViT
from tests.support.authors_structure import published_shapes

CONFIG: dict[str, Any] = {
    "embed_dim": (8, 12, 16, 16),
    "depths": (1, 1, 1, 1),
    "layerscale": (False, False, True, True),
}


def build() -> STViT:
    return STViT(num_classes=5, num_heads=(1, 2, 2, 2), projection=24, **CONFIG)


def published_weights(**changes: Any) -> OrderedDict[str, Tensor]:
    """A state dict as a published file holds it, made from the published names and shapes alone."""
    shapes = published_shapes(**{**CONFIG, "num_classes": 5, "projection": 24, **changes})
    weights = OrderedDict((name, torch.randn(shape)) for name, shape in shapes.items())
    for name in weights:
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(1000)
        if name.endswith("fold.weights"):
            weights[name] = torch.eye(9).reshape(9, 1, 3, 3)
    return weights


def assert_loaded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)


def published_file(weights: dict[str, Tensor]) -> dict[str, Any]:
    """All that a published training run saves."""
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "lr_scheduler": {"num_updates": 3},
        "epoch": 299,
        "model_ema": OrderedDict((name, value + 1) for name, value in weights.items()),
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="stvit_small", lr=5e-4, opt_betas=None),
        "max_accuracy": 83.6,
    }


def with_prefix(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


FORMS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "published": published_file,
    "bare": lambda weights: weights,
    "ddp": lambda weights: {"model": with_prefix("module.", weights)},
    "bare ddp": lambda weights: with_prefix("module.", weights),
    "compiled": lambda weights: {"model": with_prefix("module._orig_mod.", weights)},
    "compiled inside": lambda weights: {"model": with_prefix("_orig_mod.module.", weights)},
    "wrapped twice": lambda weights: with_prefix("module._orig_mod.module.module.", weights),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_file_loads(tmp_path: Path, form: str, legacy: bool) -> None:
    weights = published_weights()
    torch.save(FORMS[form](weights), tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    model = build()
    assert stvit.load_checkpoint(model, tmp_path / "file.pth") is model
    assert_loaded(model, weights)


def test_safetensors_load(tmp_path: Path) -> None:
    weights = published_weights()
    save_file(weights, tmp_path / "file.safetensors")
    assert_loaded(stvit.load_checkpoint(build(), str(tmp_path / "file.safetensors")), weights)


def test_averaged_weights_load(tmp_path: Path) -> None:
    contents = published_file(published_weights())
    torch.save(contents, tmp_path / "file.pth")
    assert_loaded(stvit.load_checkpoint(build(), tmp_path / "file.pth", use_ema=True), contents["model_ema"])
    del contents["model_ema"]
    torch.save(contents, tmp_path / "file.pth")
    with pytest.raises(stvit.CheckpointError, match="'model_ema'; the file holds 'model', 'optimizer'"):
        stvit.load_checkpoint(build(), tmp_path / "file.pth", use_ema=True)


def test_wrapped_models_are_loaded_into(tmp_path: Path) -> None:
    weights = published_weights()
    torch.save(weights, tmp_path / "file.pth")
    model = build()
    stvit.load_checkpoint(torch.compile(nn.DataParallel(model)), tmp_path / "file.pth")
    assert_loaded(model, weights)


def test_half_precision_models_keep_their_dtype(tmp_path: Path) -> None:
    weights = published_weights()
    torch.save(weights, tmp_path / "file.pth")
    model = stvit.load_checkpoint(build().bfloat16(), tmp_path / "file.pth")
    assert torch.equal(model.head.weight, weights["head.weight"].bfloat16())


def test_round_trip_has_the_published_layout(tmp_path: Path) -> None:
    """What we save has exactly the published names and shapes, constant kernels included."""
    model = build()
    stvit.save_checkpoint(tmp_path / "ours.pth", model=model.state_dict(), epoch=3, args=argparse.Namespace(lr=0.1))
    contents = read_checkpoint(tmp_path / "ours.pth")
    assert contents["epoch"] == 3 and contents["args"] == argparse.Namespace(lr=0.1)
    expected = published_weights()
    assert {name: value.shape for name, value in contents["model"].items()} == {
        name: value.shape for name, value in expected.items()
    }
    for name, value in contents["model"].items():
        if name.endswith("fold.weights"):
            assert torch.equal(value, expected[name])
    assert_loaded(stvit.load_checkpoint(build(), tmp_path / "ours.pth"), model.state_dict())


def test_a_published_size_loads(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIGS["stvit_tiny"].items() if key != "num_heads"}
    torch.save({"model": published_weights(**config, layerscale=(False,) * 4, num_classes=3, projection=1024)},
               tmp_path / "file.pth")  # fmt: skip
    stvit.load_checkpoint(stvit.stvit_tiny(num_classes=3), tmp_path / "file.pth")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("load", [read_checkpoint, lambda path: stvit.load_checkpoint(build(), path)])
def test_pickled_code_never_runs(tmp_path: Path, how: str, load: Callable[[Path], object]) -> None:
    target, path = tmp_path / "executed", tmp_path / "file.pth"
    contents = {"model": published_weights(), "args": Malicious(target)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(stvit.CheckpointError, match=r"file\.pth: ") as caught:
        load(path)
    assert not target.exists()
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert how == "pickle" or "posix.system" in str(caught.value)


def unreadable_files(folder: Path) -> dict[str, Path]:
    whole = folder / "whole.pth"
    torch.save({"model": published_weights()}, whole)
    tensors = folder / "whole.safetensors"
    save_file(published_weights(), tensors)
    contents = {
        "half.pth": whole.read_bytes()[: whole.stat().st_size // 2],
        "start.pth": whole.read_bytes()[:100],
        "half.safetensors": tensors.read_bytes()[: tensors.stat().st_size // 2],
        "empty.pth": b"",
        "empty.safetensors": b"",
        "text.pth": b"<!DOCTYPE html><html>404</html>",
        "image.pth": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500),
        "renamed.safetensors": whole.read_bytes(),
        "renamed.pth": tensors.read_bytes(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    torch.jit.script(nn.Linear(2, 2)).save(folder / "script.pth")
    (folder / "folder.pth").mkdir()
    return {
        name: folder / name for name in [*contents, "script.pth", "folder.pth", "missing.pth", "missing.safetensors"]
    }


@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:.*torch.jit.* is deprecated")
def test_unreadable_files_give_one_clear_error(tmp_path: Path) -> None:
    for name, path in unreadable_files(tmp_path).items():
        model = build()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(stvit.CheckpointError) as caught:
            stvit.load_checkpoint(model, path)
        message = str(caught.value)
        assert message.startswith(f"{path}: "), name
        assert "\n" not in message and len(message) < len(str(path)) + 200, (name, message)
        assert_loaded(model, before)
    with pytest.raises(ValueError, match="No such file"):
        stvit.load_checkpoint(build(), tmp_path / "missing.pth")


def changed(**changes: object) -> dict[str, object]:
    weights: dict[str, object] = dict(published_weights())
    for name, value in changes.items():
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("contents", "reasons"),
    [
        (lambda: changed(**{"head.bias": None}), ["missing: head.bias"]),
        (lambda: changed(extra=torch.zeros(1)), ["unexpected: extra"]),
        (
            lambda: changed(**{"head.weight": torch.zeros(7, 24)}),
            ["different: head.weight ((7, 24) in the file, (5, 24) in the model)"],
        ),
        (lambda: changed(**{"head.bias": torch.zeros(5, dtype=torch.int64)}), ["different: head.bias ((5,) int64"]),
        (lambda: {"model": changed(**{"head.bias": "text"})}, ["different: head.bias (str in the file"]),
        (
            lambda: published_weights(num_classes=7, depths=(1, 1, 1, 2)),
            ["unexpected: layers.3.blocks.1.gamma_1, ", "and 20 more", "different: head.weight", "head.bias"],
        ),
        (lambda: {"conv1.weight": torch.zeros(1)}, ["missing: patch_embed.proj.0.weight", "unexpected: conv1.weight"]),
        (lambda: {"state": 3, "epoch": 1}, ["'model'; the file holds 'state', 'epoch'"]),
        (lambda: {}, ["the file holds nothing"]),
        (lambda: {"model": {}}, ["the file holds 'model'"]),
        (lambda: [torch.zeros(1)], ["expected a dict, the file holds list"]),
        (lambda: torch.zeros(1), ["expected a dict, the file holds Tensor"]),
    ],
)
def test_files_that_do_not_fit_name_the_first_differing_keys(
    tmp_path: Path, contents: Callable[[], object], reasons: list[str]
) -> None:
    path = tmp_path / "file.pth"
    torch.save(contents(), path)
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(stvit.CheckpointError) as caught:
        stvit.load_checkpoint(model, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and all(reason in message for reason in reasons), message
    assert_loaded(model, before)


def test_numpy_numbers_beside_weights_are_read(tmp_path: Path) -> None:
    """Accuracies and losses of other programs; a pickle that would run code is refused still."""
    beside = {"best": np.float64(83.5), "epoch": np.int64(3), "done": np.bool_(True), "losses": np.arange(3.0)}
    torch.save({"model": published_weights(), **beside}, tmp_path / "file.pth")
    stvit.load_checkpoint(build(), tmp_path / "file.pth")
    contents = read_checkpoint(tmp_path / "file.pth")
    assert contents["best"] == 83.5 and contents["losses"].tolist() == [0, 1, 2]

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    for value in (Runs(), np.array([Runs()], dtype=object)):
        torch.save({"model": published_weights(), "value": value}, tmp_path / "file.pth")
        with pytest.raises(stvit.CheckpointError):
            read_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "ran").exists()


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.pth"
    stvit.save_checkpoint(path, epoch=1)
    stvit.save_checkpoint(path, epoch=2)
    assert read_checkpoint(path) == {"epoch": 2}

    def fail(contents: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        stvit.save_checkpoint(path, epoch=3)
    assert read_checkpoint(path) == {"epoch": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["file.pth"]


def test_saving_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"contents: expected .*pathlib"):
        stvit.save_checkpoint(tmp_path / "file.pth", output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_safetensors_are_written_as_such(tmp_path: Path) -> None:
    model = stvit.stvit_tiny(num_classes=3)
    path = tmp_path / "weights.safetensors"
    stvit.save_checkpoint(path, model=model.state_dict())
    other = stvit.load_checkpoint(stvit.stvit_tiny(num_classes=3), path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    for contents in ({}, {"model": model.state_dict(), "epoch": 3}, {"model": {"epoch": 3}}, {"epoch": 3}):
        with pytest.raises(TypeError, match="safetensors file holds one state dict"):
            stvit.save_checkpoint(tmp_path / "refused.safetensors", **contents)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_another_number_of_classes(tmp_path: Path) -> None:
    model, path = stvit.stvit_tiny(num_classes=3), tmp_path / "weights.pth"
    stvit.save_checkpoint(path, model=model.state_dict())
    for classes in (5, 0):
        other = stvit.stvit_tiny(num_classes=classes)
        head = [p.clone() for p in other.head.parameters()]
        with pytest.raises(stvit.CheckpointError, match="head"):
            stvit.load_checkpoint(other, path)
        stvit.load_checkpoint(other, path, head="skip")
        assert torch.equal(other.patch_embed.proj[0].weight, model.patch_embed.proj[0].weight)
        assert all(torch.equal(a, b) for a, b in zip(head, other.head.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"^head: expected 'strict' or 'skip'"):
        stvit.load_checkpoint(model, path, head="maybe")
