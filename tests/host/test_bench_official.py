"""bench.baselines.official imports a checkout of the authors' repository, without what that imports."""

import sys
from pathlib import Path

import pytest
import torch

from bench.baselines import official
from stvit.modules import DropPath

# What the authors' file imports, and a model of the same interface.
SOURCE = """
import torch
import scipy.io as sio
from fvcore.nn import FlopCountAnalysis, flop_count_table
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from timm.models.registry import register_model
from timm.models.vision_transformer import _cfg

import stvit


class StokenAttention(stvit.StokenAttention):
    def __init__(self, dim, stoken_size, **options):
        super().__init__(dim, to_2tuple(stoken_size), backend="reference", **options)


class Model(torch.nn.Module):
    def __init__(self, drop, drop_path):
        super().__init__()
        self.drop, self.drop_path = drop, DropPath(drop_path)
        self.weight = torch.nn.Parameter(trunc_normal_(torch.empty(1000), std=0.02))


@register_model
def stvit_small(args):
    model = Model(args.drop, args.drop_path)
    model.default_cfg = _cfg()
    return model
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "stvit.py").write_text(SOURCE)
    return tmp_path


def test_imports_none_of_the_dependencies(checkout: Path) -> None:
    before = dict(sys.modules)
    module = official.load(checkout)
    model = official.build(module, "stvit_small")
    assert isinstance(model.drop_path, DropPath)
    assert model.drop == 0.0 and 0.01 < model.weight.std() < 0.03
    with pytest.raises(RuntimeError, match="fvcore.nn.FlopCountAnalysis is a placeholder"):
        module.FlopCountAnalysis(model)
    assert sys.modules.pop(official.MODULE) is module
    before.pop(official.MODULE, None)
    assert sys.modules == before, "stand-ins outlive the import"


def test_timm_registry_keeps_our_models(checkout: Path) -> None:
    timm = pytest.importorskip("timm")
    import stvit.timm_models  # noqa: F401  (registers its models)

    official.build(official.load(checkout), "stvit_small")
    assert timm.models.model_entrypoint("stvit_small").__module__ == "stvit.timm_models"


def test_attention_with_and_without_refinement(checkout: Path) -> None:
    module = official.load(checkout)
    plain = official.super_token_attention(module, 6, (2, 2), None)
    assert not [name for name, _ in plain.named_parameters()]
    refined = official.super_token_attention(module, 6, (2, 2), 3)
    assert refined.stoken_refine.num_heads == 3 and refined.stoken_refine.qkv.bias is not None
    assert refined(torch.randn(1, 6, 5, 4)).shape == (1, 6, 5, 4)


def test_says_what_is_wrong_with_the_directory(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(official.OfficialError, match=r"--official: .*elsewhere/models/stvit.py is not a file"):
        official.load(tmp_path / "elsewhere")
    module = official.load(checkout)
    with pytest.raises(official.OfficialError, match="has no model stvit_huge"):
        official.build(module, "stvit_huge")
    for source, why in (("1 +", "SyntaxError"), ("raise OSError('no')", "OSError: no")):
        (checkout / "models" / "stvit.py").write_text(source)
        with pytest.raises(official.OfficialError, match=f"can't be imported: {why}"):
            official.load(checkout)
        assert official.MODULE not in sys.modules
