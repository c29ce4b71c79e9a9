"""The residual depthwise kernels against float64 truth, and the truth against an oracle of loops."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stvit import reference
from stvit.functional import residual_depthwise
from stvit.kernels import residual_depthwise as kernels
from stvit.tensors import is_channels_last, memory_format
from tests.support.block_cases import Pixels, Results, assert_refused, check, drawn_pixels, ids, leaf, saving
from tests.support.cases import DOUBLE, DTYPES, HALF, LAST, SINGLE, SLICED, SLICED_LAST, far_apart


class Case(NamedTuple):
    """One call; span is the number of columns that a program walks, None: as the kernel has it. x_bias: whether the
    bias of a convolution in front is added first."""

    pixels: Pixels
    gelu: bool = False
    bias: bool = True
    span: int | None = None
    x_bias: bool = False

    def parameters(self, device: str) -> Results:
        channels = self.pixels.channels
        wanted = {"weight": True, "bias": self.bias, "x_bias": self.x_bias}
        shapes = {"weight": (channels, 1, 3, 3), "bias": (channels,), "x_bias": (channels,)}
        found = {name: self.pixels.parameter(i, device, *shape) for i, (name, shape) in enumerate(shapes.items())}
        found["weight"] *= 0.4
        return {name: parameter for name, parameter in found.items() if wanted[name]}


def compute(case: Case, device: str, backend: str, dtype: torch.dtype) -> Results:
    """y and every gradient in `dtype`. The reference takes its parameters in the dtype of x, as autocast gives them."""
    pixels = case.pixels
    x = leaf(pixels.pixels(0, device), dtype)
    leaves = {name: leaf(p, DOUBLE if dtype == DOUBLE else p.dtype) for name, p in case.parameters(device).items()}
    given = leaves if backend == "triton" else {name: parameter.to(dtype) for name, parameter in leaves.items()}
    with pytest.MonkeyPatch.context() as patch:
        if case.span:
            patch.setattr(kernels, "SPAN", case.span)
        y = residual_depthwise(x, given["weight"], given.get("bias"), case.gelu, backend, x_bias=given.get("x_bias"))
        if backend == "triton":
            assert y.is_contiguous(memory_format=memory_format(is_channels_last(x)))
        grad = pixels.pixels(1, device, dtype, pixels.grad_layout)
        grads = torch.autograd.grad(y, [x, *leaves.values()], grad)
    results = dict(zip(("y", "x", *leaves), (y.detach(), *grads), strict=True))
    if case.x_bias:  # it is the sum of dx as that is rounded, so it is judged by the dtype of x, whatever its own
        results["x_bias"] = results["x_bias"].to(dtype)
    return results


def terms(case: Case, device: str) -> Results:
    """The same of absolute values: nothing cancels. GELU is no larger than its argument, and its slope than 1.13."""
    tensors = {"x": case.pixels.pixels(0, device), **case.parameters(device)}
    inputs = {name: tensor.double().abs().requires_grad_() for name, tensor in tensors.items()}
    y = reference.residual_depthwise(inputs["x"], inputs["weight"], inputs.get("bias"), False, inputs.get("x_bias"))
    grad = case.pixels.pixels(1, device, DOUBLE, case.pixels.grad_layout).abs()
    grads = torch.autograd.grad(y, list(inputs.values()), grad)
    return dict(zip(("y", *inputs), (y.detach(), *grads), strict=True))


def check_case(case: Case, device: str) -> None:
    check(lambda backend, dtype: compute(case, device, backend, dtype), case.pixels.dtype, terms(case, device))


# A program holds up to 256 channels and strips of up to 7 rows, several where 64 channels by strips allow.
LISTED = [
    Case(Pixels(1, 64, 7, 6, HALF, LAST, LAST), gelu=True),
    Case(Pixels(2, 64, 6, 3, SINGLE, LAST, LAST)),
    Case(Pixels(1, 96, 5, 4, HALF, LAST, LAST, SINGLE), gelu=True),  # parameters in float32, as under autocast
    Case(Pixels(2, 96, 4, 3, HALF, LAST, LAST, SINGLE), bias=False),
    Case(Pixels(1, 640, 3, 2, HALF, LAST, LAST)),  # several blocks of channels, the last one whole
    Case(Pixels(1, 300, 2, 3, SINGLE, LAST, LAST), gelu=True),  # and one that is not
    Case(Pixels(1, 200, 1, 5, HALF, LAST, SLICED_LAST), gelu=True),  # one row
    Case(Pixels(2, 90, 6, 1, SINGLE, SLICED_LAST, LAST)),  # one column
    Case(Pixels(1, 40, 9, 7, DOUBLE, LAST, LAST), gelu=True),
    Case(Pixels(1, 40, 1, 6, DOUBLE, SLICED, "transposed"), bias=False),
    Case(Pixels(3, 3, 5, 7, SINGLE, SLICED, SLICED), gelu=True),
    Case(Pixels(2, 3, 5, 7, HALF, "transposed", SLICED_LAST, SINGLE), gelu=True),
    Case(Pixels(2, 3, 4, 6, SINGLE, "expanded", "expanded"), gelu=True),
    Case(Pixels(2, 1, 4, 5, HALF, LAST, "expanded")),
    Case(Pixels(1, 1, 1, 7, SINGLE), gelu=True, bias=False),
    *(Case(Pixels(1, 3, 1, 1, dtype, LAST, LAST), gelu) for dtype in DTYPES for gelu in (False, True)),
    Case(Pixels(1, 128, 19, 2, HALF, LAST, LAST), gelu=True),  # several programs down an image, the last one part empty
    Case(Pixels(1, 2, 67, 1, SINGLE)),
    Case(Pixels(2, 5, 5, 7, SINGLE, LAST, LAST), gelu=True, span=3),  # several programs across, the last one shorter
    Case(Pixels(1, 130, 9, 4, DOUBLE, LAST, LAST), span=2),
    Case(Pixels(1, 2, 2, 5, HALF), gelu=True, span=1),
    # The bias of the convolution in front: zeros around the image stay zeros, in strips that divide it and that don't.
    Case(Pixels(1, 64, 7, 4, HALF, LAST, LAST, SINGLE), gelu=True, x_bias=True),
    Case(Pixels(2, 20, 9, 5, SINGLE, LAST, LAST), gelu=True, span=2, x_bias=True),
    Case(Pixels(1, 3, 5, 3, DOUBLE, SLICED), bias=False, x_bias=True),
    Case(Pixels(0, 3, 5, 7, HALF, LAST, LAST), gelu=True, x_bias=True),  # no images
    Case(Pixels(0, 70, 2, 2, SINGLE), bias=False),
    Case(Pixels(1, 40, 9, 7, torch.bfloat16, LAST, LAST, SINGLE), gelu=True),
    Case(Pixels(2, 300, 5, 6, torch.bfloat16, LAST, LAST)),
]
LISTED = [case for case in LISTED if case.pixels.dtype in DTYPES]


@pytest.mark.parametrize("case", LISTED, ids=ids)
def test_listed_cases(case: Case, device: str) -> None:
    check_case(case, device)


@given(case=st.builds(Case, drawn_pixels(), st.booleans(), st.booleans(), st.none() | st.integers(1, 5), st.booleans()))
@settings(max_examples=20)
def test_drawn_cases(case: Case, device: str) -> None:
    check_case(case, device)


def test_the_gradient_of_x_bias_is_the_sum_of_dx_as_written(device: str) -> None:
    """To float32's precision: what folds a norm into the product in front takes the difference of their multiples."""
    pixels = Pixels(2, 20, 9, 6, HALF, LAST, LAST, SINGLE)
    x, *parameters = (pixels.pixels(0, device), *(pixels.parameter(i, device, 20) for i in range(2)))
    weight, bias = pixels.parameter(2, device, 20, 1, 3, 3), parameters[0]
    leaves = [tensor.requires_grad_() for tensor in (x, parameters[1])]
    y = residual_depthwise(leaves[0], weight, bias, True, "triton", x_bias=leaves[1])
    dx, dx_bias = torch.autograd.grad(y, leaves, pixels.pixels(1, device))
    exact = dx.double().sum((0, 2, 3))
    assert (dx_bias - exact).abs().max() <= 1e-6 * dx.double().abs().sum((0, 2, 3)).max()


def oracle(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, grad: Tensor) -> Results:
    """y and every gradient by loops over Python floats."""
    batch, channels, height, width = x.shape
    found = {"y": torch.zeros_like(x), "x": torch.zeros_like(x), "weight": torch.zeros_like(weight),
             "bias": torch.zeros_like(bias)}  # fmt: skip
    for b, c, i, j in product(range(batch), range(channels), range(height), range(width)):
        g = grad[b, c, i, j].item()
        found["bias"][c] += g
        total = bias[c].item()
        for up, left in product(range(3), range(3)):
            at = (i + up - 1, j + left - 1)
            if not (0 <= at[0] < height and 0 <= at[1] < width):
                continue
            u, tap = x[b, c, at[0], at[1]].item(), weight[c, 0, up, left].item() + (up == left == 1)
            h, slope = u, 1.0
            if gelu:
                phi = 0.5 * math.erfc(-u / math.sqrt(2))
                h, slope = u * phi, phi + u * math.exp(-u * u / 2) / math.sqrt(2 * math.pi)
            total += tap * h
            found["weight"][c, 0, up, left] += g * h
            found["x"][b, c, at[0], at[1]] += g * tap * slope
        found["y"][b, c, i, j] = total
    return found


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (1, 2, 1, 4), (1, 2, 3, 1)], ids=str)
def test_truth_is_the_oracle(shape: tuple[int, int, int, int], gelu: bool) -> None:
    x, grad = torch.randn(2, *shape, dtype=DOUBLE)
    weight, bias = torch.randn(shape[1], 1, 3, 3, dtype=DOUBLE), torch.randn(shape[1], dtype=DOUBLE)
    inputs = [tensor.requires_grad_() for tensor in (x.clone(), weight.clone(), bias.clone())]
    y = residual_depthwise(*inputs, gelu, "reference")
    grads = torch.autograd.grad(y, inputs, grad)
    for (name, expected), found in zip(oracle(x, weight, bias, gelu, grad).items(), (y, *grads), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("gelu", [False, True])
def test_gradient_is_true(gelu: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SPAN", 2)
    shapes = [(1, 2, 3, 3), (2, 1, 3, 3), (2,)]
    inputs = [torch.randn(shape, dtype=DOUBLE, device=device, requires_grad=True) for shape in shapes]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return residual_depthwise(x, weight, bias, gelu, "triton")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-7, rtol=1e-6)


REPEATED = Case(Pixels(1, 130, 5, 4, HALF, LAST, LAST, SINGLE), gelu=True, span=3)


def test_results_repeat_bit_for_bit(device: str) -> None:
    first, second = (compute(REPEATED, device, "triton", HALF) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_neither_images_nor_channels_depend_on_each_other(device: str) -> None:
    """NaN in one image and one channel stays there; everything else has the bits that it has without."""
    case = Case(Pixels(2, 4, 5, 3, SINGLE, LAST, LAST), gelu=True)
    x, weight = case.pixels.pixels(0, device), case.pixels.parameter(0, device, 4, 1, 3, 3)
    clean = residual_depthwise(x, weight, None, True, "triton")
    x[1, 2] = math.nan
    y = residual_depthwise(x, weight, None, True, "triton")
    assert y[1, 2].isnan().all()
    y[1, 2] = clean[1, 2]
    assert torch.equal(y, clean)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, for inf - inf and 0 * inf
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("column", [2, 0], ids=["inside", "on the edge"])
def test_nan_and_infinity_spread_as_in_the_reference(
    value: float, gelu: bool, where: str, column: int, device: str
) -> None:
    pixels = Pixels(1, 2, 4, 4, SINGLE, LAST, LAST)
    weight = pixels.parameter(0, device, 2, 1, 3, 3)
    weight[:, :, 1, 1].abs_()  # inf - 0.5 * inf is NaN, and inf where the identity is folded into the tap: 0.5 * inf
    results = []
    for backend in ("triton", "reference"):
        tensors = {"x": pixels.pixels(0, device), "grad": pixels.pixels(1, device)}
        tensors[where][0, 1, 2, column] = value
        inputs = [leaf(tensors["x"], SINGLE), leaf(weight, SINGLE)]
        y = residual_depthwise(*inputs, None, gelu, backend)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, tensors["grad"])])
    (y, dx, dw), (y_expected, dx_expected, dw_expected) = results
    assert y.isfinite().all() == (where == "grad")
    torch.testing.assert_close(y, y_expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx, dx_expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dw[0], dw_expected[0], rtol=1e-5, atol=1e-5)
    # A tap that sees the pixel has no number left; whether one that sees padding beside it does, is not said.
    assert not dw[1, :, :, 1].isfinite().any()
    assert column == 0 or not dw[1].isfinite().any()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_but_x_is_saved(gelu: bool, bias: bool, device: str) -> None:
    x = torch.randn(1, 3, 4, 5, device=device, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, device=device, requires_grad=True)
    with saving() as saved:
        y = residual_depthwise(x, weight, torch.ones(3, device=device) if bias else None, gelu, "triton")
    assert y.requires_grad
    assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), weight.data_ptr()}


def test_only_wanted_gradients_are_given(device: str) -> None:
    x = torch.randn(1, 2, 3, 2, device=device, requires_grad=True)
    weight, bias = torch.randn(2, 1, 3, 3, device=device), torch.randn(2, device=device, requires_grad=True)
    residual_depthwise(x, weight, bias, True, "triton").sum().backward()
    assert weight.grad is None and x.grad is not None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 6.0))


@pytest.mark.parametrize("dimension", range(4), ids=["image", "channel", "row", "column"])
def test_offsets_beyond_two_to_the_31(dimension: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three entries 2**30 apart: the last one's offset doesn't fit 32 bits. The memory between is never touched."""
    shape = [1, 2, 2, 2]
    shape[dimension] = 3
    near, grad = torch.randn(2, *shape, dtype=HALF, device=device)
    weight = torch.randn(shape[1], 1, 3, 3, device=device)
    results = []
    far = far_apart(near, dimension, monkeypatch)
    far_grad = far_apart(grad, dimension, monkeypatch)
    for x, dy in ((near, grad), (far, far_grad)):
        x = x.detach().requires_grad_()
        y = residual_depthwise(x, weight, None, True, "triton")
        results.append((y, *torch.autograd.grad(y, x, dy)))
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)


def test_under_autocast_x_keeps_its_dtype(device: str) -> None:
    weight, bias = torch.randn(3, 1, 3, 3, device=device), torch.randn(3, device=device)
    for dtype in (HALF, SINGLE):
        x = torch.randn(1, 3, 4, 2, device=device, dtype=dtype)
        outside = residual_depthwise(x, weight, bias, True, "triton")
        with torch.autocast(device, HALF):
            inside = residual_depthwise(x, weight, bias, True, "triton")
            expected = residual_depthwise(x, weight, bias, True, "reference")
        assert torch.equal(inside, outside) and inside.dtype == expected.dtype == dtype
        torch.testing.assert_close(inside, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("x_dtype", [HALF, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE], ids=str)
def test_parameters_in_any_dtype(x_dtype: torch.dtype, dtype: torch.dtype, backend: str, device: str) -> None:
    """Each gradient comes in the dtype of what it belongs to."""
    x = torch.randn(1, 2, 2, 2, dtype=x_dtype, device=device, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(2, dtype=HALF, device=device, requires_grad=True)
    y = residual_depthwise(x, weight, bias, True, backend)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == x_dtype and weight.grad.dtype == dtype and bias.grad.dtype == HALF
    expected = reference.residual_depthwise(x.double(), weight.double(), bias.double(), True)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=4e-3)


X, WEIGHT, BIAS = torch.zeros(2, 3, 4, 5), torch.zeros(3, 1, 3, 3), torch.zeros(3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"x": [1.0]}, TypeError, "x"),
        ({"x": X[0]}, ValueError, "x"),
        ({"x": X.int()}, TypeError, "x"),
        ({"x": X[:, :, :0]}, ValueError, "x"),
        ({"weight": None}, TypeError, "weight"),
        ({"weight": [1.0]}, TypeError, "weight"),
        ({"weight": torch.zeros(3, 3, 3)}, ValueError, "weight"),
        ({"weight": torch.zeros(3, 3, 3, 3)}, ValueError, "weight"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, ValueError, "weight"),
        ({"weight": WEIGHT.int()}, TypeError, "weight"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight"),
        ({"bias": 1.0}, TypeError, "bias"),
        ({"bias": torch.zeros(4)}, ValueError, "bias"),
        ({"bias": BIAS.bool()}, TypeError, "bias"),
        ({"bias": BIAS.to("meta")}, ValueError, "bias"),
        ({"x_bias": torch.zeros(4)}, ValueError, "x_bias"),
        ({"x_bias": 1.0}, TypeError, "x_bias"),
        ({"x_bias": torch.zeros(4)}, ValueError, "x_bias"),
        ({"x_bias": 1.0}, TypeError, "x_bias"),
        ({"gelu": "exact"}, TypeError, "gelu"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"backend": 1}, TypeError, "backend"),
    ],
)
def test_wrong_input(arguments: dict[str, Any], error: type[Exception], name: str, backend: str) -> None:
    given = {"x": X, "weight": WEIGHT, "bias": BIAS, "gelu": True, "backend": backend, **arguments}
    assert_refused(lambda: residual_depthwise(**given), error, name)
