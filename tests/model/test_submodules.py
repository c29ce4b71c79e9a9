"""What others put on the parts of our modules: hooks, pruning, norms of weights, adapters, classes of their own.

The fused paths use the parameters of some submodules without calling them; a submodule that isn't plain is called.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, prune

from stvit.model import STViT
from stvit.modules import LayerNorm2d, Mlp, ResidualDepthwise, SuperTokenBlock

SMALLEST = {"embed_dim": (8, 12, 20, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 5, 4), "projection": 24}
CONSTANTS = ("unfold", "fold")  # they hold what published files hold, and compute nothing


def smallest() -> STViT:
    return STViT(num_classes=5, layerscale=(False, True, False, True), **SMALLEST)  # type: ignore[arg-type]


def steps(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and every gradient, of x first."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def test_every_submodule_is_called_where_it_has_a_hook_and_answers_a_tensor() -> None:
    model, x = smallest().eval(), torch.randn(2, 3, 40, 40)
    expected = steps(model, x)
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.update({name: output}))
    for found, wanted in zip(steps(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    wanted_names = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert set(seen) == {name for name in wanted_names if not name.endswith(CONSTANTS)}
    assert all(isinstance(seen[name], Tensor) for name in seen if not name.startswith("layers.") or "blocks" in name)


@pytest.mark.parametrize("part", ["pos_embed", "norm1", "attn", "mlp2", "drop_path", "norm1.norm", "pos_embed.conv"])
def test_a_hook_may_change_what_a_part_answers(part: str) -> None:
    """In a block the hook sees the part's own output, not that of a fusion with what is behind it."""
    block, x = SuperTokenBlock(8, 2, layerscale=True, init_values=0.5).eval(), torch.randn(1, 8, 5, 6)

    def by_hand(factor: Callable[[str], float]) -> Tensor:
        conv = factor("pos_embed.conv") * block.pos_embed.conv(x)
        y = factor("pos_embed") * (x + conv)
        normed = block.norm1.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * factor("norm1.norm")
        attended = block.gamma_1 * (factor("attn") * block.attn(factor("norm1") * normed))
        y = y + factor("drop_path") * attended
        return y + factor("drop_path") * (block.gamma_2 * (factor("mlp2") * block.mlp2(block.norm2(y))))

    with torch.no_grad():
        expected = by_hand(lambda name: 2.0 if name == part else 1.0)
        handle = block.get_submodule(part).register_forward_hook(lambda _module, _inputs, output: 2 * output)
        torch.testing.assert_close(block(x), expected)
        handle.remove()
        torch.testing.assert_close(block(x), by_hand(lambda _: 1.0))


def convolution(module: Any) -> Any:
    return module.conv if isinstance(module, ResidualDepthwise) else module.norm


@pytest.mark.parametrize("make", [lambda: ResidualDepthwise(6), lambda: ResidualDepthwise(6, gelu=True)])
@pytest.mark.parametrize("old", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_old_and_new_norms_of_weights_train_alike(make: Callable[[], nn.Module], old: Callable[..., object]) -> None:
    new: dict[Any, Any] = {
        nn.utils.spectral_norm: parametrizations.spectral_norm,
        nn.utils.weight_norm: parametrizations.weight_norm,
    }
    x = torch.randn(2, 6, 5, 4)
    parts: list[Any] = []
    for wrap in (old, new[old]):
        part = make()
        part.load_state_dict(parts[0][0] if parts else part.state_dict())
        before = copy.deepcopy(part.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            wrap(convolution(part))
        for _ in range(30):  # the power iteration of spectral norm settles
            y = part(x)
        y.square().sum().backward()
        parts.append((before, y.detach(), {tuple(p.shape): p.grad for p in part.parameters()}))
    torch.testing.assert_close(parts[0][1], parts[1][1], rtol=1e-3, atol=1e-4)
    for shape, gradient in parts[0][2].items():
        assert gradient is not None and gradient.abs().sum() > 0
        torch.testing.assert_close(gradient, parts[1][2][shape], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("make", [lambda: ResidualDepthwise(6), lambda: LayerNorm2d(6)])
def test_pruned_weights_stay_pruned_and_train(make: Callable[[], nn.Module]) -> None:
    part, x = make(), torch.randn(2, 6, 5, 4)
    inner = convolution(part)
    prune.random_unstructured(inner, "weight", amount=0.5)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        part(x).square().sum().backward()
        optimizer.step()
    mask = inner.weight_mask.bool()
    assert (inner.weight_orig.grad[~mask] == 0).all() and (inner.weight_orig.grad[mask] != 0).all()
    prune.remove(inner, "weight")
    assert (inner.weight[~mask] == 0).all()


class Adapter(nn.Module):
    """A frozen layer beside a trained one, in its place: what peft does."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.added = copy.deepcopy(base).requires_grad_()
        self.weight, self.bias = base.weight, base.bias


def test_an_adapter_around_a_convolution_gets_its_gradient() -> None:
    class Wrapped(Adapter):
        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.added(x)

    mlp: Any = Mlp(4, 8)
    x = torch.randn(1, 4, 5, 4)
    mlp.conv.conv = Wrapped(mlp.conv.conv)
    mlp(x).sum().backward()
    gradient = mlp.conv.conv.added.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_a_forward_put_on_the_object_runs() -> None:
    part, x = ResidualDepthwise(3), torch.randn(1, 3, 4, 4)
    part.conv.forward = lambda x: 0 * x  # type: ignore[method-assign,assignment]
    assert torch.equal(part(x), x)


def test_global_hooks_see_every_part() -> None:
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        SuperTokenBlock(4, 2)(torch.randn(1, 4, 4, 4))
    finally:
        handle.remove()
    assert names.count("Conv2d") == 6 and "LayerNorm" in names and names.count("DropPath") == 2


def test_another_class_in_the_place_of_a_part() -> None:
    """A block asks its parts for nothing but an answer to x where they aren't ours."""
    block, x = SuperTokenBlock(4, 2).train(), torch.randn(2, 4, 4, 4)
    block.norm1, block.attn, block.drop_path = nn.Identity(), nn.Conv2d(4, 4, 1), nn.Dropout(0.0)  # type: ignore[assignment]
    y = block.pos_embed(x)
    y = y + block.attn(y)
    torch.testing.assert_close(block(x), y + block.mlp2(block.norm2(y)))


def test_parameters_are_contiguous_for_the_tools_that_ask(tmp_path: object) -> None:
    model = smallest()
    assert all(tensor.is_contiguous() for tensor in (*model.parameters(), *model.buffers()))
    loaded = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector + 1, model.parameters())
    torch.testing.assert_close(nn.utils.parameters_to_vector(model.parameters()), vector + 1)
    prune.global_unstructured(
        [(module, "weight") for module in model.modules() if isinstance(module, nn.Conv2d)],
        pruning_method=prune.L1Unstructured,
        amount=0.3,
    )
    model(torch.randn(2, 3, 33, 32)).sum().backward()


def test_lbfgs_steps() -> None:
    model, x = smallest().eval(), torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=2)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = model(x).square().sum()
        value.backward()
        return value

    first = optimizer.step(loss)
    assert loss() < first


def test_either_memory_format_of_parameters_computes_the_same() -> None:
    model, x = smallest().eval(), torch.randn(1, 3, 40, 33)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(model(x), other(x))


def test_factors_of_drop_path_are_drawn_once_whoever_calls() -> None:
    """With a hook on it or not, drop-path drops the same samples."""
    block, x = SuperTokenBlock(4, 2, drop_path=0.5).train(), torch.randn(8, 4, 4, 4)
    torch.manual_seed(1)
    expected = block(x)
    block.drop_path.register_forward_hook(lambda *_: None)
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(
    ("dynamic", "sides", "frames"), [(True, (8, 10, 12, 16, 24), 1), (None, (8, 10, 16, 24, 11), 3)]
)
def test_few_compilations_serve_every_size(dynamic: bool | None, sides: tuple[int, ...], frames: int) -> None:
    """torch.compile(fullgraph=True) takes eps and scale as symbols too: with dynamic=True one compilation for all.
    By default the first size is a case of its own, and so are those that pad a tile."""
    torch.compiler.reset()
    block, counter = SuperTokenBlock(4, 2).eval(), CompileCounterWithBackend("eager")
    compiled = torch.compile(block, dynamic=dynamic, fullgraph=True, backend=counter)
    for side in sides:
        x = torch.randn(2, 4, side, side).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(x), block(x))
    assert counter.frame_count == frames


BESIDE_BIASES = ("mlp2.fc1", "mlp2.fc2", "mlp2.act", "mlp2.drop", "mlp2.conv") + tuple(
    f"attn.stoken_refine.{name}" for name in ("qkv", "proj", "proj_drop")
)


@pytest.mark.parametrize("part", BESIDE_BIASES)
def test_a_convolution_whose_bias_the_kernels_add_is_called_where_it_has_a_hook(part: str, device: str) -> None:
    block = SuperTokenBlock(8, 1, num_heads=2, backend="triton").to(device)
    x = torch.randn(1, 8, 4, 6, device=device).contiguous(memory_format=torch.channels_last)
    expected = steps(block, x)
    seen: list[Tensor] = []
    block.get_submodule(part).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    for found, wanted in zip(steps(block, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert seen


def test_kernels_add_the_biases_of_plain_convolutions(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No convolution is handed the bias of fc1, fc2 or proj; the reference hands all of them."""
    biased: list[int] = []
    convolve = torch.nn.functional.conv2d

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
        if bias is not None and weight.shape[2:] == (1, 1):
            biased.append(len(weight))
        return convolve(x, weight, bias, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    x = torch.randn(1, 8, 4, 6, device=device)
    for backend, expected in (("triton", [24]), ("reference", [24, 8, 32, 8])):  # float32: qkv stays a convolution
        block = SuperTokenBlock(8, 1, num_heads=2, backend=backend).to(device)
        biased.clear()
        block(x)
        found = list(biased)
        assert found == expected
