"""Tiles, grids, memory formats; and that bad input raises one error naming the argument, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from stvit import Association, checks, geometry, reference, super_token_sampling, tensors, token_upsampling
from stvit.backends import registry

BACKENDS = ["reference", "triton"]


@pytest.mark.parametrize(
    ("size", "tile", "grid"),
    [((8, 8), (4, 4), (2, 2)), ((9, 8), (4, 4), (3, 2)), ((1, 1), (1, 1), (1, 1)), ((3, 2), (4, 5), (1, 1)),
     ((56, 56), (8, 8), (7, 7)), ((5, 7), (2, 3), (3, 3))],
)  # fmt: skip
def test_grid_size(size: tuple[int, int], tile: tuple[int, int], grid: tuple[int, int]) -> None:
    assert geometry.grid_size(*size, tile) == grid


def test_memory_format_is_read_from_strides() -> None:
    last = torch.zeros(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    assert tensors.is_channels_last(last)
    assert tensors.is_channels_last(last[1:, 1:4, 1:, 2:])  # a slice
    assert not tensors.is_channels_last(last.contiguous())
    assert not tensors.is_channels_last(last.contiguous()[:, ::2, 1:])
    assert not tensors.is_channels_last(torch.zeros(2, 1, 4, 5))
    assert not tensors.is_channels_last(torch.zeros(2, 3, 1, 1))


def test_sums_are_wide() -> None:
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}
    for dtype in tensors.DTYPES:
        assert tensors.accumulator(dtype) == wide.get(dtype, torch.float64)


@pytest.mark.parametrize("value", [3, (3, 3), [3, 3], torch.Size((3, 3)), np.int64(3), (np.int32(3), 3)])
def test_stoken_sizes(value: object) -> None:
    assert checks.stoken_pair(value) == (3, 3)
    assert all(type(side) is int for side in checks.stoken_pair(value))


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries to both backends fail the test."""

    def ran(*arguments: object, **named: object) -> None:
        pytest.fail("a backend ran before the input was checked")

    for module, name in ((reference, "sampling"), (reference, "upsampling"), (registry, "kernels")):
        monkeypatch.setattr(module, name, ran)


def pixels(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*(shape or (2, 3, 4, 6)), dtype=dtype)


X = pixels()
# arguments of super_token_sampling, the error, the argument that it names, what it says was expected
SAMPLING = {
    "no tensor": ((X.tolist(), 2), TypeError, "x", "torch.Tensor"),
    "None": ((None, 2), TypeError, "x", "torch.Tensor"),
    "rank 3": ((X[0], 2), ValueError, "x", "4 dimensions"),
    "rank 5": ((X[None], 2), ValueError, "x", "4 dimensions"),
    "rank 0": ((torch.zeros(()), 2), ValueError, "x", "4 dimensions"),
    "int64": ((X.long(), 2), TypeError, "x", "float32"),
    "bool": ((X.bool(), 2), TypeError, "x", "float32"),
    "complex": ((X.cfloat(), 2), TypeError, "x", "float32"),
    "no channels": ((X[:, :0], 2), ValueError, "x", "at least one channel"),
    "no rows": ((X[:, :, :0], 2), ValueError, "x", "at least one"),
    "no columns": ((X[..., :0], 2), ValueError, "x", "at least one"),
    "tile 0": ((X, 0), ValueError, "stoken_size", "positive int"),
    "tile (2, 0)": ((X, (2, 0)), ValueError, "stoken_size", "positive int"),
    "tile -1": ((X, -1), ValueError, "stoken_size", "positive int"),
    "tile 2.0": ((X, 2.0), TypeError, "stoken_size", "positive int"),
    "tile (2, 2.0)": ((X, (2, 2.0)), TypeError, "stoken_size", "positive int"),
    "tile True": ((X, True), TypeError, "stoken_size", "positive int"),
    "tile (True, 2)": ((X, (True, 2)), TypeError, "stoken_size", "positive int"),
    "tile '2'": ((X, "2"), TypeError, "stoken_size", "positive int"),
    "tile None": ((X, None), TypeError, "stoken_size", "positive int"),
    "tile of three": ((X, (2, 2, 2)), ValueError, "stoken_size", "pair"),
    "tile of one": ((X, (2,)), ValueError, "stoken_size", "pair"),
    "tile of pairs": ((X, ((2, 2), 2)), TypeError, "stoken_size", "positive int"),
    "n_iter 0": ((X, 2, 0), ValueError, "n_iter", "positive int"),
    "n_iter -1": ((X, 2, -1), ValueError, "n_iter", "positive int"),
    "n_iter 1.0": ((X, 2, 1.0), TypeError, "n_iter", "positive int"),
    "n_iter True": ((X, 2, True), TypeError, "n_iter", "positive int"),
    "n_iter None": ((X, 2, None), TypeError, "n_iter", "positive int"),
    "scale '1'": ((X, 2, 1, "1"), TypeError, "scale", "float"),
    "scale True": ((X, 2, 1, True), TypeError, "scale", "float"),
    "scale a tensor": ((X, 2, 1, torch.tensor(0.5)), TypeError, "scale", "float"),
    "scale nan": ((X, 2, 1, float("nan")), ValueError, "scale", "finite"),
    "scale inf": ((X, 2, 1, float("inf")), ValueError, "scale", "finite"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("arguments", "error", "name", "expected"), SAMPLING.values(), ids=SAMPLING)
@pytest.mark.usefixtures("nothing_runs")
def test_bad_input_of_sampling(
    arguments: tuple[object, ...], error: type[Exception], name: str, expected: str, backend: str
) -> None:
    with pytest.raises(error, match=rf"^{re.escape(name)}: expected .*{re.escape(expected)}") as raised:
        super_token_sampling(*arguments, backend=backend)  # type: ignore[arg-type]
    assert type(raised.value) is error


def association(**changed: object) -> Association:
    """For pixels of (2, 3, 4, 6) and tiles of 2 x 3: a grid of 2 x 2."""
    right = Association(pixels(2, 9, 4, 6), pixels(2, 1, 2, 2), (2, 3), False)
    return right._replace(**changed)  # type: ignore[arg-type]


S = pixels(2, 3, 2, 2)
UPSAMPLING = {
    "no tensor": (lambda: (None, association()), TypeError, "stokens", "torch.Tensor"),
    "rank 3": (lambda: (S[0], association()), ValueError, "stokens", "4 dimensions"),
    "integers": (lambda: (S.long(), association()), TypeError, "stokens", "float32"),
    "no channels": (lambda: (S[:, :0], association()), ValueError, "stokens", "at least one channel"),
    "no association": (lambda: (S, None), TypeError, "association", "Association"),
    "a tuple": (lambda: (S, tuple(association())), TypeError, "association", "Association"),
    "other grid": (lambda: (pixels(2, 3, 2, 3), association()), ValueError, "stokens", "(2, 2, 2)"),
    "the pixels' grid": (lambda: (X, association()), ValueError, "stokens", "(2, 2, 2)"),
    "other batch": (lambda: (pixels(1, 3, 2, 2), association()), ValueError, "stokens", "(2, 2, 2)"),
    "other device": (lambda: (S.to("meta"), association()), ValueError, "stokens", "device"),
    "other dtype of weights": (
        lambda: (S, association(weights=pixels(2, 9, 4, 6).long())), TypeError, "association.weights", "float32"
    ),
    "eight weights": (
        lambda: (S, association(weights=pixels(2, 8, 4, 6))), ValueError, "association.weights", "(B, 9, H, W)"
    ),
    "weights of rank 3": (
        lambda: (S, association(weights=pixels(9, 4, 6))), ValueError, "association.weights", "4 dimensions"
    ),
    "weights of another batch": (
        lambda: (S, association(weights=pixels(3, 9, 4, 6))), ValueError, "stokens", "(3, 2, 2)"
    ),
    "weights of other pixels": (
        lambda: (S, association(weights=pixels(2, 9, 4, 7))), ValueError, "stokens", "(2, 2, 3)"
    ),
    "weights elsewhere": (
        lambda: (S, association(weights=pixels(2, 9, 4, 6).to("meta"))), ValueError, "stokens", "device"
    ),
    "mass of another grid": (
        lambda: (S, association(mass=pixels(2, 1, 2, 3))), ValueError, "association.mass", "(2, 2, 2)"
    ),
    "mass elsewhere": (
        lambda: (S, association(mass=pixels(2, 1, 2, 2).to("meta"))), ValueError, "association.mass", "device"
    ),
    "other tile": (lambda: (S, association(stoken_size=(2, 2))), ValueError, "stokens", "(2, 2, 3)"),
    "tile 0": (lambda: (S, association(stoken_size=0)), ValueError, "association.stoken_size", "positive int"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("arguments", "error", "name", "expected"), UPSAMPLING.values(), ids=UPSAMPLING)
@pytest.mark.usefixtures("nothing_runs")
def test_bad_input_of_upsampling(
    arguments: Callable[[], tuple[object, ...]], error: type[Exception], name: str, expected: str, backend: str
) -> None:
    with pytest.raises(error, match=rf"^{re.escape(name)}: expected .*{re.escape(expected)}") as raised:
        token_upsampling(*arguments(), backend=backend)  # type: ignore[arg-type]
    assert type(raised.value) is error


RESIDUAL = {
    "no tensor": (1.0, TypeError, "(2, 3, 4, 6)"),
    "integers": (X.long(), TypeError, "floating"),
    "other channels": (pixels(2, 4, 4, 6), ValueError, "(2, 3, 4, 6)"),
    "other size": (pixels(2, 3, 4, 7), ValueError, "(2, 3, 4, 6)"),
    "other batch": (pixels(1, 3, 4, 6), ValueError, "(2, 3, 4, 6)"),
    "elsewhere": (X.to("meta"), ValueError, "device"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("residual", "error", "expected"), RESIDUAL.values(), ids=RESIDUAL)
@pytest.mark.usefixtures("nothing_runs")
def test_bad_residual_of_upsampling(residual: object, error: type[Exception], expected: str, backend: str) -> None:
    with pytest.raises(error, match=rf"^residual: expected .*{re.escape(expected)}"):
        token_upsampling(S, association(), backend, residual=residual)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("backend", ["nothing", None])
def test_unknown_backends(backend: str) -> None:
    with pytest.raises((ValueError, TypeError), match="^backend: expected"):
        super_token_sampling(X, 2, backend=backend)
    with pytest.raises((ValueError, TypeError), match="^backend: expected"):
        token_upsampling(S, association(), backend)


def test_the_same_arguments_without_the_fault_are_right() -> None:
    """Otherwise the tests above could pass for another reason."""
    stokens, made = super_token_sampling(X, (2, 3), 1, 0.5, backend="reference")
    assert stokens.shape == S.shape and made.weights.shape == (2, 9, 4, 6) and made.mass.shape == (2, 1, 2, 2)
    assert token_upsampling(S, association(), "reference").shape == X.shape
