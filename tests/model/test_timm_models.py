"""timm's registry: whichever of stvit and timm comes first, and stvit without timm."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch

import stvit
from stvit import timm_models

timm = pytest.importorskip("timm")
NAMES = ["stvit_base", "stvit_large", "stvit_small", "stvit_tiny"]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

LIST = "print(timm.list_models('stvit*')); print(type(timm.create_model('stvit_tiny', num_classes=10)).__module__)"


@pytest.mark.parametrize(
    "imports",
    [
        # with what packages do that use timm where it is installed: look whether it could be imported
        "import stvit, importlib.util as u; u.find_spec('timm'); from timm.models import is_model; import timm",
        "import timm, stvit",
        "import stvit, importlib; importlib.reload(stvit); importlib.reload(stvit.timm_models).register(); import timm",
    ],
)
def test_either_import_order(run_python: RunPython, imports: str) -> None:
    code = f"import warnings; warnings.simplefilter('error', UserWarning); {imports}; {LIST}; import sys; "
    code += "print([f for f in sys.meta_path if 'stvit' in type(f).__module__], type(timm.__loader__).__name__)"
    assert run_python("-c", code).stdout.splitlines() == [str(NAMES), "stvit.model", "[] SourceFileLoader"]


def test_an_import_of_timm_that_fails_is_tried_again(run_python: RunPython) -> None:
    code = f"""
import stvit, sys
sys.modules["timm.models"] = None
try:
    import timm
except ImportError:
    del sys.modules["timm.models"]
import timm; {LIST}
"""
    assert run_python("-c", code).stdout.splitlines() == [str(NAMES), "stvit.model"]


@pytest.mark.parametrize("missing", ["sys.modules['timm'] = None", "sys.meta_path.insert(0, Absent())"])
def test_without_timm(run_python: RunPython, missing: str) -> None:
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "timm":
            raise ModuleNotFoundError(name)
{missing}
import stvit, torch
try:
    import timm
except ModuleNotFoundError:
    print(stvit.stvit_tiny(num_classes=3)(torch.zeros(2, 3, 32, 32)).shape)
"""
    assert run_python("-c", code).stdout == "torch.Size([2, 3])\n"


def test_importing_stvit_is_light(run_python: RunPython) -> None:
    code = """
import sys, stvit, torch
print(torch.cuda.is_initialized(), [name for name in ("timm", "torchvision", "triton") if name in sys.modules])
"""
    initialized, names = run_python("-c", code).stdout.strip().split(" ", 1)
    assert initialized == "False"
    assert "timm" not in names and "torchvision" not in names


def test_create_model_passes_arguments_on() -> None:
    model = timm.create_model(
        "stvit_tiny", num_classes=10, in_chans=1, drop_path_rate=0.1, backend="reference", association_grad=True
    )
    assert isinstance(model, stvit.STViT)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert model.layers[3].blocks[0].drop_path.drop_prob == pytest.approx(0.1)
    assert model.layers[0].blocks[0].attn.backend == "reference"
    assert timm.create_model("stvit_tiny").num_classes == 1000


def test_default_config() -> None:
    cfg = timm.create_model("stvit_tiny").default_cfg
    assert (cfg["input_size"], cfg["classifier"], cfg["first_conv"]) == ((3, 224, 224), "head", "patch_embed.proj.0")
    data = timm.data.resolve_data_config({}, model=timm.create_model("stvit_tiny"))
    assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)
    model = stvit.stvit_tiny()
    modules = dict(model.named_modules())
    assert isinstance(modules[cfg["first_conv"]], torch.nn.Conv2d) and modules[cfg["classifier"]] is model.head
    assert not timm.list_models("stvit*", pretrained=True)


def test_pretrained_points_to_load_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"^pretrained: .*stvit\.load_checkpoint"):
        timm.create_model("stvit_small", pretrained=True)


@pytest.mark.parametrize(("out_indices", "stages"), [((0, 1, 2, 3), [0, 1, 2, 3]), ((1, -1), [1, 3]), (2, [2, 3])])
def test_features_only(out_indices: int | tuple[int, ...], stages: list[int]) -> None:
    backbone = timm.create_model("stvit_tiny", features_only=True, out_indices=out_indices)
    backbone.set_grad_checkpointing()
    dims, reductions = [[32, 64, 160, 256][i] for i in stages], [[4, 8, 16, 32][i] for i in stages]
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == (dims, reductions)
    maps = backbone(torch.randn(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [
        (2, dim, 64 // step, 64 // step) for dim, step in zip(dims, reductions, strict=True)
    ]
    sum(m.sum() for m in maps).backward()
    unused = {name for name, parameter in backbone.named_parameters() if parameter.grad is None}
    assert not unused


def test_registering_twice_is_harmless() -> None:
    timm_models.register()
    assert timm.list_models("stvit*") == NAMES
