"""What the tests of the block's ops share: pixels listed and drawn, the comparison, what a call saves, wrong calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from stvit.backends import registry
from stvit.kernels import configs, residual_depthwise
from tests.support.cases import DTYPES, LAYOUTS, assert_within_twice

# Of a model of the four stages, tiles and joints of the published ones, a third of the work of `stvit_tiny` to Triton's
# interpreter.
NARROW: dict[str, Any] = {"embed_dim": (8, 12, 16, 24), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 3)}


class Pixels(NamedTuple):
    """Tensors of one call: x and its gradient are (batch, channels, height, width)."""

    batch: int
    channels: int
    height: int
    width: int
    dtype: torch.dtype = torch.float16
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    parameters: torch.dtype | None = None  # of weight, bias and gamma; None: dtype
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width

    def pixels(self, which: int, device: str, dtype: torch.dtype | None = None, layout: str | None = None) -> Tensor:
        """Noise in the shape of x; another for each `which`. Made in case.dtype, whatever dtype is asked for."""
        noise = self._noise(which, self.shape).to(device, self.dtype)
        return LAYOUTS[layout or self.layout](noise.to(dtype or self.dtype))

    def parameter(self, which: int, device: str, *shape: int) -> Tensor:
        return self._noise(1000 + which, shape).to(device, self.parameters or self.dtype)

    def _noise(self, which: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 10_000 * which))

    @property
    def name(self) -> str:
        parts = ["x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), self.layout, self.grad_layout]
        return "-".join(parts + [f"parameters {self.parameters}".replace("torch.", "")] * (self.parameters is not None))


def ids(case: object) -> str:
    """A listed case by its pixels and its other fields."""
    first, *others = case  # type: ignore[misc]
    return "-".join([first.name, *map(str, others)])


# A dimension is drawn from its small range unless it is among the few that a case makes large: the interpreter takes
# about 10 ms for each column of the depthwise walk.
SMALL = {"batch": (1, 2), "channels": (1, 6), "height": (1, 4), "width": (1, 4)}
LARGE = {"batch": (0, 3), "channels": (1, 300), "height": (1, 40), "width": (1, 24)}


@st.composite
def drawn_pixels(draw: st.DrawFn) -> Pixels:
    """Channels 1..300, height 1..40 and width 1..24, of which at most one is large, in every dtype and layout."""
    large = draw(st.none() | st.sampled_from(sorted(LARGE)))
    size = [draw(st.integers(*(LARGE if name == large else SMALL)[name])) for name in SMALL]
    return Pixels(
        *size,
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        grad_layout=draw(st.sampled_from(sorted(LAYOUTS))),
        parameters=draw(st.sampled_from([None, torch.float32])),
        seed=draw(st.integers(0, 2**16)),
    )


Results = dict[str, Tensor]


def check(compute: Callable[[str, torch.dtype], Results], dtype: torch.dtype, terms: Results) -> None:
    """The 2x rule between compute(backend, dtype) on triton and on the reference, each result by its own dtype.

    A result wider than `dtype`, a float32 parameter's gradient beside half precision, has to be exact in its own: the
    kernels sum in float32, whatever the reference loses by computing in `dtype`.

    terms: sums of the absolute values of what is summed in each result. Errors are judged by their size, not by what
    is left where they cancel.
    """
    truth, reference = (compute("reference", wanted) for wanted in (torch.float64, dtype))
    kernel = compute("triton", dtype)
    assert kernel.keys() == truth.keys() == terms.keys()
    for name, found in kernel.items():
        assert found.shape == truth[name].shape and found.dtype == reference[name].dtype, name
        expected = reference[name] if found.dtype == dtype else truth[name].to(found.dtype)
        size = terms[name].max().log2().round().exp2().view(1) if terms[name].numel() else terms[name].flatten()
        flat = [torch.cat([t.flatten(), size.to(t.dtype)]) for t in (found, expected, truth[name])]
        assert_within_twice(*({name: tensor} for tensor in flat), dtype=found.dtype)


def leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf of autograd with the values of `tensor`, and in its layout where it has the dtype already."""
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).detach().requires_grad_()


@contextmanager
def saving() -> Iterator[list[Tensor]]:
    """The tensors that calls within the block keep for the backward."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def wide_programs(device: str) -> Iterator[None]:
    """In the interpreter programs so large that a model's step ends in seconds: a small one takes as long there."""
    if device != "cpu":
        yield
        return

    def blocks(x: Tensor, tile: int) -> configs.Blocks:
        return configs.Blocks(min(configs.power_of_two(max(tile, 16)), 256), 256, 4)

    def plan(x: Tensor) -> residual_depthwise.Plan:
        batch, channels, height, width = x.shape
        strips, block = configs.power_of_two(height), configs.power_of_two(channels)
        whole = block == channels
        return residual_depthwise.Plan(batch, batch, width, 1, strips, block, strips == height, whole, 4)

    with mock.patch.object(configs, "blocks", blocks), mock.patch.object(residual_depthwise, "plan", plan):
        yield


def assert_refused(call: Callable[[], Any], error: type[Exception], argument: str) -> None:
    """That `call` raises an error which begins with the argument's name, before a kernel is even looked up."""
    with mock.patch.object(registry, "kernels", side_effect=AssertionError("launched")):
        with pytest.raises(error, match=f"^{argument}: expected"):
            call()
