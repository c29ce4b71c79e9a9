"""Modules: the published semantics in float64, memory formats, layouts, modes of refinement, errors."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stvit
from stvit.modules import Attention, DropPath, LayerNorm2d, Mlp, ResidualDepthwise, StokenAttention, SuperTokenBlock
from tests.support.authors_structure import refine, stoken_attention

FORMATS = [torch.contiguous_format, torch.channels_last]


def images(*shape: int, dtype: torch.dtype = torch.float64, memory_format: torch.memory_format = FORMATS[0]) -> Tensor:
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(y, inputs, torch.randn(y.shape, dtype=y.dtype)))


def assert_same(module: nn.Module, x: Tensor, expected: Tensor, weights: dict[str, Tensor]) -> None:
    """Output, input gradient and every parameter gradient, to float64 rounding."""
    names = [name for name, _ in module.named_parameters()]
    y = module(x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    ours = gradients(y, [x, *module.parameters()])
    theirs = gradients(expected, [x, *(weights[name] for name in names)])
    for name, a, b in zip(["x", *names], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def leaves(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone().requires_grad_() for name, value in module.state_dict().items()}


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("dim", "heads", "tile", "n_iter", "size"),
    [
        (6, 2, 4, 1, (12, 8)),
        (5, 1, (3, 2), 1, (7, 9)),  # odd channels, rectangular tile, padding both ways
        (9, 3, (2, 5), 2, (5, 11)),
        (4, 4, 8, 3, (5, 3)),  # image smaller than a tile
        (6, 3, (1, 2), 1, (3, 4)),
        (6, 2, 1, 1, (4, 5)),  # every pixel its own super token
    ],
)
def test_stoken_attention_has_the_published_semantics(
    dim: int,
    heads: int,
    tile: int | tuple[int, int],
    n_iter: int,
    size: tuple[int, int],
    memory_format: torch.memory_format,
    backend: str,
) -> None:
    module = StokenAttention(dim, tile, n_iter, num_heads=heads, qkv_bias=heads > 1, backend=backend).double()
    x = images(2, dim, *size, memory_format=memory_format)
    weights = leaves(module)
    pair = (tile, tile) if isinstance(tile, int) else tile
    assert_same(module, x, stoken_attention(weights, "", x, pair, heads, n_iter), weights)


def test_association_gradient_is_a_choice() -> None:
    x = images(1, 4, 6, 6)
    detached = StokenAttention(4, 3, num_heads=2).double()
    whole = copy.deepcopy(detached)
    whole.association_grad = True
    torch.testing.assert_close(detached(x), whole(x))
    assert not torch.allclose(*(gradients(module(x), [x])[0] for module in (detached, whole)))
    assert torch.autograd.gradcheck(whole, [x])


def test_stoken_attention_without_refinement() -> None:
    x = images(2, 5, 6, 7)
    module = StokenAttention(5, 3, refine=False, num_heads=8)  # 8 heads don't divide 5: no heads are needed
    assert [name for name, _ in module.named_parameters()] == []
    stokens, association = stvit.super_token_sampling(x, 3)
    torch.testing.assert_close(module(x), stvit.token_upsampling(stokens, association))
    assert StokenAttention(5, 1, refine=False)(x) is x


def test_stoken_attention_with_convolutions_for_refinement() -> None:
    x = images(2, 6, 8, 8)
    module = StokenAttention(6, 4, refine_attention=False).double()
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
    assert shapes == {
        "stoken_refine.0.weight": (6, 6, 1, 1), "stoken_refine.0.bias": (6,),
        "stoken_refine.1.weight": (6, 1, 5, 5), "stoken_refine.1.bias": (6,),
        "stoken_refine.2.weight": (6, 6, 1, 1), "stoken_refine.2.bias": (6,),
    }  # fmt: skip
    weights = leaves(module)
    stokens, association = stvit.super_token_sampling(x, 4)
    for index, options in enumerate([{}, {"padding": 2, "groups": 6}, {}]):
        kernel, bias = weights[f"stoken_refine.{index}.weight"], weights[f"stoken_refine.{index}.bias"]
        stokens = F.conv2d(stokens, kernel, bias, **options)  # type: ignore[arg-type]
    assert_same(module, x, stvit.token_upsampling(stokens, association), weights)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_fused_attention_is_the_explicit_one(memory_format: torch.memory_format, scale: float | None) -> None:
    x = images(2, 12, 3, 5, memory_format=memory_format)
    explicit = Attention(12, 3, True, scale, backend="reference").double()
    fused = copy.deepcopy(explicit)
    fused.backend = "auto"
    torch.testing.assert_close(fused(x), explicit(x), rtol=1e-12, atol=1e-13)
    for a, b in zip(
        gradients(fused(x), [x, *fused.parameters()]), gradients(explicit(x), [x, *explicit.parameters()]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    weights = {f"stoken_refine.{name}": value for name, value in explicit.state_dict().items()}
    if scale is None:
        torch.testing.assert_close(fused(x), refine(weights, "", x, 3), rtol=1e-12, atol=1e-13)
    with mock.patch.object(F, "scaled_dot_product_attention") as fused_attention, stvit.use_backend("reference"):
        fused(x)  # "auto" stands for the reference here
    fused_attention.assert_not_called()


def test_fused_attention_reads_views_of_one_product() -> None:
    module = Attention(12, 3)
    x = images(2, 12, 4, 4, dtype=torch.float32, memory_format=torch.channels_last)
    seen: dict[str, Tensor] = {}
    module.qkv.register_forward_hook(lambda _module, _args, output: seen.update(product=output))

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: float) -> Tensor:
        seen.update(q=q, k=k, v=v)
        return torch.zeros_like(q.transpose(1, 2)).transpose(1, 2)

    with mock.patch.object(F, "scaled_dot_product_attention", spy), Operators() as operators:
        module(x)
    storage = seen["product"].untyped_storage().data_ptr()
    assert all(seen[name].untyped_storage().data_ptr() == storage for name in "qkv")
    assert all(seen[name].shape == (2, 3, 16, 4) and seen[name].stride(-1) == 1 for name in "qkv")
    assert not {"clone", "copy_", "_to_copy"} & set(operators.names)


def test_attention_dropout_acts_in_training_only() -> None:
    x = images(1, 8, 4, 4)
    for backend in ("auto", "reference"):
        module = Attention(8, 2, attn_drop=0.5, backend=backend).double()
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))
        module.train().attn_drop.p = 0.0
        torch.testing.assert_close(module(x), module.eval()(x))


def test_layer_norm_over_channels() -> None:
    norm = LayerNorm2d(6).double()
    with torch.no_grad():
        norm.norm.weight.normal_()
        norm.norm.bias.normal_()
    x = images(2, 6, 3, 4)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * norm.norm.weight[:, None, None] + norm.norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    assert list(norm.state_dict()) == ["norm.weight", "norm.bias"]


def test_layer_norm_copies_nothing_in_channels_last() -> None:
    norm = LayerNorm2d(6)
    x = images(2, 6, 4, 4, dtype=torch.float32, memory_format=torch.channels_last)
    with Operators() as operators:
        norm(x).sum().backward()
    assert not {"clone", "copy_", "_to_copy"} & set(operators.names), operators.names


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(9, 7), (8, 1), (1, 8)])
def test_output_keeps_the_memory_format(memory_format: torch.memory_format, size: tuple[int, int]) -> None:
    modules = [
        LayerNorm2d(8), ResidualDepthwise(8), Mlp(8, 12), Attention(8, 2), Attention(8, 2, backend="reference"),
        StokenAttention(8, 4, num_heads=2), StokenAttention(8, 1, num_heads=2), SuperTokenBlock(8, 4, drop_path=0.2),
    ]  # fmt: skip
    for module in modules:
        y = module(images(2, 8, *size, dtype=torch.float32, memory_format=memory_format))
        assert y.shape == (2, 8, *size)
        assert y.is_contiguous(memory_format=memory_format), type(module).__name__


def test_residual_depthwise_and_mlp() -> None:
    x = images(2, 4, 5, 6)
    residual = ResidualDepthwise(4).double()
    weights = leaves(residual)
    expected = x + F.conv2d(x, weights["conv.weight"], weights["conv.bias"], padding=1, groups=4)
    assert_same(residual, x, expected, weights)
    mlp = Mlp(4, 10).double()
    weights = leaves(mlp)
    hidden = F.gelu(F.conv2d(x, weights["fc1.weight"], weights["fc1.bias"]))
    hidden = hidden + F.conv2d(hidden, weights["conv.conv.weight"], weights["conv.conv.bias"], padding=1, groups=10)
    assert_same(mlp, x, F.conv2d(hidden, weights["fc2.weight"], weights["fc2.bias"]), weights)


def test_drop_path_drops_whole_samples_as_timm_does() -> None:
    drop = DropPath(0.4)
    x = torch.ones(1000, 3, 2, 2)
    torch.manual_seed(7)
    y = drop(x)
    scales = y[:, 0, 0, 0]
    assert torch.equal(y, scales[:, None, None, None].expand_as(y))
    assert set(scales.tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert 0.33 < (scales == 0).float().mean() < 0.47
    theirs = pytest.importorskip("timm.layers").DropPath(0.4).train()
    torch.manual_seed(7)
    assert torch.equal(y, theirs(x))
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


@pytest.mark.parametrize("layerscale", [False, True])
def test_block_is_the_sum_of_its_branches(layerscale: bool) -> None:
    block = SuperTokenBlock(8, 4, num_heads=2, layerscale=layerscale, init_values=0.5).double().eval()
    if block.gamma_2 is not None:
        nn.init.constant_(block.gamma_2, 0.25)
    x = images(2, 8, 9, 6)
    y = block.pos_embed(x)
    y = y + (0.5 if layerscale else 1.0) * block.attn(block.norm1(y))
    y = y + (0.25 if layerscale else 1.0) * block.mlp2(block.norm2(y))
    torch.testing.assert_close(block(x), y)
    gammas = [name for name, _ in block.named_parameters() if name.startswith("gamma")]
    assert gammas == (["gamma_1", "gamma_2"] if layerscale else [])


def test_block_drops_both_branches_alike_over_a_sample() -> None:
    block = SuperTokenBlock(4, 2, drop_path=0.9)
    x = images(32, 4, 4, 4, dtype=torch.float32)
    unchanged = (block(x) == block.pos_embed(x)).flatten(1).all(1)
    assert 16 < unchanged.sum() < 32  # 0.9 ** 2 of the samples skip both branches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_block_in_low_precision(dtype: torch.dtype) -> None:
    truth = SuperTokenBlock(16, 4, num_heads=2).double()
    x = images(2, 16, 12, 8, memory_format=torch.channels_last)
    block, low = copy.deepcopy(truth).to(dtype), x.detach().to(dtype).requires_grad_()
    y, expected = block(low), truth(x)
    assert y.dtype == dtype
    bound = 30 * torch.finfo(dtype).eps
    assert (y - expected).norm() < bound * expected.norm()
    (grad,), (expected_grad,) = gradients(y.double(), [low]), gradients(expected, [x])
    assert (grad - expected_grad).norm() < bound * expected_grad.norm()


def test_block_under_autocast() -> None:
    block = SuperTokenBlock(16, 4, num_heads=2)
    x = images(2, 16, 12, 8, dtype=torch.float32, memory_format=torch.channels_last)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        attended = block.attn(x)
    assert attended.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.03 * expected.norm()
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters() if p.grad is not None)


def test_constant_kernels_are_in_every_state_dict() -> None:
    module = StokenAttention(4, 1, num_heads=1)
    state = module.state_dict()
    for name in ("unfold.weights", "fold.weights"):
        assert torch.equal(state[name], torch.eye(9).view(9, 1, 3, 3))
    assert not any("fold" in name for name, _ in module.named_parameters())


def test_an_empty_batch() -> None:
    for module in (StokenAttention(8, 4, num_heads=2), StokenAttention(8, 1, num_heads=2)):
        assert module(torch.zeros(0, 8, 6, 6)).shape == (0, 8, 6, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ({"dim": 6, "stoken_size": 4, "num_heads": 4}, ValueError, "num_heads"),
        ({"dim": 6, "stoken_size": 4, "num_heads": 0}, ValueError, "num_heads"),
        ({"dim": 8, "stoken_size": 0}, ValueError, "stoken_size"),
        ({"dim": 8, "stoken_size": 2.0}, TypeError, "stoken_size"),
        ({"dim": 8, "stoken_size": (2, 2, 2)}, ValueError, "stoken_size"),
        ({"dim": 8, "stoken_size": 4, "backend": "fast"}, ValueError, "backend"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=f"^{names}: expected"):
        StokenAttention(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(8, 4, 4), ValueError),
        (torch.zeros(1, 6, 4, 4), ValueError),
        (torch.zeros(1, 8, 4, 4, dtype=torch.int64), TypeError),
        (torch.zeros(1, 8, 0, 4), ValueError),
        ([1.0], TypeError),
    ],
)
@pytest.mark.parametrize("tile", [1, 2])
def test_wrong_input(x: Tensor, error: type[Exception], tile: int) -> None:
    with pytest.raises(error, match="^x: expected"):
        StokenAttention(8, tile)(x)


@pytest.mark.parametrize("drop_prob", [-0.1, 1.0])
def test_wrong_drop_path(drop_prob: float) -> None:
    with pytest.raises(ValueError, match="^drop_path: expected"):
        DropPath(drop_prob)
