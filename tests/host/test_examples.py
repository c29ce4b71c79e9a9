"""The scripts in examples/ run, at a small size, and do what they say."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import stvit

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_test_for_each() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"detection", "export", "picture", "segmentation", "speed_up", "timm_backbone", "unet"}
    # Python looks for packages beside a script first, and transformers for this one.
    assert "accelerate" not in names


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, stvit.STViT]:
    """A file as the authors publish it, and the model whose weights it holds."""
    torch.manual_seed(1)
    model = stvit.stvit_tiny().eval()
    path = tmp_path_factory.mktemp("published") / "stvit-tiny-224.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="stvit_tiny"), "epoch": 299}, path)
    return path, model


def test_detection(published: tuple[Path, stvit.STViT]) -> None:
    pytest.importorskip("torchvision")
    path, model = published
    assert 0 < load("detection").main(["--size", "96", "128", "--checkpoint", str(path)]) < 20
    detector, x = load("detection").build("stvit_tiny", str(path), (96, 128)).eval(), torch.randn(1, 3, 64, 96)
    assert all(map(torch.equal, detector.backbone.body.forward_stages(x), model.forward_stages(x)))


def test_unet(published: tuple[Path, stvit.STViT]) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    path, model = published
    assert load("unet").main(["--size", "64", "--checkpoint", str(path)]).shape == (2, 64, 64)
    unet, x = load("unet").build("stvit_tiny", str(path), 2).eval(), torch.randn(1, 3, 64, 96)
    assert all(map(torch.equal, unet.encoder(x)[2:], model.forward_stages(x)))


def test_timm_backbone(published: tuple[Path, stvit.STViT]) -> None:
    pytest.importorskip("transformers")
    path, model = published
    maps, boxes = load("timm_backbone").main(["--size", "64", "96", "--checkpoint", str(path)])
    assert [features.shape[1] for features in maps] == [32, 64, 160, 256] and boxes.shape == (2, 10, 4)
    backbone, x = load("timm_backbone").build("stvit_tiny", str(path), (1, 3)).eval(), torch.randn(1, 3, 64, 96)
    assert all(map(torch.equal, backbone(x).feature_maps, model.forward_stages(x)[1::2]))


@pytest.mark.parametrize(
    ("name", "package"), [("unet", "segmentation_models_pytorch"), ("timm_backbone", "transformers")]
)
def test_what_is_missing_is_said(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"^{package} is missing: pip install {package.replace('_', '-')}$"):
        load(name)


def test_segmentation_learns() -> None:
    losses = load("segmentation").main(["--steps", "12", "--size", "64"])
    assert losses[-1] < 0.7 * losses[0]


def test_accelerate_changes_no_number() -> None:
    assert load("speed_up").main() < 1e-6


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
