"""timm's registry: whichever of stvit and timm comes first, and stvit without timm."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import stvit

timm = pytest.importorskip("timm")
timm_models = pytest.importorskip("stvit.timm_models")
NAMES = ["stvit_base", "stvit_large", "stvit_small", "stvit_tiny"]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

LIST = "print(timm.list_models('stvit*')); print(type(timm.create_model('stvit_tiny', num_classes=10)).__module__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import timm, stvit",
        "import stvit.timm_models, timm",
        "import stvit, timm; import stvit.timm_models",
        "import timm, stvit, importlib; importlib.reload(stvit); importlib.reload(stvit.timm_models).register()",
    ],
)
def test_either_import_order(run_python: RunPython, imports: str) -> None:
    code = f"import warnings; warnings.simplefilter('error', UserWarning); {imports}; {LIST}"
    assert run_python("-c", code).stdout.splitlines() == [str(NAMES), "stvit.model"]


def test_a_timm_too_old_does_not_keep_stvit_from_being_imported(run_python: RunPython) -> None:
    code = "import sys, types; sys.modules['timm'] = types.ModuleType('timm'); import stvit"
    child = run_python("-c", code)
    assert "the models are not registered with timm: No module named 'timm.data'" in child.stderr


def test_without_timm(run_python: RunPython) -> None:
    code = """
import sys
sys.modules["timm"] = None
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
heavy = ("timm", "torchvision", "torch._dynamo")
print(torch.cuda.is_initialized(), [name for name in heavy if name in sys.modules])
"""
    assert run_python("-c", code).stdout == "False []\n"


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


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, stvit.STViT]:
    """A file as the authors publish it, and the model whose weights it holds."""
    torch.manual_seed(3)
    model = stvit.stvit_tiny(num_classes=7).eval()
    path = tmp_path_factory.mktemp("published") / "weights.pth"
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(model="stvit_tiny"), "epoch": 299}, path)
    return path, model


def local_folder(kind: str, model: stvit.STViT, path: Path, folder: Path) -> dict[str, Any]:
    """What to give to create_model for the weights of `model` by one of timm's ways."""
    cfg = {"num_classes": 7}
    if kind == "file":
        return {"model_name": "stvit_tiny", "pretrained_cfg_overlay": {**cfg, "file": str(path)}}
    if kind == "state_dict":
        return {"model_name": "stvit_tiny", "pretrained_cfg_overlay": {**cfg, "state_dict": model.state_dict()}}
    ours = {key: value for key, value in timm_models.CONFIG.items() if key != "url"}
    (folder / "config.json").write_text(  # as timm's save_for_hf writes it
        json.dumps({"architecture": "stvit_tiny", "num_classes": 7, "pretrained_cfg": {**ours, "num_classes": 7}})
    )
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    return {"model_name": f"local-dir:{folder}"}


@pytest.mark.parametrize("kind", ["file", "state_dict", "local-dir"])
def test_weights_come_in_by_each_of_timms_ways(kind: str, published: tuple[Path, stvit.STViT], tmp_path: Path) -> None:
    path, model = published
    x = torch.randn(2, 3, 64, 64)
    options = local_folder(kind, model, path, tmp_path)
    same = timm.create_model(**options, pretrained=True).eval()
    assert torch.equal(same(x), model(x))
    other = timm.create_model(**options, pretrained=True, num_classes=3).eval()
    assert other(x).shape == (2, 3) and torch.equal(other.forward_features(x), model.forward_features(x))
    grey = timm.create_model(**options, pretrained=True, in_chans=1).eval()  # timm sums the colours' weights
    assert torch.allclose(grey(x[:, :1]), model(x[:, :1].expand(-1, 3, -1, -1)), atol=1e-5)
    backbone = timm.create_model(**options, pretrained=True, features_only=True, out_indices=(0, 2)).eval()
    for ours, theirs in zip(backbone(x), model.forward_intermediates(x, (0, 2), intermediates_only=True), strict=True):
        assert torch.equal(ours, theirs)


def test_a_saved_checkpoint_of_timm_comes_back(published: tuple[Path, stvit.STViT]) -> None:
    path, model = published
    again = timm.create_model("stvit_tiny", num_classes=7, checkpoint_path=path).eval()
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_load_checkpoint_fills_a_backbone(kind: str, published: tuple[Path, stvit.STViT], tmp_path: Path) -> None:
    path, model = published
    backbone = timm.create_model("stvit_tiny", features_only=True, out_indices=(1, 2)).eval()
    x = torch.randn(1, 3, 64, 64)
    if kind == "wrapped":
        backbone = torch.nn.DataParallel(backbone)
    assert stvit.load_checkpoint(backbone, path) is backbone
    for ours, theirs in zip(backbone(x), model.forward_stages(x)[1:3], strict=True):
        assert torch.equal(ours, theirs)
    weights = model.state_dict()
    del weights["layers.1.blocks.0.norm2.bias"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(stvit.CheckpointError, match=r"missing: layers\.1\.blocks\.0\.norm2\.bias$"):
        stvit.load_checkpoint(backbone, tmp_path / "less.pth")
    torch.save({**model.state_dict(), "foreign": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(stvit.CheckpointError, match=r"unexpected: foreign$"):
        stvit.load_checkpoint(backbone, tmp_path / "more.pth")


def test_load_checkpoint_fills_a_backbone_whose_norms_are_frozen(published: tuple[Path, stvit.STViT]) -> None:
    """As torchvision's and transformers' detectors freeze them, after which no norm counts batches."""
    path, model = published
    backbone = timm.utils.model.freeze_batch_norm_2d(timm.create_model("stvit_tiny", features_only=True).eval())
    stvit.load_checkpoint(backbone, path)
    x = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(backbone(x), model.forward_stages(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_cls", [None, "getter", "fx", "hook"])
@pytest.mark.parametrize(
    ("out_indices", "stages"),
    [((0, 1, 2, 3), [0, 1, 2, 3]), ((1, -1), [1, 3]), (2, [2, 3]), ((0, 2), [0, 2]), ((2, 0), [2, 0])],
)
def test_features_only(feature_cls: str | None, out_indices: int | tuple[int, ...], stages: list[int]) -> None:
    if feature_cls in ("fx", "hook") and stages == [2, 0]:
        pytest.skip("timm's hooks and graphs answer in the order of the network, for its own models too")
    torch.manual_seed(0)
    options = {} if feature_cls is None else {"feature_cls": feature_cls}
    backbone = timm.create_model("stvit_tiny", features_only=True, out_indices=out_indices, **options).eval()
    dims, reductions = [[32, 64, 160, 256][i] for i in stages], [[4, 8, 16, 32][i] for i in stages]
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == (dims, reductions)
    x = torch.randn(2, 3, 64, 64)
    maps = backbone(x)
    torch.manual_seed(0)
    expected = timm.create_model("stvit_tiny").eval().forward_stages(x)
    assert len(maps) == len(stages) and all(torch.equal(m, expected[i]) for m, i in zip(maps, stages, strict=True))
    if feature_cls in (None, "getter"):
        backbone.model.set_grad_checkpointing()
        sum(m.sum() for m in backbone.train()(x)).backward()
        assert not {name for name, parameter in backbone.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("name", ["stvit_tiny", "convnext_atto"])
@pytest.mark.parametrize("out_indices", [(0, 2, 5), (7,), (-7,)])
def test_a_stage_that_there_is_not(name: str, out_indices: tuple[int, ...]) -> None:
    with pytest.raises(IndexError):
        timm.create_model(name, features_only=True, out_indices=out_indices)


@pytest.mark.parametrize("indices", [None, 1, 3, (0, -1), (2,)])
@pytest.mark.parametrize("norm", [False, True])
def test_forward_intermediates_is_timms(indices: Any, norm: bool) -> None:
    x = torch.randn(1, 3, 64, 64)
    control = timm.create_model("convnext_atto", num_classes=0).eval()
    model = stvit.stvit_tiny().eval()
    shapes = []
    for net in (model, control):
        final, maps = net.forward_intermediates(x, indices=indices, norm=norm)
        assert torch.allclose(final, net.forward_features(x), atol=1e-6)
        alone = net.forward_intermediates(x, indices=indices, norm=norm, stop_early=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps, alone, strict=True))
        shapes.append([m.shape[2:] for m in maps])
        infos = [net.feature_info[i] for i in ([0, 1, 2, 3] if indices is None else [])]
        assert not infos or norm or [m.shape[1] for m in maps] == [info["num_chs"] for info in infos]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", ""])
def test_pools_are_timms(pool: str) -> None:
    from timm.layers import SelectAdaptivePool2d

    classes = 5 if pool else 0
    model = timm.create_model("stvit_tiny", num_classes=classes, global_pool=pool).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    pooled = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))(features) if pool else features
    assert torch.allclose(model.forward_head(features, pre_logits=True), pooled, atol=1e-6)
    assert model(x).shape == ((2, 5) if pool else features.shape)


def test_options_of_timms_own_models() -> None:
    model = timm.create_model("stvit_tiny", dtype=torch.float64, device="meta", act_layer="relu", img_size=96)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float64, "meta")}
    assert isinstance(model.layers[0].blocks[0].mlp2.act, torch.nn.ReLU)
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 96, 96)
    assert timm.list_models("stvit*", module="timm_models") == NAMES


def test_a_script_finds_the_models(run_python: RunPython, tmp_path: Path) -> None:
    script = tmp_path / "client.py"  # what timm's scripts do: import timm alone, name a model, save and load weights
    script.write_text(
        "import argparse, sys, timm\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--model')\n"
        "print(type(timm.create_model(parser.parse_args().model)).__name__, __name__, sys.argv)\n"
    )
    told = run_python("-m", "stvit.timm_models", str(script), "--model", "stvit_tiny").stdout
    assert told == f"STViT __main__ {[str(script), '--model', 'stvit_tiny']}\n"


def test_a_script_finds_what_lies_beside_it(run_python: RunPython, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'stvit_tiny'\n")
    script = tmp_path / "client.py"
    script.write_text("import timm, beside\nprint(timm.is_model(beside.NAME))\n")
    assert run_python("-m", "stvit.timm_models", str(script)).stdout == "True\n"


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "size", "others"),
    [
        ({}, (64, 64), [(1, 64, 64), (3, 64, 64)]),
        ({"dynamic_size": True}, (65, 97), [(1, 64, 96), (3, 75, 100)]),  # every tile padded: a step of the record
        pytest.param({"use_dynamo": True}, (64, 64), [], marks=pytest.mark.compiled_all),  # a minute
    ],
)
def test_timms_onnx_export(
    options: dict[str, Any], size: tuple[int, int], others: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    """What its onnx_export.py calls, by default the exporter by TorchScript, which records one run."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    from timm.utils.onnx import onnx_export, onnx_forward

    torch.manual_seed(0)
    model = timm.create_model("stvit_tiny", num_classes=5, embed_dim=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)).eval()
    path = str(tmp_path / "model.onnx")
    onnx_export(model, path, batch_size=2, input_size=(3, *size), check_forward=True, **options)
    for batch, height, width in [(2, *size), *others]:
        images = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(torch.from_numpy(onnx_forward(path, images)), model(images), rtol=1e-4, atol=1e-5)


def test_registering_twice_is_harmless() -> None:
    timm_models.register()
    assert timm.list_models("stvit*") == NAMES


def test_an_encoder_as_segmentation_models_pytorch_makes_it() -> None:
    """What its TimmUniversalEncoder asks timm for "tu-stvit_tiny": reductions on meta, then stages from stride 4 on."""
    with torch.device("meta"):
        looked_at = timm.create_model("stvit_tiny", features_only=True)
    assert getattr(looked_at, "output_fmt", None) != "NHWC"
    reductions = looked_at.feature_info.reduction()
    assert reductions == [2 ** (i + 2) for i in range(len(reductions))]
    depth = 5  # of its decoders: strides 2 to 32, of which it makes the first up itself
    options = {"in_chans": 4, "features_only": True, "pretrained": False, "out_indices": tuple(range(depth - 1))}
    encoder = timm.create_model("stvit_tiny", **options)
    maps = encoder(torch.randn(2, 4, 64, 96))
    assert [map.shape[1] for map in maps] == encoder.feature_info.channels() == [32, 64, 160, 256]
    assert [map.shape[2:] for map in maps] == [(64 // r, 96 // r) for r in reductions]


def test_a_backbone_as_transformers_makes_it() -> None:
    """What its TimmBackbone reads, and BatchNorm frozen by timm, as its detectors do: training then changes nothing."""
    options = {"pretrained": False, "features_only": True, "in_chans": 3, "out_indices": (1, 3)}
    backbone = timm.create_model("stvit_tiny", **options)
    info = backbone.feature_info
    modules = [stage["module"] for stage in info.info]
    assert len(set(modules)) == 4 and all(name.startswith(f"layers.{i}.") for i, name in enumerate(modules))
    assert [stage["num_chs"] for stage in info.info] == [32, 64, 160, 256]
    assert list(info.out_indices) == [1, 3] and info.module_name() == [modules[1], modules[3]]
    assert {layer["module"]: layer["index"] for layer in info.get_dicts()} == {modules[1]: 1, modules[3]: 3}
    images = torch.randn(2, 3, 64, 64)
    expected = backbone.eval()(images)
    frozen = timm.utils.model.freeze_batch_norm_2d(backbone).train()
    assert not [part for part in frozen.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    before = [buffer.clone() for buffer in frozen.buffers()]
    for given, wanted in zip(frozen(images), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, before, frozen.buffers()))
