"""The package's functions on drawn arguments, right and wrong: the reference's numbers, or one error that names what.

Numbers are held to the reference in float64 on plain copies; the kernels' own tests hold them to much less.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stvit
from stvit import Association, functional
from stvit.backends.dispatch import interpreting
from tests.support.cases import LAYOUTS, PHASES

TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4, torch.float64: 1e-9}
Function = Callable[..., Any]
FUNCTIONS: dict[str, Function] = {
    "super_token_sampling": stvit.super_token_sampling,
    "token_upsampling": stvit.token_upsampling,
    **{
        name: getattr(functional, name)
        for name in (
            "residual_depthwise",
            "channel_layer_norm",
            "channel_layer_norm_and_skip",
            "multi_head_attention",
            "residual_branch",
        )
    },
}


class Call(NamedTuple):
    """A function's name, its arguments, and the names of those that were replaced by something drawn without sense."""

    function: str
    arguments: dict[str, Any]
    replaced: tuple[str, ...] = ()


def negated(x: Tensor) -> Tensor:
    """A view whose sign is turned when it is read: the memory holds -x."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def no_values(x: Tensor) -> Tensor:
    """Zeros without memory, as derivatives in forward mode are."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


VIEWS = {**LAYOUTS, "negated": negated, "no values": no_values}


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of this shape, in a drawn memory layout where it is pixels; rarely with a NaN, or with a gradient.

    No NaN in a 3 x 3 weight: libraries differ in whether they multiply it by the padding. None in tokens (B, N, 3C):
    PyTorch's fused attention answers 0 for a query that is NaN, on a CPU.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator).to(dtype)
    if x.numel() and shape[1:] != (1, 3, 3) and len(shape) != 3 and draw(st.integers(0, 9)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = torch.nan
    if x.dim() == 4:
        kinds = sorted(VIEWS) if dtype in (torch.float32, torch.float64) else sorted(LAYOUTS)
        x = VIEWS[draw(st.sampled_from(kinds))](x)
    return x.requires_grad_() if x.is_leaf and draw(st.booleans()) else x


sides = st.integers(1, 5)


@st.composite
def right_calls(draw: st.DrawFn) -> Call:
    """A call that makes sense, on the CPU. Triton's interpreter gets small pixels, and no bfloat16, which it rounds."""
    name = draw(st.sampled_from(sorted(FUNCTIONS)))
    backend = draw(st.sampled_from(["auto"] * 6 + ["reference"] * 3 + ["triton"] * interpreting()))
    dtypes = list(TOLERANCE) if backend != "triton" else [torch.float32, torch.float64]
    dtype = draw(st.sampled_from(dtypes))
    batch, channels = draw(st.integers(0, 2)), draw(st.sampled_from([1, 2, 3, 6]))
    size = (draw(sides), draw(sides)) if backend == "triton" else (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    x = (batch, channels, *size)

    def tensor(*shape: int) -> Tensor:
        return draw(tensors(shape, dtype))

    def maybe(*shape: int) -> Tensor | None:
        return tensor(*shape) if draw(st.booleans()) else None

    if name == "multi_head_attention":
        heads = draw(st.sampled_from([heads for heads in (1, 2, 3) if channels % heads == 0]))
        arguments = {"tokens": draw(tensors((batch, size[0], 3 * channels), dtype)), "num_heads": heads, "scale": 0.4}
        return Call(name, arguments)
    arguments = {"backend": backend}
    if name == "super_token_sampling":
        tile: Any = (draw(sides), draw(sides)) if draw(st.booleans()) else draw(sides)
        arguments |= {"x": tensor(*x), "stoken_size": tile, "n_iter": draw(st.integers(1, 2))}
        arguments |= {"scale": draw(st.none() | st.floats(-2, 2)), "association_grad": draw(st.booleans())}
    elif name == "token_upsampling":
        tile = (draw(sides), draw(sides))
        grid = (-(-size[0] // tile[0]), -(-size[1] // tile[1]))
        association = Association(tensor(batch, 9, *size), tensor(batch, 1, *grid), tile, draw(st.booleans()))
        arguments |= {"stokens": tensor(batch, channels, *grid), "association": association, "residual": maybe(*x)}
    elif name == "residual_depthwise":
        arguments |= {"x": tensor(*x), "weight": tensor(channels, 1, 3, 3), "bias": maybe(channels)}
        arguments |= {"gelu": draw(st.booleans()), "x_bias": maybe(channels)}
    elif name == "residual_branch":
        arguments |= {"x": tensor(*x), "y": tensor(*x), "gamma": maybe(channels), "bias": maybe(channels)}
        arguments |= {"keep": maybe(batch)}
    else:
        arguments |= {"x": tensor(*x), "weight": tensor(channels), "bias": tensor(channels), "eps": 1e-5}
    return Call(name, arguments)


def sparse(_: Any) -> Tensor:
    return torch.eye(4)[None, None].to_sparse()


def nested(_: Any) -> Tensor:
    return torch.nested.nested_tensor([torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)])


def with_field(field: str, value: Any) -> Callable[[Any], Any]:
    return lambda old: old._replace(**{field: value}) if isinstance(old, Association) else value


def of_tensor(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    return lambda old: change(old.detach()) if isinstance(old, Tensor) else change(torch.zeros(1, 2, 3, 3))


NUMBERS = (0, -1, 1, 7, 2**31, 2**63, 10**30, 10**400, -(10**400), 1.5, float("nan"), float("inf"), True, 3 + 1j)
VALUES = (
    *NUMBERS, None, "", "cuda", "no such\nbackend", b"auto", [], [1], (2, 2), (1, 2, 3), (0, 3), (1 << 40, 1), {},
    object(), Tensor, slice(3), np.int64(2), np.float32(0.5), np.array(2), np.array([2, 3]), torch.Size((2, 2)),
    torch.tensor(2), torch.tensor(True), torch.tensor([1, 2]), torch.tensor(2, device="meta"),
)  # fmt: skip
CHANGES: list[Callable[[Any], Any]] = [
    *(lambda old, value=value: value for value in VALUES),
    *(of_tensor(lambda x, dtype=dtype: x.to(dtype)) for dtype in (*TOLERANCE, torch.int64, torch.bool, torch.cfloat)),
    *(of_tensor(lambda x, dtype=dtype: x.to(dtype)) for dtype in (torch.float8_e4m3fn, torch.complex32)),
    of_tensor(lambda x: x.to("meta")),
    of_tensor(lambda x: x[None]),
    of_tensor(lambda x: x[0] if x.dim() and len(x) else x.flatten()),
    of_tensor(lambda x: x[..., :0]),
    of_tensor(lambda x: torch.cat([x, x], -1)),
    of_tensor(lambda x: x.tolist()),
    of_tensor(lambda x: x.numpy() if x.dtype not in (torch.bfloat16,) else None),
    of_tensor(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 3, torch.quint8)),
    of_tensor(lambda x: x.float().contiguous().to_mkldnn() if x.dim() == 4 and x.numel() else None),
    sparse,
    nested,
    *(with_field(field, value) for field in Association._fields for value in (None, 0, "x", (0, 2), 2**40)),
    *(with_field("weights", make(None)) for make in (sparse, nested)),
    with_field("weights", torch.zeros(1, 9, 2, 2, device="meta")),
]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Right ones, and more often ones of which an argument or two are something else."""
    call = draw(right_calls())
    names = sorted(call.arguments)
    replaced = tuple(draw(st.lists(st.sampled_from(names), unique=True, max_size=2)))
    arguments = dict(call.arguments)
    for name in replaced:
        arguments[name] = draw(st.sampled_from(CHANGES))(arguments[name])
    return Call(call.function, arguments, replaced)


def plain(value: Any) -> Any:
    """What the truth is computed from: tensors in float64, contiguous, with their values in memory."""
    if isinstance(value, Association):
        return Association(*map(plain, value))
    if isinstance(value, Tensor) and value.dim():
        return value.detach().clone(memory_format=torch.contiguous_format).double()
    return value


def outputs(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else (result,)
    return [tensor for part in parts for tensor in (part[:2] if isinstance(part, Association) else (part,))]


def assert_right(call: Call, result: Any) -> None:
    given = {name: plain(value) for name, value in call.arguments.items()}
    if "backend" in given:
        given["backend"] = "reference"
    for found, expected in zip(outputs(result), outputs(FUNCTIONS[call.function](**given)), strict=True):
        assert found.shape == expected.shape and found.device == expected.device
        if not found.is_meta:
            tolerance = max(TOLERANCE[found.dtype], *(TOLERANCE[dtype] for dtype in dtypes(call.arguments.values())))
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=4 * tolerance, equal_nan=True)


def dtypes(values: Any) -> list[torch.dtype]:
    found = []
    for value in values:
        if isinstance(value, Association):
            found += dtypes(value)
        elif isinstance(value, Tensor) and value.dtype in TOLERANCE:
            found.append(value.dtype)
    return found


def assert_named(call: Call, error: Exception) -> None:
    """One line that begins with an argument's name, or with the backend that can't run."""
    text = str(error)
    names = "|".join(inspect.signature(FUNCTIONS[call.function]).parameters)
    known = rf"^({names})(\.\w+)?: expected " if type(error) in (TypeError, ValueError) else "^backend='.*' can't run: "
    assert re.match(known, text) and len(text.splitlines()) == 1, repr(error)


@settings(max_examples=100, phases=PHASES)
@given(call=calls())
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Casting complex values")
def test_functions_answer_rightly_or_name_the_argument(call: Call) -> None:
    try:
        result = FUNCTIONS[call.function](**call.arguments)
    except Exception as error:
        assert call.replaced, f"a right call raised {error!r}"
        assert_named(call, error)
    else:
        assert_right(call, result)
