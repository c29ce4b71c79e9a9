"""BatchNorm folded into the 1x1 convolution behind it, against float64 truth, and the block that uses it."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stvit import modules
from stvit.functional import batch_norm_conv_and_skip
from stvit.kernels import batch_norm_conv as kernels
from stvit.kernels import residual_branch
from stvit.modules import SuperTokenBlock
from tests.kernels.test_batch_norm import several, statistics
from tests.support.block_cases import Pixels, Results, check, drawn_pixels, ids, leaf, saving
from tests.support.cases import BRAIN, DOUBLE, DTYPES, HALF, LAST, SINGLE


class Case(NamedTuple):
    """One call; a channel of x has a mean of so many deviations, of either sign.

    elements, programs: of the sums over pixels, see test_batch_norm.py; rows, held: outputs that a program of the
    weight's backward takes, and numbers of the weight that one holds; None: as the kernels have it.
    """

    pixels: Pixels
    outputs: int = 12
    mean: float = 0.0
    elements: int | None = None
    programs: int | None = None
    rows: int | None = None
    held: int | None = None

    def tensors(self, device: str) -> list[Tensor]:
        """x, then weight and bias of the norm and of the convolution."""
        channels = self.pixels.channels
        shapes = [(channels,), (channels,), (self.outputs, channels, 1, 1), (self.outputs,)]
        parameters = [self.pixels.parameter(which, device, *shape) for which, shape in enumerate(shapes)]
        side = torch.ones(channels, 1, 1, device=device)
        side[1::2] = -1
        return [(self.pixels.pixels(0, device) + self.mean * side).to(self.pixels.dtype), *parameters]

    def grads(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Of the convolution, and of x through the skip connection; in the dtype of the case, whatever is asked for."""
        wide = self.pixels._replace(channels=self.outputs)
        return [wide.pixels(1, device, dtype, wide.grad_layout), self.pixels.pixels(2, device, dtype)]


def folded(pixels: Pixels) -> Case:
    """Only channels_last is folded."""
    return Case(pixels._replace(layout=LAST))


def compute(case: Case, device: str, backend: str, dtype: torch.dtype) -> Results:
    """The convolution and every gradient in `dtype`."""
    x, weight, bias, *conv = leaves = [
        leaf(tensor, DOUBLE if dtype == DOUBLE else tensor.dtype) for tensor in case.tensors(device)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residual_branch, "ELEMENTS", case.elements or residual_branch.ELEMENTS)
        patch.setattr(residual_branch, "PROGRAMS", case.programs or residual_branch.PROGRAMS)
        patch.setattr(kernels, "ROWS", case.rows or kernels.ROWS)
        patch.setattr(kernels, "ELEMENTS", case.held or kernels.ELEMENTS)
        running = statistics(weight)
        y, rest, skip = batch_norm_conv_and_skip(x, weight, bias, *running, 0.1, 1e-5, backend, conv=(conv[0], conv[1]))
        assert torch.equal(skip, x)
        added = y + rest.view(-1, 1, 1)
        grad, of_skip = case.grads(device, dtype)
        grads = torch.autograd.grad((added, skip), leaves, (grad.to(added.dtype), of_skip))
    names = ("y", "x", "weight", "bias", "conv", "conv bias")
    return dict(zip(names, (added.detach().to(dtype), *grads), strict=True))


def terms(case: Case, device: str) -> Results:
    """Absolute values of what is summed; centring an x whose mean is n deviations multiplies its rounding by n."""
    x, weight, bias, conv, conv_bias = (tensor.double() for tensor in case.tensors(device))
    grad, skip = (tensor.abs() for tensor in case.grads(device, DOUBLE))
    mean = x.mean((0, 2, 3), keepdim=True)
    rstd = ((x - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).rsqrt()
    n = (x - mean).abs() * rstd + mean.abs() * rstd
    conv, weight, bias = conv.abs(), weight[:, None, None].abs(), bias[:, None, None].abs()
    normed = weight * n + bias
    slope = torch.einsum("bkhw,kc->bchw", grad, conv.flatten(1))
    spread = slope + slope.mean((0, 2, 3), keepdim=True) + n * (slope * n).mean((0, 2, 3), keepdim=True)
    return {
        "y": torch.einsum("bchw,kc->bkhw", normed, conv.flatten(1)) + conv_bias.abs()[:, None, None],
        "x": weight * rstd * spread + skip,
        "weight": (slope * n).sum((0, 2, 3)),
        "bias": slope.sum((0, 2, 3)),
        "conv": torch.einsum("bkhw,bchw->kc", grad, normed)[:, :, None, None],
        "conv bias": grad.sum((0, 2, 3)),
    }


def check_case(case: Case, device: str) -> None:
    check(lambda backend, dtype: compute(case, device, backend, dtype), case.pixels.dtype, terms(case, device))


LISTED = [
    Case(Pixels(2, 64, 7, 6, HALF, LAST, LAST), 256),
    Case(Pixels(2, 96, 5, 4, HALF, LAST, LAST, SINGLE), 90),  # parameters in float32, as torch trains under autocast
    Case(Pixels(1, 320, 5, 3, SINGLE, LAST, LAST), 33),
    Case(Pixels(1, 40, 9, 7, DOUBLE, LAST, LAST)),
    Case(Pixels(3, 3, 5, 7, SINGLE, "sliced", "sliced")),  # not folded
    Case(Pixels(2, 1, 4, 5, SINGLE, LAST, "transposed"), 1),
    Case(Pixels(1, 3, 1, 2, SINGLE, LAST, LAST)),  # two values a channel
    # Several blocks of pixels and of outputs a program; the last one has fewer, and the last block is not full.
    Case(Pixels(2, 5, 7, 9, HALF, LAST, LAST), 23, elements=32, programs=3, rows=8, held=64),
    Case(Pixels(2, 20, 5, 5, SINGLE, LAST, LAST), 23, elements=64, programs=1, rows=4, held=32),
    Case(Pixels(1, 64, 9, 8, SINGLE, LAST, LAST), mean=100.0),
    # Where something else than the interpreter runs them.
    Case(Pixels(2, 64, 7, 6, BRAIN, LAST, LAST, SINGLE), 256),
    Case(Pixels(1, 96, 7, 6, BRAIN, LAST, LAST), 40, mean=10.0),
]
LISTED = [case for case in LISTED if case.pixels.dtype in DTYPES]


@pytest.mark.parametrize("case", LISTED, ids=ids)
def test_listed_cases(case: Case, device: str) -> None:
    check_case(case, device)


@given(
    case=st.builds(
        Case,
        drawn_pixels().filter(several).map(lambda pixels: pixels._replace(layout=LAST)),
        st.integers(1, 40),
        st.sampled_from([0.0, 3.0]),
        st.sampled_from([None, 512, 1024]),
        st.none() | st.integers(1, 5),
        st.sampled_from([None, 4, 16]),
        st.sampled_from([None, 256]),
    )
)
@settings(max_examples=15)
def test_drawn_cases(case: Case, device: str) -> None:
    check_case(case, device)


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0, 10.0, 30.0])
def test_large_means_cost_no_precision(mean: float, device: str) -> None:
    """In float16 the error, as a whole, is at most twice that of the norm and the convolution one after the other."""
    case = Case(Pixels(4, 64, 12, 12, HALF, LAST, LAST, SINGLE), 128, mean)
    truth, reference = (compute(case, device, "reference", dtype) for dtype in (DOUBLE, HALF))
    found = compute(case, device, "triton", HALF)
    for name, expected in truth.items():
        of_ours, of_reference = ((each[name] - expected).norm() / expected.norm() for each in (found, reference))
        assert of_ours <= 2 * of_reference + 2e-4, f"{name}: {of_ours:.2g}, reference {of_reference:.2g}"


def test_gradient_is_true(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_branch, "ELEMENTS", 32)
    monkeypatch.setattr(residual_branch, "PROGRAMS", 2)
    monkeypatch.setattr(kernels, "ROWS", 2)
    shapes = [(3,), (3,), (4, 3, 1, 1), (4,)]
    x = torch.randn(2, 3, 3, 2, dtype=DOUBLE, device=device).contiguous(memory_format=torch.channels_last)
    inputs = [x.requires_grad_()]
    inputs += [torch.randn(shape, dtype=DOUBLE, device=device, requires_grad=True) for shape in shapes]

    def function(x: Tensor, weight: Tensor, bias: Tensor, *conv: Tensor) -> tuple[Tensor, Tensor]:
        running = statistics(weight)
        given = (x, weight, bias, *running, 0.1, 1e-3, "triton")
        y, rest, skip = batch_norm_conv_and_skip(*given, conv=(conv[0], conv[1]))
        return y + rest.view(-1, 1, 1), skip

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-7, rtol=1e-6)


def test_results_repeat_bit_for_bit(device: str) -> None:
    case = Case(Pixels(2, 300, 5, 6, HALF, LAST, LAST, SINGLE), 70, programs=3)
    first, second = (compute(case, device, "triton", HALF) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_running_statistics_may_be_views(device: str) -> None:
    """Every second number of a vector: those between stay, and the statistics are PyTorch's."""
    x = torch.randn(2, 5, 3, 4, device=device).contiguous(memory_format=torch.channels_last)
    ones, conv = torch.ones(5, device=device), (torch.randn(7, 5, 1, 1, device=device), torch.randn(7, device=device))
    mean, variance = torch.zeros(10, device=device), torch.ones(10, device=device)
    batch_norm_conv_and_skip(x, ones, ones, mean[::2], variance[::2], backend="triton", conv=conv)
    torch.testing.assert_close(mean[::2], 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(variance[::2], 0.9 + 0.1 * x.var((0, 2, 3)))
    assert (mean[1::2] == 0).all() and (variance[1::2] == 1).all()


def test_no_pixels_but_x_are_saved(device: str) -> None:
    x = torch.randn(2, 5, 3, 4, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias, conv_bias = (torch.randn(size, device=device, requires_grad=True) for size in (5, 5, 7))
    conv = torch.randn(7, 5, 1, 1, device=device, requires_grad=True)
    with saving() as saved:
        batch_norm_conv_and_skip(x, weight, bias, *statistics(weight), backend="triton", conv=(conv, conv_bias))
    shapes = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() != x.data_ptr()]
    assert sorted(shapes) == [(5,), (5,), (5,), (5,), (7, 5), (7, 5, 1, 1)]


def test_a_block_is_that_of_the_norm_and_the_convolution(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, every gradient and the running statistics, over two steps; in float64, where both are exact."""
    monkeypatch.setattr(modules, "FOLDED", (DOUBLE,))
    called = []
    kept = modules.functional.batch_norm_conv_and_skip
    monkeypatch.setattr(
        modules.functional, "batch_norm_conv_and_skip", lambda *a, **k: called.append(1) or kept(*a, **k)
    )
    block = SuperTokenBlock(8, 2, num_heads=2, drop_path=0.3, backend="triton").to(device, DOUBLE)
    block.norm2.momentum = 0.3
    plain = copy.deepcopy(block)
    plain.norm2.register_forward_hook(lambda *_: None)  # it is called then
    for step in range(2):
        x = torch.randn(2, 8, 3, 2, device=device, dtype=DOUBLE).contiguous(memory_format=torch.channels_last)
        outputs = []
        for each in (block, plain):
            torch.manual_seed(step)
            outputs.append(each(x))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs)
    assert len(called) == 2
    for name, value in plain.norm2.named_buffers():
        torch.testing.assert_close(dict(block.norm2.named_buffers())[name], value, msg=name)
    for (name, one), other in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("change", ["float16", "contiguous", "hook", "no bias", "dropout", "activation"])
def test_what_keeps_the_norm_apart(change: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules.functional, "batch_norm_conv_and_skip", lambda *a, **k: pytest.fail("folded"))
    options = {"dropout": {"drop": 0.1}, "activation": {"act_layer": nn.ReLU}}.get(change, {})
    block = SuperTokenBlock(4, 2, backend="triton", **options).to(device)
    if change == "hook":
        block.mlp2.fc1.register_forward_hook(lambda *_: None)
    if change == "no bias":
        block.mlp2.fc1 = nn.Conv2d(4, 16, 1, bias=False).to(device)
    dtype = HALF if change == "float16" else SINGLE
    monkeypatch.setattr(modules, "FOLDED", modules.FOLDED if change == "float16" else (SINGLE,))
    layout = torch.contiguous_format if change == "contiguous" else torch.channels_last
    block.to(dtype)(torch.randn(2, 4, 4, 4, device=device, dtype=dtype).contiguous(memory_format=layout))


@pytest.mark.parametrize(
    ("conv", "error"),
    [
        (None, r"^conv: expected a weight"),
        ((torch.ones(2, 4, 1, 1), torch.ones(2)), r"^conv: expected shape \(2, 3, 1, 1\)"),
        ((torch.ones(2, 3, 1, 1), torch.ones(3)), r"^conv: expected shape \(2,\)"),
        ((3, torch.ones(3)), r"^conv: expected a torch.Tensor"),
    ],
)
def test_a_wrong_convolution_is_named(conv: object, error: str) -> None:
    weight = torch.ones(3)
    with pytest.raises((TypeError, ValueError), match=error):
        batch_norm_conv_and_skip(torch.randn(2, 3, 2, 2), weight, weight, *statistics(weight), conv=conv)  # type: ignore[arg-type]
