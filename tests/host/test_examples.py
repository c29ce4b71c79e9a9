"""The scripts in examples/ run, at a small size, and do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_test_for_each() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"accelerate", "detection", "export", "picture", "segmentation"}


def test_detection() -> None:
    pytest.importorskip("torchvision")
    assert 0 < load("detection").main(["--size", "96", "128"]) < 20


def test_segmentation_learns() -> None:
    losses = load("segmentation").main(["--steps", "12", "--size", "64"])
    assert losses[-1] < 0.7 * losses[0]


def test_accelerate_changes_no_number() -> None:
    assert load("accelerate").main() < 1e-6


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    block = load("picture").main(["--output", str(tmp_path / "picture.png"), "--tile", "52"])
    assert block.grid == (8, 13) and (tmp_path / "picture.png").exists()
    assert block.owner.unique().numel() > 0.9 * 8 * 13  # hardly a super token goes without pixels


def test_export(tmp_path: Path) -> None:
    path = load("export").main(["--size", "64", "--output", str(tmp_path / "model.pt2")])
    assert path.exists()


def test_the_notebook_runs_from_top_to_bottom() -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "super_tokens.ipynb", as_version=4)
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "commit it without outputs"
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(drawn) == 2
