"""Hugging Face's from_pretrained and save_pretrained, on a local folder."""

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
