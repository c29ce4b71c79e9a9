"""stvit.optimize_for_inference: what evaluation computes, to rounding; what is folded and what isn't; no training."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stvit
from stvit.swap.accelerate import accelerate
from stvit.swap.folding import FoldedDepthwise, InferenceOnly, optimize_for_inference
from stvit.swap.kinds import Accelerated
from tests.support import authors_classes as authors

TINY: dict[str, Any] = {
    "embed_dim": (8, 12, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 3), "stoken_size": (4, 2, 1, 1),
    "num_classes": 5, "projection": 20,
}  # fmt: skip


def shaken(model: nn.Module) -> nn.Module:
    """With statistics and scales as after training, so that no folding is a fold of ones and zeros."""
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            if part.track_running_stats:
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
            if part.affine:
                nn.init.normal_(part.weight, 1.0, 0.5)
                nn.init.normal_(part.bias)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.normal_(parameter)
    return model


def ours(**options: Any) -> nn.Module:
    return stvit.STViT(**{**TINY, **options})


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    # BatchNorms folded, LayerScales folded, residual depthwise convolutions folded
    "ours": (ours, 9, 0, 10),
    "ours with LayerScale": (lambda: ours(layerscale=(False, True, True, False)), 9, 6, 10),
    "ours without projection": (lambda: ours(projection=None), 8, 0, 10),
    "ours with dropout and ReLU": (lambda: ours(drop_rate=0.2, drop_path_rate=0.2, act_layer=nn.ReLU), 9, 0, 10),
    "authors' structure": (authors.small_network, 4, 0, 0),
    "authors' structure, accelerated": (lambda: accelerate(authors.small_network(drop_path=0.2)), 9, 4, 10),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_same_as_evaluation(name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    make, norms, scales, residuals = MODELS[name]
    model = shaken(make()).to(dtype)
    with caplog.at_level(logging.INFO, "stvit"):
        caplog.clear()
        fast = optimize_for_inference(model)
    x = torch.randn(2, 3, 40, 44, dtype=dtype)
    expected = model.eval()(x)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(fast(x), expected, rtol=tolerance, atol=tolerance)

    def count(network: nn.Module, kind: type[nn.Module]) -> int:
        return sum(isinstance(part, kind) for part in network.modules())

    assert count(model, nn.BatchNorm2d) - count(fast, nn.BatchNorm2d) == norms
    assert count(fast, FoldedDepthwise) == residuals
    assert (
        f"folded {norms} BatchNorms" in caplog.text and f"left {count(fast, nn.BatchNorm2d)} BatchNorms" in caplog.text
    )
    assert (f"{scales} LayerScales" in caplog.text) == bool(scales)
    assert not any("gamma" in name for name in fast.state_dict()) or not scales


def test_patch_embedding_keeps_its_norms() -> None:
    fast = optimize_for_inference(shaken(ours()))
    left = [name for name, part in fast.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert left == [f"patch_embed.proj.{i}" for i in (2, 5, 8, 11)]


def test_the_original_is_left_alone() -> None:
    model = shaken(ours(layerscale=(True,) * 4)).train()
    parts = {name: type(part) for name, part in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fast = optimize_for_inference(model)
    assert {name: type(part) for name, part in model.named_modules()} == parts
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules()) and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(parameter.abs().sum() > 0 for name, parameter in fast.named_parameters() if name.endswith("weight"))


def test_not_for_training() -> None:
    model = shaken(ours())
    fast = optimize_for_inference(model)
    assert isinstance(fast, (InferenceOnly, stvit.STViT)) and type(fast).__name__ == "InferenceSTViT"
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    with pytest.raises(RuntimeError, match="made by stvit.optimize_for_inference and can't be trained"):
        fast.train()
    assert fast.eval() is fast and fast.train(False) is fast
    assert not any(part.training for part in fast.modules())
    with pytest.raises(RuntimeError, match="can't be trained"):
        nn.Sequential(fast).train()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="its weights are folded"):
            fast.load_state_dict(model.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(fast.state_dict())


def test_copies_and_files() -> None:
    fast = optimize_for_inference(shaken(accelerate(authors.small_network())))
    x = torch.randn(2, 3, 40, 40)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(twin) is type(fast) and torch.equal(twin(x), fast(x))
        with pytest.raises(RuntimeError, match="can't be trained"):
            twin.train()
    other = optimize_for_inference(shaken(accelerate(authors.small_network())))
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), fast(x))


def test_root_that_is_itself_swapped() -> None:
    """Two classes in front of one another: pickling names both."""
    mlp = accelerate(authors.ConvMlp(6, 12)).double()
    fast = optimize_for_inference(mlp)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(fast(x), mlp.eval()(x), rtol=1e-12, atol=1e-12)
    twin = pickle.loads(pickle.dumps(fast))
    assert isinstance(twin, Accelerated) and isinstance(twin, InferenceOnly) and isinstance(twin, authors.ConvMlp)
    assert torch.equal(twin(x), fast(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_digits_of_small_taps(dtype: torch.dtype) -> None:
    """The identity isn't added to weights in half precision, where 1 + w would round w away."""
    block = nn.Sequential(stvit.modules.ResidualDepthwise(4)).double()
    nn.init.constant_(block[0].conv.weight, 1e-3)
    nn.init.zeros_(block[0].conv.bias)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    half = copy.deepcopy(block).to(dtype)
    fast = optimize_for_inference(block).to(dtype)
    assert torch.equal(fast(x.to(dtype)), half(x.to(dtype)))
    assert torch.equal(optimize_for_inference(half)(x.to(dtype)), half(x.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        single, fast = block.float(), optimize_for_inference(block.float())
        assert torch.equal(fast(x.float()), single(x.float()))


def test_kernels(device: str) -> None:
    """With a backend that has kernels, the depthwise op runs unfolded, GELU and all."""
    own = stvit.modules.SuperTokenBlock(4, (4, 4), backend="triton")
    for block in (own, accelerate(authors.Block(4, (4, 4), 1), "triton")):
        model = nn.Sequential(shaken(block)).to(device).eval()
        x = torch.randn(1, 4, 8, 7, device=device)
        fast = optimize_for_inference(model)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
        folded = [part for part in fast.modules() if isinstance(part, FoldedDepthwise)]
        assert {part.backend for part in folded} == {"triton"}
        assert [part.gelu for part in folded] == [False, True] and isinstance(fast[0].norm2, nn.Identity)


def test_backend_of_the_copy_can_be_set() -> None:
    fast = accelerate(optimize_for_inference(ours()), "reference")
    assert {part.backend for part in fast.modules() if hasattr(part, "backend")} == {"reference"}


def test_sequences_of_any_network() -> None:
    """Grouped and strided convolutions, without bias, padded any way; BatchNorm without weights."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, padding="valid", groups=2, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6, eps=0.1), nn.BatchNorm2d(6),
    )  # fmt: skip
    model = shaken(model).double().eval()
    fast = optimize_for_inference(model)
    x = torch.randn(2, 4, 12, 9, dtype=torch.float64)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-11, atol=1e-12)
    assert [type(part).__name__ for part in fast] == ["Conv2d", "Identity", "ReLU", "Conv2d", "Identity", "BatchNorm2d"]


def test_what_cannot_be_folded_is_left() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    twice = nn.Sequential(nn.Sequential(shared, nn.BatchNorm2d(4)), nn.Sequential(shared, nn.BatchNorm2d(4)))
    batchwise = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    hooked = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda module, inputs, output: output.relu())
    x = torch.randn(2, 4, 6, 6)
    for model in (twice, batchwise, hooked):
        model = shaken(model).eval()
        fast = optimize_for_inference(model)
        torch.testing.assert_close(fast(x), model(x))
        assert any(isinstance(part, nn.BatchNorm2d) for part in fast.modules())


class NormAtTheEnd(authors.Block):
    """The same parts as the authors' block, in another order."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(self.pos_embed(x)))
        x = x + (self.gamma_1 * y if self.layerscale else y)
        y = self.norm2(self.mlp2(x))
        return x + (self.gamma_2 * y if self.layerscale else y)


class NormTwice(authors.Network):
    """Uses the projection a second time, past its norm."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.patch_embed, *self.layers):
            x = layer(x)
        x = self.proj(x)
        return self.head((x + self.norm(x)).mean((2, 3)))


def test_parts_in_another_order_are_left() -> None:
    """Found on a random copy: behind a LayerScale that starts at 0 any order would pass for the authors'."""
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    for layerscale in (False, True):
        block = accelerate(NormAtTheEnd(8, (4, 4), 2, layerscale=layerscale, init_values=0.0)).double()
        fast = optimize_for_inference(block)
        assert isinstance(fast.norm2, nn.BatchNorm2d)
        torch.testing.assert_close(fast(x), block.eval()(x), rtol=1e-11, atol=1e-12)
    network = accelerate(NormTwice(**authors.SMALL)).double()
    fast = optimize_for_inference(network)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert isinstance(fast.norm, nn.BatchNorm2d) and isinstance(fast.layers[0].blocks[0].norm2, nn.Identity)
    torch.testing.assert_close(fast(x), network.eval()(x), rtol=1e-11, atol=1e-12)


def test_torch_compile() -> None:
    model = nn.Sequential(stvit.modules.SuperTokenBlock(8, 4, num_heads=2, layerscale=True)).double().eval()
    fast = optimize_for_inference(torch.compile(shaken(model)))
    assert isinstance(fast, nn.Sequential)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-11, atol=1e-12)


def test_errors() -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got dict"):
        optimize_for_inference({})  # type: ignore[type-var]
