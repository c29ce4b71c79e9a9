"""What tools do to our models: counters of operations, adapters, quantization, the meta device, tensor subclasses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import stvit
from stvit.functional import residual_depthwise
from stvit.model import STViT
from stvit.modules import SuperTokenBlock

SMALLEST = {"embed_dim": (8, 12, 20, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 5, 4), "projection": 24}
COUNTED = (nn.Conv2d, nn.Linear)
BACKENDS = ("reference", "triton")


def smallest() -> STViT:
    return STViT(num_classes=5, layerscale=(False, True, False, True), init_values=0.5, **SMALLEST)  # type: ignore[arg-type]


def count(run: Callable[[], object]) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter


def test_a_counter_of_hooks_counts_what_pytorch_counts() -> None:
    """In the manner of fvcore, thop and ptflops: a hook on every leaf, which tells operations from shapes."""
    model, x = smallest().eval(), torch.randn(2, 3, 40, 33)
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    told: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def tell(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.weight if isinstance(module, COUNTED) else None
            told[name] = 0 if weight is None else 2 * output.numel() * weight[0].numel()

        return tell

    for name, module in leaves.items():
        module.register_forward_hook(hook(name))
    model(x)
    assert told.keys() == {name for name in leaves if ".fold" not in name and ".unfold" not in name}
    counted = count(lambda: model(x)).get_flop_counts()["Global"]
    aten = torch.ops.aten
    assert sum(told.values()) == counted[aten.convolution] + counted[aten.addmm]


def attention(x: Tensor, n_iter: int, full: bool, backend: str) -> Tensor:
    stokens, association = stvit.super_token_sampling(x, (2, 3), n_iter, None, full, backend)
    return stvit.token_upsampling(stokens.tanh(), association, backend)


@pytest.mark.parametrize(("n_iter", "full"), [(1, False), (2, True)])
def test_kernels_count_as_the_reference_does(n_iter: int, full: bool, device: str) -> None:
    """Forward and backward, with padding."""
    totals = []
    for backend in BACKENDS:
        x = torch.randn(1, 4, 3, 4, device=device, requires_grad=True)
        forward = count(lambda x=x, backend=backend: attention(x, n_iter, full, backend)).get_total_flops()
        both = count(lambda x=x, backend=backend: attention(x, n_iter, full, backend).sum().backward())
        totals.append((forward, both.get_total_flops()))
    assert totals[0] == totals[1] and totals[0][0] == 2 * 9 * 4 * 4 * 6 * (2 * n_iter + 1)


def test_the_gradient_of_the_association_alone_is_counted_too(device: str) -> None:
    totals = []
    for backend in BACKENDS:
        x = torch.randn(1, 4, 3, 4, device=device, requires_grad=True)

        def run(x: Tensor = x, backend: str = backend) -> None:
            _, association = stvit.super_token_sampling(x, (2, 3), 2, None, True, backend)
            association.weights.square().sum().backward()

        totals.append(count(run).get_total_flops())
    assert totals[0] == totals[1]


def test_a_depthwise_kernel_counts_its_products(device: str) -> None:
    x = torch.randn(2, 4, 5, 7, device=device, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, device=device, requires_grad=True)
    forward = [count(lambda b=b: residual_depthwise(x, weight, backend=b)).get_total_flops() for b in BACKENDS]
    assert forward == [2 * 9 * x.numel()] * 2
    both = count(lambda: residual_depthwise(x, weight, backend="triton").sum().backward()).get_total_flops()
    assert both == 3 * forward[0]


class LoraConv2d(nn.Module):
    """What peft puts in the place of a Conv2d: the frozen layer, and B(A(dropout(x))) * alpha / rank beside it."""

    def __init__(self, base_layer: nn.Conv2d, rank: int = 2, alpha: float = 6.0) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = alpha / rank
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        down = nn.Conv2d(
            base_layer.in_channels, rank, base_layer.kernel_size, base_layer.stride, base_layer.padding, bias=False
        )
        up = nn.Conv2d(rank, base_layer.out_channels, 1, bias=False)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": down}), nn.ModuleDict({"default": up})
        self.merged = False

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def delta(self) -> Tensor:
        """What the adapter adds to a 1x1 weight, (out, in, 1, 1)."""
        up, down = self.lora_B["default"].weight, self.lora_A["default"].weight  # type: ignore[operator]
        return self.scaling * (up.flatten(1) @ down.flatten(1))[..., None, None]  # type: ignore[operator]

    def merge(self) -> None:
        self.base_layer.weight.data += self.delta()
        self.merged = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.merged:
            return y
        adapted = self.lora_A["default"](self.lora_dropout["default"](x))
        return y + self.lora_B["default"](adapted) * self.scaling


ADAPTED = ("attn.stoken_refine.qkv", "attn.stoken_refine.proj", "mlp2.fc1", "mlp2.fc2")


def with_adapters(block: SuperTokenBlock) -> SuperTokenBlock:
    block = copy.deepcopy(block)
    for name in ADAPTED:
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, LoraConv2d(block.get_submodule(name)))  # type: ignore[arg-type]
    return block


@pytest.mark.parametrize("stoken_size", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_low_rank_adapters(stoken_size: int, backend: str, device: str) -> None:
    """Output and gradients are those of the block whose weights are the sums W + scaling B A."""
    plain = SuperTokenBlock(8, stoken_size, num_heads=2, backend=backend).to(device, torch.float64)
    adapted = with_adapters(plain).to(device, torch.float64)
    x = torch.randn(2, 8, 4, 6, device=device, dtype=torch.float64)
    with torch.no_grad():
        for name in ADAPTED:
            plain.get_submodule(name).weight += adapted.get_submodule(name).delta()  # type: ignore[operator]
    expected, y = plain(x), adapted(x)
    torch.testing.assert_close(y, expected)
    expected.square().sum().backward()
    y.square().sum().backward()
    for name in ADAPTED:
        whole, lora = plain.get_submodule(name).weight.grad, adapted.get_submodule(name)
        down, up = lora.lora_A["default"].weight, lora.lora_B["default"].weight  # type: ignore[index,union-attr]
        whole = lora.scaling * whole.flatten(1)  # type: ignore[union-attr,operator]
        torch.testing.assert_close(down.grad.flatten(1), up.flatten(1).T @ whole)
        torch.testing.assert_close(up.grad.flatten(1), whole @ down.flatten(1).T)
        assert lora.base_layer.weight.grad is None and up.grad.abs().sum() > 0  # type: ignore[union-attr]
        lora.merge()  # type: ignore[operator]
    torch.testing.assert_close(adapted(x), y)


def error(quantized: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = model(x)
        return float((quantized(x) - y).abs().max() / y.abs().max())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantization_for_inference() -> None:
    """Dynamic: the head. Static on a graph: every convolution but the depthwise 3x3, which the package's functions
    compute from their weights. Static without a graph is PyTorch's error: nothing quantizes the input."""
    model, x = smallest().eval(), torch.randn(2, 3, 40, 33)
    dynamic = quantization.quantize_dynamic(copy.deepcopy(model), dtype=torch.qint8)
    assert type(dynamic.head) is torch.ao.nn.quantized.dynamic.Linear and 0 < error(dynamic, model, x) < 0.05
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), quantization.get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    static = quantize_fx.convert_fx(prepared)
    convolutions = [module for module in static.modules() if isinstance(module, torch.ao.nn.quantized.Conv2d)]
    depthwise = 2 * sum(SMALLEST["depths"])
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - depthwise
    assert 0 < error(static, model, x) < 0.1
    eager = copy.deepcopy(model)
    eager.qconfig = quantization.get_default_qconfig("x86")  # type: ignore[assignment]
    observed = quantization.prepare(eager)
    observed(x)
    with pytest.raises(NotImplementedError, match="quantized::conv2d"):
        quantization.convert(observed)(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantization_aware_training() -> None:
    """Layers of classes of their own, which are called: every fake-quantized weight gets a gradient."""
    model, x = smallest(), torch.randn(4, 3, 40, 33)
    model.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    trained = quantization.prepare_qat(model)
    trained(x).square().sum().backward()
    layers = [module for module in trained.modules() if isinstance(module, torch.ao.nn.qat.Conv2d)]
    assert len(layers) == sum(isinstance(module, nn.Conv2d) for module in smallest().modules())
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers)
    ranges = [layer.activation_post_process.activation_post_process for layer in layers]
    assert all(seen.max_val > seen.min_val for seen in ranges)


class EightBits(torch.Tensor):
    """A weight kept in eight bits, as torchao's are: a subclass without storage that is unpacked in every operation."""

    whole: Tensor
    step: Tensor

    @staticmethod
    def __new__(cls, whole: Tensor, step: Tensor) -> EightBits:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=step.dtype, device=whole.device)

    def __init__(self, whole: Tensor, step: Tensor) -> None:
        self.whole, self.step = whole, step

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].step)
        unpacked = tree_map(lambda x: x.whole * x.step if isinstance(x, cls) else x, (args, kwargs or {}))
        return op(*unpacked[0], **unpacked[1])


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_weights_of_a_tensor_subclass(backend: str, device: str) -> None:
    """Whoever unpacks weights in eight bits gets the block of those weights, on kernels too."""
    block = SuperTokenBlock(8, 2, num_heads=2, backend=backend).to(device).eval()
    packed, x = copy.deepcopy(block), torch.randn(1, 8, 4, 6, device=device)
    for own, other in zip(block.modules(), packed.modules(), strict=True):
        if isinstance(own, nn.Conv2d):
            step = own.weight.detach().abs().max() / 127
            whole = (own.weight.detach() / step).round().to(torch.int8)
            own.weight.data.copy_(whole * step)
            other.weight = nn.Parameter(EightBits(whole, step), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), block(x))


@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_images_of_a_tensor_subclass(backend: str, device: str) -> None:
    """torchvision's images are tensors of a class of their own, from its transforms on."""
    from torchvision import tv_tensors

    block, x = SuperTokenBlock(3, 2, backend=backend).to(device).eval(), torch.randn(1, 3, 4, 6, device=device)
    assert torch.equal(block(tv_tensors.Image(x)), block(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
def test_traced_by_jit(backend: str, device: str) -> None:
    """fvcore counts on such a graph; kernels are ops in it."""
    block, x = SuperTokenBlock(8, 2, backend=backend).to(device).eval(), torch.randn(1, 8, 4, 6, device=device)
    traced = torch.jit.trace(block, x, check_trace=False)
    torch.testing.assert_close(traced(x), block(x))
    found = {node.kind() for node in traced.inlined_graph.nodes()}
    assert ("stvit::sampling" in found) == (backend == "triton")


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("backend", BACKENDS)
def test_scripted_by_jit(backend: str, tmp_path: Path) -> None:
    """As timm's validate.py --torchscript does, before eval(): one file for every batch and size, without stvit."""
    model = STViT(5, **SMALLEST, stoken_size=(8, (4, 2), 1, 1), backend=backend)  # type: ignore[arg-type]
    scripted = torch.jit.script(nn.Sequential(model))
    with pytest.raises(torch.jit.Error, match="a scripted STViT is for evaluation: call eval()"):
        scripted(torch.randn(2, 3, 64, 64))
    torch.jit.save(scripted.eval(), tmp_path / "model.pt")
    loaded, reference = torch.jit.load(tmp_path / "model.pt"), copy.deepcopy(model).eval()
    for part in (part for part in reference.modules() if hasattr(part, "backend")):
        assert part.backend == backend
        part.backend = "reference"
    for shape in ((1, 3, 64, 96), (3, 3, 75, 100), (2, 3, 128, 65), (1, 3, 1, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(loaded(x), reference(x), rtol=1e-5, atol=1e-6)
    assert model.training


@pytest.mark.parametrize("first", ["to_empty", "nothing"])
def test_checkpoints_load_into_a_model_of_the_meta_device(first: str, tmp_path: Path) -> None:
    """Made real before or by the load, in the model's own dtype; nothing is left out silently."""
    kept, path, x = smallest().eval(), tmp_path / "file.pth", torch.randn(2, 3, 40, 33)
    weights = {name: value.double() if "head" in name else value for name, value in kept.state_dict().items()}
    torch.save({"model": weights, "model_ema": weights}, path)
    with torch.device("meta"):
        model = smallest().eval()
    if first == "to_empty":
        model.to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stvit.load_checkpoint(model, path)
    assert torch.equal(model(x), kept(x))
    assert all(p.requires_grad and p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())


def test_a_part_on_the_meta_device_is_loaded_too(tmp_path: Path) -> None:
    model, other, path = smallest(), smallest(), tmp_path / "file.pth"
    torch.save(other.state_dict(), path)
    model.head.to("meta")
    stvit.load_checkpoint(model, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
