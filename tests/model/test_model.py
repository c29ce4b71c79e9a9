"""The models: sizes, names, numbers in float64, training aids, use as a backbone, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, stack_module_state, vmap

import stvit
from stvit.model import CONFIGS, STViT
from stvit.modules import DropPath
from tests.support.authors_structure import published_forward, published_shapes

PARAMETERS = {
    "stvit_tiny": 3_292_344,
    "stvit_small": 25_495_624,
    "stvit_base": 51_691_288,
    "stvit_large": 94_971_096,
}
SMALLEST = {"embed_dim": (8, 12, 20, 16), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 5, 4), "projection": 24}


def smallest(**options: object) -> STViT:
    return STViT(num_classes=7, **{**SMALLEST, **options})  # type: ignore[arg-type]


def shaken(model: STViT) -> STViT:
    """Every parameter and running statistic away from its initial value, so that none can hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_and_state_dict_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = getattr(stvit, name)()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PARAMETERS[name]
    config = {key: value for key, value in CONFIGS[name].items() if key != "num_heads"}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == published_shapes(**config)


@pytest.mark.parametrize("name", CONFIGS)
def test_tiles_and_layerscale_are_those_of_the_paper(name: str) -> None:
    with torch.device("meta"):
        model = getattr(stvit, name)()
    assert [stage.blocks[0].attn.stoken_size for stage in model.layers] == [(8, 8), (4, 4), (1, 1), (1, 1)]
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert all(block.attn.n_iter == 1 for block in blocks)
    scaled = name in ("stvit_base", "stvit_large")
    assert [hasattr(stage.blocks[-1].gamma_2, "shape") for stage in model.layers] == [False, False, scaled, scaled]


def test_parameters_are_in_the_published_order() -> None:
    """A published file's optimizer state is indexed by position."""
    names = [name for name, _ in smallest(layerscale=(False, False, True, False)).named_parameters()]
    block = [name.removeprefix("layers.2.blocks.0.") for name in names if name.startswith("layers.2.blocks.0.")]
    modules = [
        "pos_embed.conv", "norm1.norm", "attn.stoken_refine.qkv", "attn.stoken_refine.proj", "norm2", "mlp2.fc1",
        "mlp2.fc2", "mlp2.conv.conv",
    ]  # fmt: skip
    assert block == ["gamma_1", "gamma_2", *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))]
    tops = list(dict.fromkeys(name.split(".")[0] for name in names))
    assert tops == ["patch_embed", "layers", "proj", "norm", "head"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(64, 64), (96, 80), (37, 70)])
def test_output_and_gradients_are_those_of_the_published_model(
    size: tuple[int, int], memory_format: torch.memory_format, training: bool
) -> None:
    layerscale = (False, False, True, True)
    model = shaken(smallest(layerscale=layerscale, init_values=0.3)).double().train(training)
    model = model.to(memory_format=memory_format)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, _ in model.named_parameters():
        weights[name].requires_grad_()
    x = torch.randn(3, 3, *size, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    expected = published_forward(weights, x, SMALLEST["depths"], SMALLEST["num_heads"], training=training)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    direction = torch.randn(y.shape, dtype=y.dtype)
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(y, [x, *model.parameters()], direction)
    theirs = torch.autograd.grad(expected, [x, *(weights[name] for name in names)], direction)
    for name, a, b in zip(["x", *names], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_drop_path_grows_linearly_over_the_blocks() -> None:
    drops = [m.drop_prob for m in stvit.stvit_tiny(drop_path_rate=0.2).modules() if isinstance(m, DropPath)]
    assert drops == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_dropout_rates_reach_their_places() -> None:
    model = smallest(drop_rate=0.1, attn_drop_rate=0.2)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert {rate for name, rate in rates.items() if name.endswith("attn_drop")} == {0.2}
    assert {rate for name, rate in rates.items() if not name.endswith("attn_drop")} == {0.1}
    assert {name.split(".")[-1] for name in rates} == {"pos_drop", "attn_drop", "proj_drop", "drop"}


def test_initial_weights() -> None:
    model = stvit.stvit_tiny(layerscale=(False, True, False, False))
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight.abs().max() <= 2.0
    assert not model.head.bias.any()
    torch.testing.assert_close(model.layers[1].blocks[0].gamma_1, torch.full((1, 64, 1, 1), 1e-6))
    bound = (32 * 9 / 32) ** -0.5  # PyTorch's own rule for convolutions: fan-in ** -0.5, here depthwise 3 x 3
    assert bound * 0.9 < model.layers[0].blocks[0].pos_embed.conv.weight.abs().max() <= bound


def test_options_reach_every_block() -> None:
    model = smallest(backend="reference", association_grad=True, n_iter=(2, 1, 1, 1), stoken_size=((4, 2), 4, 1, 1))
    attentions = [m for m in model.modules() if isinstance(m, stvit.StokenAttention)]
    assert {(m.backend, m.stoken_refine.backend, m.association_grad) for m in attentions} == {
        ("reference", "reference", True)
    }
    assert (attentions[0].n_iter, attentions[0].stoken_size) == (2, (4, 2))


def test_feature_maps_of_the_stages() -> None:
    model = smallest().eval()
    x = torch.randn(2, 3, 70, 96)
    maps = model.forward_stages(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 18, 24), (2, 12, 9, 12), (2, 20, 5, 6), (2, 16, 3, 3)]
    assert [info["num_chs"] for info in model.feature_info] == [8, 12, 20, 16]
    assert [info["reduction"] for info in model.feature_info] == [4, 8, 16, 32]
    torch.testing.assert_close(model.layers[1](model.layers[0].downsample(maps[0])), maps[1])
    features = model.forward_features(x)
    assert features.shape == (2, 24, 3, 3) and model.num_features == 24
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    assert torch.equal(model(x), model.get_classifier()(pooled))


def test_reset_classifier() -> None:
    model = smallest().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and model.num_classes == 4
    model.reset_classifier(0)
    assert model(x).shape == (2, 24) and not list(model.get_classifier().parameters())
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 24, 1, 1)
    with pytest.raises(ValueError, match="^num_classes: expected"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match="^global_pool: expected"):
        model.reset_classifier(3, "median")
    assert stvit.stvit_tiny(num_classes=0, global_pool="").num_classes == 0


def test_model_without_projection() -> None:
    model = smallest(projection=None)
    assert model.num_features == 16
    assert not any(name.startswith("proj.") for name in model.state_dict())
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_activation_checkpointing_changes_nothing_but_memory(drop_path_rate: float) -> None:
    """Same outputs, gradients and running statistics: a batch recomputed in the backward counts once."""
    x = torch.randn(4, 3, 64, 64)
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = smallest(drop_path_rate=drop_path_rate)
        model.set_grad_checkpointing(enable)
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).square().sum()
        loss.backward()
        results.append((saved, loss, [p.grad for p in model.parameters()], dict(model.named_buffers())))
        assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    (kept, *plain), (kept_checkpointed, *checkpointed) = results
    assert kept_checkpointed < kept / 2
    torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)
    assert checkpointed[2]["layers.0.blocks.0.norm2.num_batches_tracked"] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_whole_and_once(checkpointing: bool) -> None:
    """No graph break, and no new graph for other batch sizes once a second one has been seen.

    aot_eager: run without it, torch 2.14's graph of a checkpointed BatchNorm, PyTorch's own too, refuses its backward.
    """
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model = STViT(7, 3, (8, 12), (1, 1), (1, 2), (1, 1), (4, 1), layerscale=(True, False), projection=None)
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 8):
        x = torch.randn(batch, 3, 40, 36)
        model.train()
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, model(x))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_no_weight_decay_and_layer_groups_serve_timm() -> None:
    optim = pytest.importorskip("timm.optim")
    model = stvit.stvit_tiny()
    assert model.no_weight_decay() == set()
    groups = optim.create_optimizer_v2(model, opt="adamw", weight_decay=0.05, layer_decay=0.5).param_groups
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    blocks = [block for stage in model.layers for block in stage.blocks]
    ordered = [model.patch_embed, *blocks, model.head]
    by_depth = [scales[id(next(module.parameters()))] for module in ordered]
    assert by_depth == sorted(by_depth) and len(set(by_depth)) == len(by_depth)


@pytest.mark.parametrize("size", [(32, 32), (33, 1), (1, 1), (47, 129)])
def test_any_image_size(size: tuple[int, int]) -> None:
    assert smallest().eval()(torch.randn(1, 3, *size)).shape == (1, 7)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(3, 32, 32), ValueError),
        (torch.zeros(1, 4, 32, 32), ValueError),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError),
        (torch.zeros(1, 3, 32, 0), ValueError),
        ("image", TypeError),
    ],
)
def test_wrong_images(x: Tensor, error: type[Exception]) -> None:
    model = smallest()
    for call in (model, model.forward_features, model.forward_stages):
        with pytest.raises(error, match="^x: expected"):
            call(x)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"num_heads": (1, 2, 5)}, "num_heads"),
        ({"num_heads": (3, 2, 5, 4)}, "num_heads"),
        ({"stoken_size": (8, 4, 1)}, "stoken_size"),
        ({"backend": "gpu"}, "backend"),
        ({"drop_path_rate": 1.0}, "drop_path"),
    ],
)
def test_wrong_options(options: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=f"^{names}: expected"):
        smallest(**options)


def test_built_on_the_meta_device_and_filled_later() -> None:
    """Shapes come out at once; `to_empty` and a state dict make a model that computes."""
    kept = shaken(smallest()).eval()
    with torch.device("meta"):
        model = smallest().eval()
        assert model(torch.empty(2, 3, 40, 33)).shape == (2, 7)
        assert [features.shape[1] for features in model.forward_stages(torch.empty(1, 3, 32, 32))] == [8, 12, 20, 16]
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(
        torch.equal(value, kept.state_dict()[name]) for name, value in model.state_dict().items() if "fold" in name
    )
    model.load_state_dict(kept.state_dict())
    x = torch.randn(2, 3, 40, 33)
    assert torch.equal(model(x), kept(x))
    with torch.device("meta"):
        assigned = smallest().eval()
    assigned.load_state_dict(kept.state_dict(), assign=True)
    assert torch.equal(assigned(x), kept(x))


def test_batched_models_images_and_gradients() -> None:
    """torch.func over a whole model: images, an ensemble, a gradient a sample."""
    models = [shaken(smallest()).eval() for _ in range(2)]
    model, x = models[0], torch.randn(3, 3, 32, 33)
    torch.testing.assert_close(vmap(model)(x[:, None])[:, 0], model(x))

    weights, buffers = stack_module_state(models)  # type: ignore[arg-type]
    found = vmap(lambda *state: functional_call(model, state, (x,)))(weights, buffers)
    torch.testing.assert_close(found, torch.stack([one(x) for one in models]))

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, weights, (image[None],)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))({k: v.detach() for k, v in model.named_parameters()}, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [False, True])
def test_traced_by_fx(backend: str, training: bool) -> None:
    """The functions are steps of the traced graph; what they choose by shape is chosen when it runs."""
    model = shaken(smallest(drop_path_rate=0.3, layerscale=(False, True, False, True), backend=backend)).train(training)
    traced = torch.fx.symbolic_trace(model)
    for size in ((2, 3, 40, 33), (1, 3, 64, 64)):
        x = torch.randn(size)
        outputs = []
        for forward in (model, traced):
            torch.manual_seed(0)
            outputs.append(forward(x))
        torch.testing.assert_close(*outputs)
    with pytest.raises(ValueError, match="x: expected 3 channels"):
        traced(torch.randn(1, 4, 32, 32))


def test_torchvision_and_timm_extract_features_by_tracing() -> None:
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = shaken(smallest()).eval(), torch.randn(1, 3, 64, 64)
    names = {"layers.0.blocks.0.mlp2.fc2": "inner", "norm": "last"}
    found = feature_extraction.create_feature_extractor(model, names)(x)
    torch.testing.assert_close(F.silu(found["last"]), model.forward_features(x))
    assert found["inner"].shape == (1, 8, 16, 16)
