"""The kernels of a branch's end against float64 truth: LayerScale, drop-path, residual, and every gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stvit import reference
from stvit.functional import residual_branch
from stvit.kernels import residual_branch as kernels
from stvit.tensors import is_channels_last, memory_format
from tests.support.block_cases import Pixels, Results, assert_refused, check, drawn_pixels, ids, leaf, saving
from tests.support.cases import DOUBLE, DTYPES, HALF, LAST, LAYOUTS, SINGLE, SLICED, SLICED_LAST, far_apart


class Case(NamedTuple):
    """One call. The stream x may be wider than the branch y, as under autocast, and laid out otherwise. elements:
    numbers that a program holds at a time; programs: how many the backward has; None: as the kernels have it."""

    pixels: Pixels
    gamma: bool = True
    keep: bool = True
    stream: torch.dtype | None = None
    stream_layout: str | None = None
    elements: int | None = None
    programs: int | None = None
    bias: bool = False

    def tensors(self, device: str) -> dict[str, Tensor]:
        """x, y, and gamma and bias where there are any."""
        pixels = self.pixels
        x = pixels.pixels(0, device).to(self.stream or pixels.dtype)
        tensors = {"x": LAYOUTS[self.stream_layout or pixels.layout](x), "y": pixels.pixels(1, device)}
        parameters = {"gamma": self.gamma, "bias": self.bias}
        found = {name: pixels.parameter(i, device, pixels.channels) for i, name in enumerate(parameters)}
        return tensors | {name: found[name] for name, wanted in parameters.items() if wanted}

    def factors(self, device: str) -> Tensor | None:
        """keep: dropped, kept and scaled, kept; and so on."""
        factors = [(0.0, 1 / 0.7, 1.0)[image % 3] for image in range(self.pixels.batch)]
        return torch.tensor(factors, dtype=self.pixels.dtype, device=device) if self.keep else None

    def grad(self, device: str, dtype: torch.dtype) -> Tensor:
        return self.pixels.pixels(2, device, dtype, self.pixels.grad_layout)


def compute(case: Case, device: str, backend: str, dtype: torch.dtype) -> Results:
    """out and every gradient, computed in `dtype` where the case has its own."""
    wide = dtype == DOUBLE
    tensors, keep = case.tensors(device), case.factors(device)
    leaves = {name: leaf(tensor, DOUBLE if wide else tensor.dtype) for name, tensor in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ELEMENTS", case.elements or kernels.ELEMENTS)
        patch.setattr(kernels, "PROGRAMS", case.programs or kernels.PROGRAMS)
        keep = keep.double() if wide and keep is not None else keep
        out = residual_branch(leaves["x"], leaves["y"], leaves.get("gamma"), keep, backend, bias=leaves.get("bias"))
        if backend == "triton" and (case.gamma or case.keep or case.bias):
            assert out.is_contiguous(memory_format=memory_format(is_channels_last(leaves["x"])))
        grads = torch.autograd.grad(out, list(leaves.values()), case.grad(device, out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def terms(case: Case, device: str) -> Results:
    """The same of absolute values: nothing cancels."""
    tensors, keep = case.tensors(device), case.factors(device)
    leaves = {name: tensor.double().abs().requires_grad_() for name, tensor in tensors.items()}
    keep = None if keep is None else keep.double()
    out = reference.residual_branch(leaves["x"], leaves["y"], leaves.get("gamma"), keep, leaves.get("bias"))
    grads = torch.autograd.grad(out, list(leaves.values()), case.grad(device, DOUBLE).abs())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check_case(case: Case, device: str) -> None:
    check(lambda backend, dtype: compute(case, device, backend, dtype), case.pixels.dtype, terms(case, device))


ENDS = [(True, True), (True, False), (False, True), (False, False)]  # gamma, keep
LISTED = [
    *(Case(Pixels(3, 64, 3, 6, dtype, LAST, LAST), *end) for dtype in DTYPES for end in ENDS),
    # A stream in float32 with a branch in half precision, and LayerScale in float32, which widens the stream.
    *(Case(Pixels(2, 96, 5, 4, HALF, LAST, LAST, SINGLE), *end, SINGLE) for end in ENDS),
    Case(Pixels(2, 96, 5, 4, HALF, LAST, LAST, SINGLE)),
    Case(Pixels(2, 40, 5, 4, SINGLE, LAST, LAST, HALF), stream=HALF),
    Case(Pixels(1, 40, 3, 3, SINGLE, LAST, LAST), stream=DOUBLE),
    Case(Pixels(1, 640, 4, 5, HALF, LAST, LAST)),  # several blocks of channels, the last one part empty
    Case(Pixels(2, 300, 5, 6, SINGLE, LAST, LAST), keep=False),
    Case(Pixels(2, 300, 2, 3, SINGLE, LAST, LAST), gamma=False),
    Case(Pixels(2, 200, 1, 9, HALF, LAST, SLICED_LAST)),  # one row
    Case(Pixels(2, 90, 6, 1, SINGLE, SLICED_LAST, LAST)),  # one column
    Case(Pixels(2, 40, 3, 6, DOUBLE, SLICED, "transposed")),
    Case(Pixels(3, 3, 5, 7, SINGLE, SLICED, SLICED, seed=1)),
    Case(Pixels(2, 3, 5, 7, HALF, "transposed", SLICED_LAST, SINGLE)),
    Case(Pixels(2, 3, 4, 6, SINGLE, "expanded", "expanded")),
    Case(Pixels(2, 3, 4, 6, SINGLE, LAST, LAST), stream_layout="contiguous"),
    Case(Pixels(2, 3, 4, 6, SINGLE, "contiguous", "expanded"), gamma=False, stream_layout=LAST),
    Case(Pixels(2, 1, 4, 5, SINGLE, LAST, "expanded")),
    Case(Pixels(1, 3, 1, 1, HALF, LAST, LAST)),
    # Several blocks of pixels a program in the backward; the last one has fewer, and the last block is not full.
    *(Case(Pixels(2, 5, 7, 9, dtype, LAST, LAST), elements=32, programs=3) for dtype in DTYPES),
    Case(Pixels(3, 20, 5, 5, SINGLE), elements=64, programs=1),
    Case(Pixels(2, 300, 3, 3, DOUBLE, LAST), keep=False, elements=256, programs=4),
    # With the bias of the convolution that y comes from.
    *(Case(Pixels(3, 20, 3, 6, dtype, LAST, LAST), *end, bias=True) for dtype in DTYPES for end in ENDS),
    Case(Pixels(2, 96, 5, 4, HALF, LAST, LAST, SINGLE), stream=SINGLE, elements=64, programs=2, bias=True),
    Case(Pixels(0, 3, 5, 7, HALF, LAST, LAST), bias=True),  # no images
    Case(Pixels(0, 3, 5, 7, SINGLE), gamma=False),
    Case(Pixels(2, 40, 9, 7, torch.bfloat16, LAST, LAST, SINGLE), stream=SINGLE),
]
LISTED = [case for case in LISTED if case.pixels.dtype in DTYPES]


@pytest.mark.parametrize("case", LISTED, ids=ids)
def test_listed_cases(case: Case, device: str) -> None:
    check_case(case, device)


@given(
    case=st.builds(
        Case,
        drawn_pixels(),
        st.booleans(),
        st.booleans(),
        st.none() | st.sampled_from(DTYPES),
        st.none() | st.sampled_from(sorted(LAYOUTS)),
        st.sampled_from([None, 256, 512]),
        st.none() | st.integers(1, 5),
    )
)
@settings(max_examples=20)
def test_drawn_cases(case: Case, device: str) -> None:
    check_case(case, device)


@pytest.mark.parametrize(("gamma", "keep"), ENDS)
def test_gradient_is_true(gamma: bool, keep: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ELEMENTS", 32)  # two pixels
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    shapes = [(2, 3, 3, 2), (2, 3, 3, 2), (3,)][: 2 + gamma]
    inputs = [torch.randn(shape, dtype=DOUBLE, device=device, requires_grad=True) for shape in shapes]
    factors = torch.tensor([0.0, 1.25], dtype=DOUBLE, device=device) if keep else None

    def function(x: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
        return residual_branch(x, y, scale, factors, "triton")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, atol=1e-7, rtol=1e-6)


def test_results_repeat_bit_for_bit(device: str) -> None:
    case = Case(Pixels(2, 300, 5, 6, HALF, LAST, LAST, SINGLE), programs=3)
    first, second = (compute(case, device, "triton", HALF) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, for inf - inf and 0 * inf
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "y", "grad", "gamma"])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, where: str, device: str) -> None:
    """A branch that is dropped is multiplied by 0, which leaves NaN and infinity visible, as in the reference."""
    for keep in (None, torch.tensor([1.25, 0.0], device=device)):
        results = []
        for backend in ("triton", "reference"):
            pixels = Pixels(2, 3, 3, 4, SINGLE, LAST, LAST)
            tensors = {name: pixels.pixels(i, device) for i, name in enumerate(("x", "y", "grad"))}
            tensors["gamma"] = pixels.parameter(0, device, 3)
            tensors[where][(2,) if where == "gamma" else (1, 2, 2, 1)] = value
            inputs = [leaf(tensors[name], SINGLE) for name in ("x", "y", "gamma")]
            out = residual_branch(*inputs, keep, backend)
            results.append([out.detach(), *torch.autograd.grad(out, inputs, tensors["grad"])])
        for name, found, expected in zip(("out", "x", "y", "gamma"), *results, strict=True):
            close = {"equal_nan": True, "rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(found, expected, **close, msg=lambda text, name=name: f"{name}: {text}")
        assert any(not found.isfinite().all() for found in results[0])


@pytest.mark.parametrize(("gamma", "keep"), ENDS)
def test_the_branch_is_saved_for_layerscale_only(gamma: bool, keep: bool, device: str) -> None:
    x, y = (torch.randn(2, 3, 4, 5, device=device, requires_grad=True) for _ in range(2))
    scale = torch.randn(3, device=device, requires_grad=True) if gamma else None
    factors = torch.ones(2, device=device) if keep else None
    with saving() as saved:
        out = residual_branch(x, y, scale, factors, "triton")
    assert out.requires_grad
    expected = [y] * gamma + [tensor for tensor in (scale, factors) if tensor is not None]
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in expected}


@pytest.mark.parametrize("dimension", range(4), ids=["image", "channel", "row", "column"])
def test_offsets_beyond_two_to_the_31(dimension: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three entries 2**30 apart: the last one's offset doesn't fit 32 bits. The memory between is never touched."""
    shape = [1, 2, 2, 2]
    shape[dimension] = 3
    near = torch.randn(3, *shape, dtype=HALF, device=device)
    far = [far_apart(tensor, dimension, monkeypatch) for tensor in near]
    keep = torch.linspace(0.5, 1.5, shape[0], device=device, dtype=HALF)
    for gamma in (None, torch.randn(shape[1], dtype=HALF, device=device, requires_grad=True)):
        results = []
        for x, y, grad in (near, far):
            leaves = [x.detach().requires_grad_(), y.detach().requires_grad_()] + ([] if gamma is None else [gamma])
            out = residual_branch(leaves[0], leaves[1], gamma, keep, "triton")
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
        for found, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(found, expected)


def test_without_layerscale_and_drop_path_no_kernel_runs(device: str) -> None:
    x = torch.randn(1, 2, 3, 3, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "residual_branch", None)
        assert torch.equal(residual_branch(x, x, backend="triton"), 2 * x)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("keep_dtype", [HALF, SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize(("x", "y", "gamma", "expected"), [
    (HALF, HALF, None, HALF), (SINGLE, HALF, None, SINGLE), (HALF, SINGLE, None, SINGLE), (HALF, HALF, SINGLE, SINGLE),
    (SINGLE, HALF, DOUBLE, DOUBLE),
], ids=str)  # fmt: skip
def test_dtype_is_that_of_x_y_and_gamma(
    x: torch.dtype, y: torch.dtype, gamma: torch.dtype | None, expected: torch.dtype, keep_dtype: torch.dtype,
    backend: str, device: str,
) -> None:  # fmt: skip
    """keep takes no part in it and gets no gradient. Each other gradient has the dtype of what it belongs to."""
    tensors = [torch.randn(1, 2, 2, 2, device=device, dtype=dtype, requires_grad=True) for dtype in (x, y)]
    scale = None if gamma is None else torch.randn(2, device=device, dtype=gamma, requires_grad=True)
    keep = torch.ones(1, device=device, dtype=keep_dtype, requires_grad=True)
    out = residual_branch(*tensors, scale, keep, backend)
    assert out.dtype == expected
    out.sum().backward()
    assert [tensor.grad.dtype for tensor in tensors] == [x, y] and keep.grad is None
    assert scale is None or scale.grad.dtype == gamma


X, GAMMA, KEEP = torch.zeros(2, 3, 4, 5), torch.zeros(3), torch.zeros(2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        *(
            ({name: value}, error, name)
            for name in ("x", "y")
            for value, error in [
                (None, TypeError),
                ([1.0], TypeError),
                (X[0], ValueError),
                (X.int(), TypeError),
                (X[:, :, :0], ValueError),
            ]
        ),
        ({"y": X[:1]}, ValueError, "y"),  # nothing is broadcast
        ({"y": X[:, :1]}, ValueError, "y"),
        ({"y": X.to("meta")}, ValueError, "y"),
        *(
            ({name: value}, error, name)
            for name, good in (("gamma", GAMMA), ("keep", KEEP))
            for value, error in [
                (1.0, TypeError),
                (torch.zeros(4), ValueError),
                (good.view(1, -1, 1, 1), ValueError),
                (good.int(), TypeError),
                (good.to("meta"), ValueError),
            ]
        ),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
)
def test_wrong_input(arguments: dict[str, Any], error: type[Exception], name: str, backend: str) -> None:
    given = {"x": X, "y": X, "gamma": GAMMA, "keep": KEEP, "backend": backend, **arguments}
    assert_refused(lambda: residual_branch(**given), error, name)
