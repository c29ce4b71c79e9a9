"""The whole model on the kernels against the reference: numbers, gradients, random stream, autocast, memory format."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stvit import reference
from stvit.model import STViT
from stvit.modules import Attention, DropPath, SuperTokenBlock
from tests.support.block_cases import NARROW, Results, wide_programs

LAYERSCALE = {"layerscale": (True, False, True, True), "init_values": 0.5}


def pair(device: str, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, STViT]:
    """The same model on either backend, every parameter and statistic away from where it starts."""
    models = {name: STViT(10, **NARROW, backend=name, **options) for name in ("reference", "triton")}
    with torch.no_grad():
        for parameter in models["reference"].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in models["reference"].named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    models["triton"].load_state_dict(models["reference"].state_dict())
    return {name: model.to(device, dtype) for name, model in models.items()}


def step(model: nn.Module, x: Tensor, grad: Tensor, seed: int = 0) -> Results:
    """Output, input gradient, every parameter gradient and the statistics after a training step."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    after = torch.rand(1, dtype=torch.float64)  # where the random stream is then
    grads = torch.autograd.grad(y, [x, *model.parameters()], grad.to(y.dtype))
    names = ["x", *(name for name, _ in model.named_parameters())]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    return {"y": y.detach(), "stream": after, **dict(zip(names, grads, strict=True)), **statistics}


def assert_same(found: Results, expected: Results) -> None:
    """To rounding, also of what should be 0: the gradient of a bias in front of a BatchNorm in training."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        size = value.abs().max().item()
        assert size > 0, f"{name} is 0, which shows nothing"
        error = (found[name] - value).abs().max().item()
        assert error <= 1e-10 * size + 1e-13 * largest, f"{name}: {error:.3g} off, values up to {size:.3g}"


@pytest.mark.parametrize(
    ("training", "size", "options"),
    [
        (True, (40, 48), {}),  # tiles of 8 and 4 with padding, 2 x 2 super tokens
        (True, (32, 32), {"drop_path_rate": 0.3}),
        (True, (32, 32), {"drop_path_rate": 0.3, **LAYERSCALE}),
        (True, (32, 32), {"association_grad": True, **LAYERSCALE}),
        (False, (32, 32), {"drop_path_rate": 0.3, **LAYERSCALE}),
    ],
    ids=["train", "drop path", "drop path and layerscale", "association's gradient", "eval"],
)
def test_output_and_every_gradient_are_those_of_the_reference(
    training: bool, size: tuple[int, int], options: dict[str, Any], device: str
) -> None:
    models = pair(device, **options)
    x = torch.randn(2, 3, *size, dtype=torch.float64, device=device)
    grad = torch.randn(2, 10, dtype=torch.float64, device=device)
    with wide_programs(device):
        found, expected = (step(models[name].train(training), x, grad) for name in ("triton", "reference"))
    assert_same(found, expected)
    if options.get("drop_path_rate"):
        for module in models["reference"].modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        same = torch.allclose(expected["y"], step(models["reference"], x, grad)["y"])
        assert same == (not training), "under this seed no branch is dropped, which shows nothing"


@pytest.mark.parametrize("gamma", [False, True], ids=["plain", "layerscale"])
def test_a_dropped_branch_leaves_its_sample_as_it_is(gamma: bool, device: str) -> None:
    """On either backend the same ones: of 8 samples about 2 skip both branches."""
    kept = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        block = SuperTokenBlock(4, 2, drop_path=0.5, layerscale=gamma, init_values=0.5, backend=backend).to(device)
        x = torch.randn(8, 4, 2, 4, device=device)
        torch.manual_seed(1)
        with wide_programs(device):
            kept.append((block(x) != block.pos_embed(x)).flatten(1).any(1))
    assert torch.equal(*kept) and 4 <= kept[0].sum() < 8


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("tile", [1, 2], ids=["pixels", "super tokens"])
def test_layerscale_keeps_drop_path_exact_in_half_precision(tile: int, backend: str, device: str) -> None:
    """A float32 LayerScale makes the branch float32, so that 1 / 0.7 is not rounded to the branch's half precision."""
    block = SuperTokenBlock(4, tile, drop_path=0.3, layerscale=True, init_values=1.0, backend=backend).to(device)
    drawn: list[Tensor] = []
    factors = DropPath.factors

    def spy(self: DropPath, *args: Any, **kwargs: Any) -> Tensor | None:
        found = factors(self, *args, **kwargs)
        drawn.extend([] if found is None else [found])
        return found

    with wide_programs(device), torch.autocast(device, torch.float16), mock.patch.object(DropPath, "factors", spy):
        block(torch.randn(16, 4, 2, 2, device=device))
    assert len(drawn) == 2
    exact = torch.tensor([1 / 0.7], device=device)
    for values in drawn:
        torch.testing.assert_close(values.float().max(), exact[0], rtol=1e-6, atol=0)


SEEDS = range(2)


@pytest.mark.parametrize("layerscale", [False, True], ids=["plain", "layerscale"])
def test_under_autocast_the_error_is_at_most_that_of_the_reference(layerscale: bool, device: str) -> None:
    """Of a block of super tokens and one of pixels after it, as root mean square over entries and seeds.

    The whole model would show less: it amplifies each rounding until the ratio of two errors is one of luck.
    """
    sums: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name, squares in squared_errors(layerscale, seed, device).items():
            sums[name] = [sum(pair) for pair in zip(sums.get(name, (0.0, 0.0)), squares, strict=True)]
    ratios = {name: (ours / theirs) ** 0.5 for name, (ours, theirs) in sums.items()}
    assert max(ratios.values()) <= 1, ratios


def squared_errors(layerscale: bool, seed: int, device: str) -> dict[str, tuple[float, float]]:
    """Of a step's output, input gradient and all parameter gradients: the kernels' and the reference's, squared."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_heads": 2, "mlp_ratio": 2.0, "layerscale": layerscale, "init_values": 0.5}
    expected = nn.Sequential(*(SuperTokenBlock(8, tile, backend="reference", **options) for tile in (3, 1))).to(device)
    ours = nn.Sequential(*(SuperTokenBlock(8, tile, backend="triton", **options) for tile in (3, 1))).to(device)
    ours.load_state_dict(expected.state_dict())
    x, grad = torch.randn(2, 2, 8, 6, 8, device=device)  # 2 x 3 tiles, the last ones padded
    truth = step(copy.deepcopy(expected).double(), x.double(), grad.double())
    with wide_programs(device), torch.autocast(device, torch.float16):
        found = [step(blocks, x, grad) for blocks in (ours, expected)]
    # Each parameter's gradient by its size, but for the bias in front of a BatchNorm, whose gradient is 0.
    sizes = {name: truth[name].norm() for name, _ in expected.named_parameters()}
    sizes = {name: size for name, size in sizes.items() if size > 1e-9 * max(sizes.values())}
    for results in (truth, *found):
        results["parameters"] = torch.cat([(results[name] / size).flatten() for name, size in sizes.items()])
    errors = {name: [(results[name] - truth[name]).norm() for results in found] for name in ("y", "x", "parameters")}
    return {name: (float(ours) ** 2, float(theirs) ** 2) for name, (ours, theirs) in errors.items()}


FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_format_of_the_images_does_not_matter(backend: str, device: str) -> None:
    model = pair(device, torch.float32, **LAYERSCALE)[backend].eval()
    x, grad = torch.randn(1, 3, 32, 32, device=device), torch.randn(1, 10, device=device)
    with wide_programs(device):
        nchw, nhwc = (step(model, x.contiguous(memory_format=layout), grad) for layout in FORMATS.values())
    for name in nchw:
        assert torch.equal(nchw[name], nhwc[name]), name


class Copies(TorchDispatchMode):
    """Counts operators that copy an activation, by name; not those of the functions that are left out."""

    NAMES = ("clone", "contiguous", "copy_", "_to_copy", "stack", "cat")

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.counting and name in self.NAMES and result.dim() > 2:
            self.counted[name] += 1
        return result

    @contextmanager
    def leaving_out(self, *functions: tuple[Any, str]) -> Iterator[None]:
        """Within it, what these functions do is not counted."""

        def silent(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.counting, before = False, self.counting
                try:
                    return function(*args, **kwargs)
                finally:
                    self.counting = before

            return call

        with ExitStack() as patches:
            for owner, name in functions:
                patches.enter_context(mock.patch.object(owner, name, silent(getattr(owner, name))))
            yield


def steady(model: nn.Module) -> None:
    """Asserts that every block, convolution and norm is given channels_last and answers in it.

    Not the parts whose parameters the kernels use: a hook on them makes the block call them instead.
    """

    def hook(module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> None:
        for tensor in (given[0], answer):
            if isinstance(tensor, Tensor) and tensor.dim() == 4:
                assert tensor.is_contiguous(memory_format=torch.channels_last), module

    for module in model.modules():
        called = isinstance(module, (nn.Conv2d, nn.BatchNorm2d, SuperTokenBlock, Attention))
        if called and getattr(module, "groups", 1) == 1:
            module.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("layout", "options"),
    [("nchw", {"drop_path_rate": 0.3}), ("nhwc", {"drop_path_rate": 0.3, **LAYERSCALE})],
    ids=["nchw", "nhwc and layerscale"],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_images_are_converted_once_and_nothing_else_is(
    backend: str, options: dict[str, Any], layout: str, device: str
) -> None:
    """On the kernels no activation but the images is copied forward; backward the gradients of q, k and v are stacked.

    The reference copies within sampling, upsampling and its explicit attention, and nowhere between.
    """
    model = pair(device, torch.float32, **options)[backend]
    model.to(memory_format=torch.channels_last)  # as training does: gradients of weights would be copied otherwise
    steady(model)
    x = torch.randn(2, 3, 64, 32, device=device).contiguous(memory_format=FORMATS[layout])
    inside = [(reference, "sampling"), (reference, "upsampling"), (Attention, "forward")]
    with wide_programs(device), Copies() as copies:
        with copies.leaving_out(*(inside if backend == "reference" else [])):
            y = model(x)
    assert copies.counted == ({"clone": 1} if layout == "nchw" else {})
    if backend == "triton":
        blocks = sum(isinstance(module, SuperTokenBlock) for module in model.modules())
        with wide_programs(device), Copies() as copies:
            y.sum().backward()
        assert copies.counted == {"stack": blocks}
