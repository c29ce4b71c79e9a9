"""The kernels of LayerNorm over channels against float64 truth: outputs and every gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stvit.functional import channel_layer_norm, channel_layer_norm_and_skip
from stvit.kernels import channel_layer_norm as kernels
from stvit.tensors import is_channels_last, memory_format
from tests.support.block_cases import Pixels, Results, assert_refused, check, drawn_pixels, ids, leaf, saving
from tests.support.cases import DOUBLE, DTYPES, HALF, LAST, SINGLE, SLICED, SLICED_LAST, assert_within_twice, far_apart


class Case(NamedTuple):
    """One call; x has this mean, and with `skip` is used for a skip connection too.

    elements: numbers that a program holds at a time; programs: how many programs the backward has, at most; None: as
    the kernels have it.
    """

    pixels: Pixels
    mean: float = 0.0
    elements: int | None = None
    programs: int | None = None
    skip: bool = False

    def tensors(self, device: str) -> list[Tensor]:
        """x, weight and bias."""
        x = self.pixels.pixels(0, device)
        parameters = [self.pixels.parameter(which, device, self.pixels.channels) for which in range(2)]
        return [x + self.mean if self.mean else x, *parameters]

    def grads(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Of y, and of x through the skip connection, laid out as x is."""
        layouts = (self.pixels.grad_layout, self.pixels.layout)[: 1 + self.skip]
        return [self.pixels.pixels(1 + which, device, dtype, layout) for which, layout in enumerate(layouts)]


def compute(case: Case, device: str, backend: str, dtype: torch.dtype) -> Results:
    """y and every gradient in `dtype`. The reference takes its parameters in the dtype of x."""
    tensors = case.tensors(device)
    x, *parameters = leaves = [leaf(tensor, DOUBLE if dtype == DOUBLE else tensor.dtype) for tensor in tensors]
    weight, bias = parameters if backend == "triton" else (parameter.to(dtype) for parameter in parameters)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ELEMENTS", case.elements or kernels.ELEMENTS)
        patch.setattr(kernels, "PROGRAMS", case.programs or kernels.PROGRAMS)
        norm = channel_layer_norm_and_skip if case.skip else channel_layer_norm
        outputs = norm(x, weight, bias, 1e-6, backend)
        y, *skip = outputs if case.skip else (outputs,)
        assert y.is_contiguous(memory_format=memory_format(is_channels_last(x)))
        assert all(torch.equal(same, x) for same in skip)
        grads = torch.autograd.grad((y, *skip), leaves, case.grads(device, dtype))
    return dict(zip(("y", "x", "weight", "bias"), (y.detach(), *grads), strict=True))


def terms(case: Case, device: str) -> Results:
    """Absolute values of what is summed: with few channels little is left of it in dx. Centring an x whose mean is n
    times its deviation multiplies its rounding by n."""
    x, weight, bias = (tensor.double() for tensor in case.tensors(device))
    grad, *skip = case.grads(device, DOUBLE)
    centred = x - x.mean(1, keepdim=True)
    rstd = (centred.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    weight, bias, rounding = weight[:, None, None], bias[:, None, None], 1 + x.mean(1, keepdim=True).abs() * rstd
    summed = {"weight": grad * centred * rstd * rounding, "bias": grad}
    results = {"y": weight * centred * rstd * rounding + bias, "x": grad * weight * rstd * rounding}
    if skip:
        results["x"] = results["x"].abs() + skip[0].abs()
    results.update({name: value.abs().sum((0, 2, 3)) for name, value in summed.items()})
    return {name: value.abs() for name, value in results.items()}


def check_case(case: Case, device: str) -> None:
    check(lambda backend, dtype: compute(case, device, backend, dtype), case.pixels.dtype, terms(case, device))


LISTED = [
    Case(Pixels(2, 64, 7, 6, HALF, LAST, LAST)),
    Case(Pixels(1, 64, 8, 8, SINGLE, LAST, LAST)),
    Case(Pixels(2, 96, 5, 4, HALF, LAST, LAST, SINGLE)),  # parameters in float32, as under autocast
    Case(Pixels(1, 96, 5, 9, SINGLE, LAST, LAST, HALF)),
    Case(Pixels(1, 640, 4, 5, HALF, LAST, LAST)),  # 2 pixels a program
    Case(Pixels(1, 2560, 2, 3, SINGLE, LAST, LAST)),  # 1 pixel a program
    Case(Pixels(1, 300, 5, 6, SINGLE, LAST, LAST)),
    Case(Pixels(1, 200, 1, 9, HALF, LAST, SLICED_LAST)),  # one row
    Case(Pixels(2, 90, 6, 1, SINGLE, SLICED_LAST, LAST)),  # one column
    Case(Pixels(1, 40, 9, 7, DOUBLE, LAST, LAST)),
    Case(Pixels(1, 40, 1, 6, DOUBLE, SLICED, "transposed")),
    Case(Pixels(3, 3, 5, 7, SINGLE, SLICED, SLICED)),
    Case(Pixels(2, 3, 5, 7, HALF, "transposed", SLICED_LAST, SINGLE)),
    Case(Pixels(2, 3, 4, 6, SINGLE, "expanded", "expanded")),
    Case(Pixels(2, 1, 4, 5, SINGLE, LAST, "expanded")),  # one channel: y is the bias, dx is 0
    *(Case(Pixels(1, 3, 1, 1, dtype, LAST, LAST)) for dtype in DTYPES),
    Case(Pixels(1, 1, 33, 65, HALF)),  # more pixels than a program holds
    # Several blocks of pixels a program in the backward; the last one has fewer, and the last block is not full.
    *(Case(Pixels(2, 5, 7, 9, dtype, LAST, LAST), elements=32, programs=3) for dtype in DTYPES),
    Case(Pixels(3, 20, 5, 5, SINGLE), elements=64, programs=1),
    Case(Pixels(1, 20, 3, 2, DOUBLE, LAST), elements=32, programs=5),
    Case(Pixels(1, 64, 9, 8, SINGLE, LAST, LAST), mean=100.0),
    Case(Pixels(1, 200, 9, 8, SINGLE, LAST, LAST), mean=100.0),
    # With the gradient of a skip connection.
    *(Case(Pixels(2, 64, 5, 4, dtype, LAST, LAST), skip=True) for dtype in DTYPES),
    Case(Pixels(2, 96, 5, 4, HALF, LAST, LAST, SINGLE), skip=True),
    Case(Pixels(2, 5, 7, 9, SINGLE, SLICED, LAST), elements=32, programs=3, skip=True),
    Case(Pixels(1, 300, 2, 5, SINGLE, SLICED_LAST, "expanded"), skip=True),
    Case(Pixels(2, 3, 4, 6, HALF, "expanded", LAST), skip=True),
    Case(Pixels(0, 3, 5, 7, SINGLE, LAST, LAST), skip=True),
    Case(Pixels(0, 3, 5, 7, HALF, LAST, LAST)),  # no images
    Case(Pixels(0, 70, 2, 2, SINGLE), programs=1),
    Case(Pixels(1, 40, 9, 7, torch.bfloat16, LAST, LAST, SINGLE)),
    Case(Pixels(2, 300, 5, 6, torch.bfloat16, LAST, LAST)),
]
LISTED = [case for case in LISTED if case.pixels.dtype in DTYPES]


@pytest.mark.parametrize("case", LISTED, ids=ids)
def test_listed_cases(case: Case, device: str) -> None:
    check_case(case, device)


@given(
    case=st.builds(
        Case,
        drawn_pixels(),
        st.just(0.0),
        st.sampled_from([None, 512, 1024]),
        st.none() | st.integers(1, 5),
        st.booleans(),
    )
)
@settings(max_examples=20)
def test_drawn_cases(case: Case, device: str) -> None:
    check_case(case, device)


def test_y_is_normal_along_channels(device: str) -> None:
    """The formula, apart from PyTorch's layer_norm; eps counts where the variance is small."""
    for scale, eps in ((1.0, 1e-6), (1e-3, 1e-6), (1.0, 0.5), (0.0, 1e-6)):
        x = scale * torch.randn(2, 5, 3, 4, dtype=DOUBLE, device=device)
        weight, bias = torch.randn(2, 5, dtype=DOUBLE, device=device)
        y = channel_layer_norm(x, weight, bias, eps, "triton")
        centred = x - x.mean(1, keepdim=True)
        expected = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
        expected = expected * weight[:, None, None] + bias[:, None, None]
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mean", [100.0, -1000.0])
def test_a_large_mean_costs_no_more_than_its_rounding(mean: float, device: str) -> None:
    """The variance is that of centred numbers: E x**2 - (E x)**2 would lose all of it at a mean of 4096 already."""
    x = (mean + torch.randn(2, 64, 6, 5, device=device)).requires_grad_()
    ones = torch.ones(64, device=device)
    y = channel_layer_norm(x, ones, 0 * ones, 1e-6, "triton")
    grad = torch.randn(y.shape, device=device)
    (dx,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_()
    y_exact = channel_layer_norm(wide, ones.double(), 0 * ones.double(), 1e-6, "reference")
    (dx_exact,) = torch.autograd.grad(y_exact, wide, grad.double())
    step = abs(mean) * torch.finfo(SINGLE).eps  # the distance between two float32 numbers of that size, at most
    torch.testing.assert_close(y.double(), y_exact, rtol=1e-6, atol=step)
    torch.testing.assert_close(dx.double(), dx_exact, rtol=1e-6, atol=4 * step)


def test_gradient_is_true(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ELEMENTS", 8)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    shapes = [(2, 3, 3, 2), (3,), (3,)]
    inputs = [torch.randn(shape, dtype=DOUBLE, device=device, requires_grad=True) for shape in shapes]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return channel_layer_norm(x, weight, bias, 1e-3, "triton")

    def and_skip(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return channel_layer_norm_and_skip(x, weight, bias, 1e-3, "triton")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-7, rtol=1e-6)
    assert torch.autograd.gradcheck(and_skip, inputs, fast_mode=True, atol=1e-7, rtol=1e-6)


def test_results_repeat_bit_for_bit(device: str) -> None:
    case = Case(Pixels(2, 300, 5, 6, HALF, LAST, LAST, SINGLE), programs=3)
    first, second = (compute(case, device, "triton", HALF) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_either_output_may_go_unused(backend: str, device: str) -> None:
    """The skip connection is x itself: nothing is copied, and the gradient of each alone is what it is without."""
    x = torch.randn(2, 5, 3, 4, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(2, 5, device=device)
    grad = torch.randn_like(x)
    y, skip = channel_layer_norm_and_skip(x, weight, bias, 1e-6, backend)
    assert skip.data_ptr() == x.data_ptr() and skip.stride() == x.stride()
    assert torch.equal(torch.autograd.grad(skip, x, grad, retain_graph=True)[0], grad)
    expected = channel_layer_norm(x, weight, bias, 1e-6, backend)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, x, grad)[0]
    assert torch.equal(found, torch.autograd.grad(expected, x, grad)[0])
    with torch.no_grad():
        y, skip = channel_layer_norm_and_skip(x, weight, bias, 1e-6, backend)
    assert torch.equal(y, expected) and torch.equal(skip, x)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, for inf - inf and 0 * inf
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "grad"])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, where: str, device: str) -> None:
    """Over the channels of their own pixel, and into the sums over pixels."""
    pixels = Pixels(2, 5, 3, 4, SINGLE, LAST, LAST)
    results = []
    for backend in ("triton", "reference"):
        tensors = {"x": pixels.pixels(0, device), "grad": pixels.pixels(1, device)}
        tensors[where][1, 3, 2, 1] = value
        parameters = [pixels.parameter(which, device, 5) for which in range(2)]
        inputs = [leaf(tensor, SINGLE) for tensor in (tensors["x"], *parameters)]
        y = channel_layer_norm(*inputs, 1e-6, backend)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, tensors["grad"])])
    for name, found, expected in zip(("y", "x", "weight", "bias"), *results, strict=True):
        finite = expected.isfinite()  # whether inf - inf or inf comes of an infinity hangs on the order of sums
        assert torch.equal(found.isfinite(), finite), name
        torch.testing.assert_close(found[finite], expected[finite], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)
    y, dx, dw, db = results[0]
    assert dx.isfinite().all(1).sum() == 23 and not dx[1, :, 2, 1].isfinite().any()
    assert y.isfinite().all(1).sum() == (23 if where == "x" else 24) and not dw.isfinite().all()


@pytest.mark.parametrize("norm", [channel_layer_norm, channel_layer_norm_and_skip])
def test_two_numbers_a_pixel_are_saved_beside_x(norm: Callable[..., Any], device: str) -> None:
    x = torch.randn(2, 5, 3, 4, dtype=HALF, device=device, requires_grad=True)
    weight, bias = (torch.randn(5, device=device, requires_grad=True) for _ in range(2))
    with saving() as saved:
        norm(x, weight, bias, 1e-6, "triton")
    others = [tensor for tensor in saved if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [(tensor.shape, tensor.dtype) for tensor in others] == [((2, 3, 4), SINGLE)] * 2
    mean, rstd = others
    wide = x.detach().double()
    torch.testing.assert_close(mean.double(), wide.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (wide.var(1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dimension", range(4), ids=["image", "channel", "row", "column"])
def test_offsets_beyond_two_to_the_31(dimension: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three entries 2**30 apart: the last one's offset doesn't fit 32 bits. The memory between is never touched."""
    shape = [1, 2, 2, 2]
    shape[dimension] = 3
    near, grad = torch.randn(2, *shape, dtype=HALF, device=device)
    weight, bias = torch.randn(2, shape[1], device=device)
    far, far_grad = (far_apart(tensor, dimension, monkeypatch) for tensor in (near, grad))
    results = []
    for x, dy in ((near, grad), (far, far_grad)):
        x = x.detach().requires_grad_()
        outputs = channel_layer_norm_and_skip(x, weight, bias, 1e-6, "triton")
        results.append((outputs[0], *torch.autograd.grad(outputs, x, (dy, dy))))
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE], ids=str)
def test_under_autocast_y_is_the_float32_result_rounded_once(dtype: torch.dtype, device: str) -> None:
    """PyTorch's layer_norm answers in float32 there; the branch behind it would start by casting that."""
    pixels = Pixels(2, 40, 5, 6, dtype, LAST, LAST, SINGLE)
    x, weight, bias = pixels.pixels(0, device), *(pixels.parameter(i, device, 40) for i in range(2))
    expected = channel_layer_norm(x.float() if dtype == HALF else x, weight, bias, 1e-6, "triton")
    expected = expected.to(DOUBLE if dtype == DOUBLE else HALF)  # float64 is not cast
    grad = pixels.pixels(1, device, expected.dtype)

    def results(backend: str, wanted: torch.dtype | None, enabled: bool = True) -> Results:
        inputs = [leaf(tensor, wanted or tensor.dtype) for tensor in (x, weight, bias)]
        with torch.autocast(device, HALF, enabled=enabled):
            y = channel_layer_norm(*inputs, 1e-6, backend)
        grads = torch.autograd.grad(y, inputs, grad.to(y.dtype))
        return dict(zip(("y", "x", "weight", "bias"), (y.detach(), *grads), strict=True))

    kernel, truth = results("triton", None), results("reference", DOUBLE, False)
    assert torch.equal(kernel["y"], expected) and kernel["y"].dtype == expected.dtype
    reference = truth if dtype == DOUBLE else results("reference", None)
    for name, found in kernel.items():
        torch.testing.assert_close(found.double(), truth[name], rtol=2 * torch.finfo(found.dtype).eps, atol=1e-5)
        if dtype != DOUBLE:
            assert_within_twice({name: found}, {name: reference[name]}, {name: truth[name]}, found.dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("x_dtype", [HALF, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE], ids=str)
def test_parameters_in_any_dtype(x_dtype: torch.dtype, dtype: torch.dtype, backend: str, device: str) -> None:
    """Each gradient comes in the dtype of what it belongs to."""
    x = torch.randn(1, 3, 2, 2, dtype=x_dtype, device=device, requires_grad=True)
    weight = torch.randn(3, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(3, dtype=HALF, device=device, requires_grad=True)
    y = channel_layer_norm(x, weight, bias, 1e-6, backend)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == x_dtype and weight.grad.dtype == dtype and bias.grad.dtype == HALF
    expected = channel_layer_norm(x.double(), weight.double(), bias.double(), 1e-6, "reference")
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=4e-3)


X, VECTOR = torch.zeros(2, 3, 4, 5), torch.zeros(3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"x": [1.0]}, TypeError, "x"),
        ({"x": X[0]}, ValueError, "x"),
        ({"x": X.int()}, TypeError, "x"),
        ({"x": X[..., :0]}, ValueError, "x"),
        *(
            ({name: value}, error, name)
            for name in ("weight", "bias")
            for value, error in [
                (None, TypeError),
                (1.0, TypeError),
                (torch.zeros(4), ValueError),
                (torch.zeros(3, 1), ValueError),
                (VECTOR.int(), TypeError),
                (VECTOR.to("meta"), ValueError),
            ]
        ),
        ({"eps": None}, TypeError, "eps"),
        ({"eps": "small"}, TypeError, "eps"),
        ({"eps": math.nan}, ValueError, "eps"),
        ({"eps": -1e-6}, ValueError, "eps"),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
)
def test_wrong_input(arguments: dict[str, Any], error: type[Exception], name: str, backend: str) -> None:
    given = {"x": X, "weight": VECTOR, "bias": VECTOR, "eps": 1e-6, "backend": backend, **arguments}
    for norm in (channel_layer_norm, channel_layer_norm_and_skip):
        assert_refused(lambda norm=norm: norm(**given), error, name)
