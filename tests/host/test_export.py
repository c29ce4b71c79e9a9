"""`stvit.export`: what it writes is loaded by the real libraries and computes what the model computes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

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


def tiny() -> stvit.STViT:
    """A model whose BatchNorms and weights are not those of a fresh one, so that folding shows."""
    torch.manual_seed(0)
    model = stvit.stvit_tiny(num_classes=5, backend="reference")
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


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_is_as_exact_fixed_as_dynamic(tmp_path: Path, dynamic: bool) -> None:
    """In onnxruntime. Torch's own optimizer was off by 2 % of the largest output where the batch is fixed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = tiny(), torch.randn(2, 3, 64, 64)
    path = stvit.export(model, tmp_path / "model.onnx", format="onnx", dynamic=dynamic, example=x)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for images in (x, torch.randn(5, 3, 64, 64))[: 1 + dynamic]:
        (y,) = session.run(None, {"x": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(images), rtol=1e-5, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_wrong_arguments(tmp_path: Path) -> None:
    for options, expected in (
        ({"format": "tflite"}, "^format: expected one of pt2, onnx, aoti"),
        ({"backend": "auto"}, "^backend: expected reference, triton or cuda"),
        ({"format": "onnx", "backend": "triton"}, "^backend: expected reference, got"),
        ({"example": torch.randn(1, 3, 32, 32)}, "^example: expected at least 2 images"),
    ):
        with pytest.raises(ValueError, match=expected):
            stvit.export(tiny(), tmp_path / "model.pt2", **options)
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


def test_a_wrong_file_is_not_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stvit import exporting

    monkeypatch.setattr(exporting, "_write_pt2", lambda program, path: lambda x: 1.01 * program.module()(x))
    with pytest.raises(stvit.ExportError, match="differs from the model by"):
        stvit.export(tiny(), tmp_path / "model.pt2", dynamic=False, example=torch.randn(2, 3, 32, 32))
