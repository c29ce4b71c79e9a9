"""Hugging Face's from_pretrained and save_pretrained, and timm's save_for_hf, on local folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stvit

pytest.importorskip("huggingface_hub")


def test_a_folder_there_and_back(tmp_path: Path) -> None:
    from stvit import hub
    from stvit.model import CONFIGS

    torch.manual_seed(0)
    model = hub.STViT(**{**CONFIGS["stvit_tiny"], "num_classes": 3, "stoken_size": (8, (4, 2), 1, 1)}).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 3 and config["depths"] == [1, 1, 2, 1]
    again = hub.STViT.from_pretrained(tmp_path)
    assert isinstance(again, stvit.STViT)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    plain = stvit.STViT(**config).eval()  # the same files, without the Hub
    stvit.load_checkpoint(plain, tmp_path / "model.safetensors")
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_as_timm_saves_it(safe: bool, tmp_path: Path) -> None:
    """What timm's push_to_hf_hub uploads: read back by timm, with the model's arguments, and by ours without it."""
    timm = pytest.importorskip("timm")
    from timm.models._hub import load_model_config_from_path, save_for_hf

    import stvit.timm_models

    torch.manual_seed(0)
    options = {"num_classes": 3, "stoken_size": (8, (4, 2), 1, 1), "global_pool": "max", "img_size": 96}
    model = timm.create_model("stvit_tiny", **options).eval()
    save_for_hf(model, tmp_path, safe_serialization=safe)
    cfg, name, arguments = load_model_config_from_path(tmp_path)
    assert (name, cfg["num_classes"], cfg["input_size"]) == ("stvit_tiny", 3, (3, 96, 96))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert timm.data.resolve_data_config({}, model=again)["input_size"] == (3, 96, 96)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()
    assert torch.equal(other.forward_features(x), model.forward_features(x)) and other(x).shape == (1, 7)
    plain = stvit.stvit_tiny(num_classes=3, stoken_size=(8, (4, 2), 1, 1), global_pool="max").eval()
    stvit.load_checkpoint(plain, tmp_path / ("model.safetensors" if safe else "pytorch_model.bin"))
    assert torch.equal(plain(x), model(x))
