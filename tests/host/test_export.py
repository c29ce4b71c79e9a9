"""`stvit.export`: what it writes is loaded by the real libraries and computes what the model computes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stvit

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

# In a process that has no stvit: loads the program, saves what it makes of the images.
ALONE = """
import sys, torch
program = torch.export.load("model.pt2").module()
torch.save([program(x) for x in torch.load("images.pt")], "answers.pt")
assert "stvit" not in sys.modules
"""


# Two stages, one with super tokens and one whose super tokens are pixels: symbolic sizes take long to reason about.
TWO_STAGES: dict[str, Any] = {
    "embed_dim": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "n_iter": (1, 1), "layerscale": (False, True),
    "projection": 32,
}  # fmt: skip


def tiny(**options: Any) -> stvit.STViT:
    """A model whose BatchNorms and weights are not those of a fresh one, so that folding shows."""
    torch.manual_seed(0)
    model = stvit.stvit_tiny(**{"num_classes": 5, "backend": "reference", **options})
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(part.running_var, 0.5, 2.0)
    return model.eval()


def test_a_program_runs_without_stvit_at_other_batch_sizes(tmp_path: Path, run_python: RunPython) -> None:
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = stvit.export(model, tmp_path / "model.pt2", example=torch.randn(2, 3, 64, 64))
    assert path == tmp_path / "model.pt2"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    images = [torch.randn(1, 3, 64, 64), torch.randn(4, 3, 64, 64)]
    torch.save(images, tmp_path / "images.pt")
    run_python("-c", ALONE, cwd=tmp_path)
    for x, y in zip(images, torch.load(tmp_path / "answers.pt"), strict=True):
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)


def test_the_graph_holds_no_regions(tmp_path: Path) -> None:
    path = stvit.export(tiny(), tmp_path / "model.pt2", dynamic=False, example=torch.randn(2, 3, 32, 32))
    calls = {str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function"}
    assert not [call for call in calls if "autocast" in call or "grad" in call]


def test_a_program_takes_other_sizes(tmp_path: Path) -> None:
    """Rectangular tiles: rows in steps of 32, columns in steps of 64."""
    model = tiny(**TWO_STAGES, stoken_size=((8, 16), 1))
    path = stvit.export(model, tmp_path / "model.pt2", dynamic="size", example=torch.randn(2, 3, 96, 128))
    program = torch.export.load(path).module()
    for shape in ((1, 3, 64, 192), (3, 3, 160, 128)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    for shape in ((1, 3, 80, 128), (1, 3, 64, 96), (1, 3, 32, 128)):
        with pytest.raises(AssertionError, match="Guard failed"):
            program(torch.randn(shape))


@pytest.mark.parametrize("dynamic", [False, True, pytest.param("size", marks=pytest.mark.compiled_all)])  # a minute
def test_onnx_is_as_exact_fixed_as_dynamic(tmp_path: Path, dynamic: bool | str) -> None:
    """In onnxruntime. Torch's own optimizer was off by 2 % of the largest output where the batch is fixed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny(**TWO_STAGES, stoken_size=(8, 1)) if dynamic == "size" else tiny()
    x = torch.randn(2, 3, 64, 64)
    path = stvit.export(model, tmp_path / "model.onnx", format="onnx", dynamic=dynamic, example=x)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    other = {False: x, True: torch.randn(5, 3, 64, 64), "size": torch.randn(1, 3, 128, 96)}[dynamic]
    for images in (x, other):
        (y,) = session.run(None, {"x": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(images), rtol=1e-5, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.compiled_all  # minutes of g++
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++, which is not there")
def test_a_compiled_package(tmp_path: Path) -> None:
    """AOTInductor's, for this CPU, in plain operators."""
    from torch._inductor import aoti_load_package

    model = tiny(**TWO_STAGES, stoken_size=(8, 1))
    path = stvit.export(model, tmp_path / "model.pt2", format="aoti", example=torch.randn(2, 3, 64, 64))
    x = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(aoti_load_package(str(path))(x), model(x), rtol=1e-4, atol=1e-5)


def test_wrong_arguments(tmp_path: Path) -> None:
    for options, expected in (
        ({"format": "tflite"}, "^format: expected one of pt2, onnx, aoti"),
        ({"backend": "auto"}, "^backend: expected reference, triton or cuda"),
        ({"format": "onnx", "backend": "triton"}, "^backend: expected reference, got"),
        ({"example": torch.randn(1, 3, 32, 32)}, "^example: expected at least 2 images"),
        ({"dynamic": "batch"}, "^dynamic: expected True, False or 'size', got 'batch'"),
        ({"dynamic": "size", "example": torch.randn(2, 3, 64, 80)}, "^example: expected multiples of 32 x 32 from 64"),
        ({"dynamic": "size", "example": torch.randn(2, 3, 32, 64)}, "^example: expected multiples of 32 x 32 from 64"),
    ):
        with pytest.raises(ValueError, match=expected):
            stvit.export(tiny(), tmp_path / "model.pt2", **options)
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


def test_a_wrong_file_is_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stvit import exporting

    monkeypatch.setattr(exporting, "_write_pt2", lambda program, path: lambda x: 1.01 * program.module()(x))
    with pytest.raises(stvit.ExportError, match="differs from the model by"):
        stvit.export(tiny(), tmp_path / "model.pt2", dynamic=False, example=torch.randn(2, 3, 32, 32))
