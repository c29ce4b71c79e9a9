"""What the kernel tests share: cases listed and drawn, memory layouts, and the comparison with float64 truth.

The rule is flash-attention's: a kernel's largest error against the reference in float64 may be at most twice that of
the reference in the kernel's own dtype, plus a few roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import Phase
from hypothesis import strategies as st
from torch import Tensor

from stvit.backends import dispatch, extension
from stvit.geometry import grid_size
from stvit.kernels import configs
from tests.support import emulated

KERNEL_BACKENDS = ("triton", "cuda")  # as in conftest.py
HALF, BRAIN, SINGLE, DOUBLE = EVERY_DTYPE = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Those that are right on every backend: in Triton's interpreter the arithmetic of bfloat16 is not.
DTYPES = [dtype for dtype in EVERY_DTYPE if dtype != BRAIN or torch.cuda.is_available()]
TWICE = 2.0
# The reference's error may happen to be nil, so some roundings (eps / 2 each) of the largest true value are allowed. In
# 16 bits, where sums are wide on both sides, one for the result and one for what it is made of. In float32 the order of
# a sum counts: a walk adds up to 64 blocks of a tile's pixels one after the other, which costs about sqrt(64) roundings
# and twice that at worst of many entries, where the reference sums pairwise. That is 1e-6: it can hide no wrong term.
ROUNDINGS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 16}
# float64 is the truth's own dtype, whose error is unknown: the bound is that of sums over 2048 numbers in any order.
# Inputs are of order 1, and a gradient can be a small difference of terms of that order: values below
# SMALL_VALUE are allowed its error, which is 4e-15.
FLOAT64, SMALL_VALUE = 2048 * torch.finfo(torch.float64).eps, 2.0**-7


def poisoned(*shape: int, like: Tensor) -> Tensor:
    return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x: Tensor) -> Tensor:
    """Every second entry, in each dimension, of a larger buffer; NaN around and between."""
    buffer = poisoned(*(2 * n + 3 for n in x.shape), like=x)
    return buffer[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)].copy_(x)


def sliced_channels_last(x: Tensor) -> Tensor:
    """Some of the channels of a window of a larger channels_last buffer; NaN around."""
    batch, channels, height, width = x.shape
    buffer = channels_last(poisoned(batch + 1, channels + 3, height + 2, width + 3, like=x))
    return buffer[1:, 2 : channels + 2, 1 : height + 1, 2 : width + 2].copy_(x)


def transposed(x: Tensor) -> Tensor:
    """Columns outermost, images innermost."""
    return x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)


def expanded(x: Tensor) -> Tensor:
    """One image and one row for all, of stride 0."""
    return x[:1, :, :1].expand(x.shape) if x.shape[0] else x


def sliced_vectors(x: Tensor) -> Tensor:
    """As `sliced_channels_last`, but eight channels of a pixel can be moved at once; NaN around."""
    batch, channels, height, width = x.shape
    buffer = channels_last(poisoned(batch + 1, channels + 24 - channels % 8, height + 2, width + 3, like=x))
    return buffer[1:, 8 : channels + 8, 1 : height + 1, 2 : width + 2].copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f
    for f in (contiguous, channels_last, sliced, sliced_channels_last, sliced_vectors, transposed, expanded)
}


class Case(NamedTuple):
    """One call: x is (batch, channels, height, width).

    run is the number of tiles that a program of Triton's walks, at most. limits are those of the GPU that CUDA kernels
    are planned for, where it is emulated: multiprocessors, and bytes of shared memory.
    """

    batch: int
    channels: int
    height: int
    width: int
    tile: tuple[int, int]
    dtype: torch.dtype = torch.float16
    full: bool = False
    n_iter: int = 1
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    run: int | None = None
    limits: tuple[int, int] = (132, 232448)
    seed: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        return grid_size(self.height, self.width, self.tile)

    def pixels(self, device: str) -> Tensor:
        """x: noise on top of values that a tile shares, so that a pixel's nine weights differ."""
        generator = torch.Generator().manual_seed(self.seed)
        (gh, gw), (h, w) = self.grid, self.tile
        shared = torch.randn(self.batch, self.channels, gh, gw, generator=generator)
        shared = shared.repeat_interleave(h, 2).repeat_interleave(w, 3)[:, :, : self.height, : self.width]
        noise = torch.randn(self.batch, self.channels, self.height, self.width, generator=generator)
        return LAYOUTS[self.layout]((noise + 0.7 * shared).to(device, self.dtype))

    def random(self, device: str, channels: int, size: tuple[int, int], layout: str) -> Tensor:
        """Noise (batch, channels, *size), a gradient or refined super tokens; other than x for the same seed."""
        generator = torch.Generator().manual_seed(self.seed + 1000 + channels + size[0])
        noise = torch.randn(self.batch, channels, *size, generator=generator)
        return LAYOUTS[layout](noise.to(device, self.dtype))

    def weights(self, device: str) -> Tensor:
        """An association as sampling leaves it, (batch, 9, height, width) of memory (batch, height, width, 9)."""
        generator = torch.Generator().manual_seed(self.seed + 2000)
        logits = torch.randn(self.batch, self.height, self.width, 9, generator=generator)
        return (1.5 * logits).softmax(-1).to(device, self.dtype).permute(0, 3, 1, 2)

    @property
    def name(self) -> str:
        shape = "x".join(map(str, (*self.shape, "tile", *self.tile)))
        notes = [str(self.dtype).removeprefix("torch."), "full" if self.full else "detached"]
        notes += [f"n_iter={self.n_iter}"] * (self.n_iter > 1) + [f"run={self.run}"] * (self.run is not None)
        notes += ["limits={}-{}".format(*self.limits)] * (self.limits != Case._field_defaults["limits"])
        return "-".join([shape, *notes, self.layout, self.grad_layout])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.height, self.width


LAST, SLICED, SLICED_LAST = "channels_last", "sliced", "sliced_channels_last"
# Channels in use (64 to 192 in the published models, 40, 90 and 3 elsewhere) and wider than any block; tiles, grids and
# layouts of every kind.
LISTED = [
    Case(2, 64, 16, 24, (8, 8), HALF, layout=LAST, grad_layout=LAST),  # as in stage 1 of stvit_small
    Case(1, 64, 16, 24, (8, 8), HALF, True, layout=LAST, grad_layout=LAST),
    Case(1, 96, 8, 16, (8, 8), HALF, True),  # stvit_base: 96 channels are no power of two
    Case(1, 192, 8, 12, (4, 4), HALF, layout=LAST, grad_layout=LAST),
    Case(1, 192, 8, 8, (4, 4), HALF, True, 2),
    Case(1, 40, 9, 7, (4, 4), SINGLE, layout=LAST, grad_layout=LAST),
    Case(2, 40, 5, 6, (3, 5), HALF, True, layout=SLICED_LAST, grad_layout=SLICED),
    Case(1, 90, 3, 5, (2, 3), SINGLE, True, layout=SLICED_LAST, grad_layout=LAST),
    Case(1, 90, 5, 4, (2, 3), DOUBLE, layout=SLICED, grad_layout=SLICED),
    Case(1, 300, 3, 6, (2, 2), HALF, True, layout=LAST, grad_layout=LAST),  # wider than any block of channels
    Case(1, 300, 2, 5, (2, 2), HALF),
    Case(1, 300, 2, 3, (2, 3), SINGLE, True, layout=LAST),
    Case(2, 1, 5, 7, (2, 3), SINGLE, True, grad_layout="expanded"),
    Case(3, 3, 3, 7, (2, 3), DOUBLE, True, 2, SLICED, SLICED),
    Case(2, 3, 5, 7, (2, 3), SINGLE, False, 3, SLICED_LAST, SLICED_LAST),
    Case(2, 3, 3, 9, (3, 5), HALF, True, 3, "transposed", "transposed"),
    Case(2, 3, 4, 6, (2, 3), SINGLE, layout="expanded", grad_layout="expanded"),
    Case(1, 3, 40, 33, (32, 32), HALF, layout=LAST),
    Case(1, 1, 33, 30, (32, 32), SINGLE, True),
    Case(2, 3, 3, 8, (1, 2), SINGLE, True, grad_layout=SLICED),
    Case(1, 5, 3, 4, (1, 1), HALF, True),
    Case(1, 7, 1, 1, (1, 1), SINGLE, True),  # a grid of 1 x 1, and a tile of one pixel
    Case(1, 7, 6, 6, (6, 6), DOUBLE, True),
    Case(2, 4, 2, 3, (4, 5), SINGLE, True, 2),  # smaller than a tile both ways
    Case(1, 4, 2, 11, (5, 4), SINGLE),
    Case(1, 4, 11, 1, (4, 5), HALF, True, layout=LAST),
    Case(0, 3, 5, 7, (2, 3), SINGLE, True, 2),  # no images
    Case(0, 3, 5, 7, (2, 3), HALF, layout=LAST),
    # A program walks one tile of a row, some of them, all of them; a last run may be shorter.
    *(Case(1, 6, 3, 11, (2, 2), SINGLE, full, run=run) for run in (1, 2, 4, 6) for full in (False, True)),
    Case(2, 300, 2, 12, (2, 3), HALF, True, run=4),
    Case(1, 3, 4, 10, (2, 3), DOUBLE, True, 2, run=2),
    *(Case(2, 20, 7, 10, (4, 3), BRAIN, full, 2, LAST, LAST) for full in (False, True)),
    *(Case(1, 300, 5, 7, (2, 3), BRAIN, full, layout=SLICED) for full in (False, True)),
]


def each(name: str, values: Iterable[Case | torch.dtype]) -> pytest.MarkDecorator:
    """Runs a test for each backend with each value, of a dtype or with one, that it can run on."""
    pairs = [
        pytest.param(backend, value, id=f"{backend}-{value.name if isinstance(value, Case) else value}")
        for value in values
        for backend in KERNEL_BACKENDS
        if backend == "cuda" or (value.dtype if isinstance(value, Case) else value) in DTYPES
    ]
    return pytest.mark.parametrize(("backend", name), pairs, indirect=["backend"])


each_dtype = each("dtype", EVERY_DTYPE)

# A dimension is drawn from its small range unless it is among the few that a case makes large: the interpreter takes
# milliseconds for each tile, block of pixels and block of channels, so that all cannot be large at once.
SMALL = {"batch": (1, 2), "channels": (1, 8), "h": (1, 4), "w": (1, 4), "gh": (1, 2), "gw": (1, 3)}
LARGE = {"batch": (0, 3), "channels": (1, 200), "h": (1, 16), "w": (1, 16), "gh": (1, 6), "gw": (1, 6)}

TOKENS = 40  # super tokens of all images and rounds that a drawn case has at most, but for its smallest batch

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking takes minutes in the interpreter


@st.composite
def cases(draw: st.DrawFn, rounds: int = 3) -> Case:
    """Channels 1..200, tiles 1..16 and grids 1..6 each way with padding or without, batch 0..3, n_iter 1..rounds."""
    large = draw(st.sets(st.sampled_from(sorted(LARGE)), max_size=3))
    size = {name: draw(st.integers(*(LARGE if name in large else SMALL)[name])) for name in SMALL}
    h, w = size["h"], size["w"]
    # Many super tokens leave room for fewer rounds, and both for fewer images.
    n_iter = draw(st.integers(1, max(1, min(rounds, TOKENS // (size["gh"] * size["gw"])))))
    batch = min(size["batch"], max(1, TOKENS // (size["gh"] * size["gw"] * n_iter)))
    return Case(
        batch, size["channels"],
        size["gh"] * h - draw(st.integers(0, h - 1)), size["gw"] * w - draw(st.integers(0, w - 1)), (h, w),
        dtype=draw(st.sampled_from(DTYPES)), full=draw(st.booleans()), n_iter=n_iter,
        layout=draw(st.sampled_from(sorted(LAYOUTS))), grad_layout=draw(st.sampled_from(sorted(LAYOUTS))),
        run=draw(st.none() | st.integers(1, size["gw"])), seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@contextmanager
def launching(case: Case, device: str) -> Iterator[None]:
    """Runs of case.run tiles, a GPU of case.limits; in the interpreter blocks wide enough for a case to end in time.

    Launch parameters are tuned to a GPU's registers. To the interpreter a small block costs as much as a large one.
    """
    limits = emulated.device().limits(*case.limits) if extension.device() == "cpu" else nullcontext()
    tuned, run_length = configs.blocks, configs.run_length

    def blocks(x: Tensor, tile: int) -> configs.Blocks:
        found = tuned(x, tile)
        steps = case.batch * math.prod(case.grid) * case.n_iter
        steps *= math.ceil(tile / found.pixels) * math.ceil(x.shape[1] / found.channels)
        if not dispatch.interpreting() or steps <= 24:
            return found
        return configs.Blocks(min(configs.power_of_two(max(tile, 16)), 256), 256, 4)

    def run(images: int, gh: int, gw: int) -> int:
        return run_length(images, gh, gw) if case.run is None else min(case.run, gw)

    with limits, mock.patch.object(configs, "blocks", blocks), mock.patch.object(configs, "run_length", run):
        yield


Results = dict[str, Tensor]
NUDGES = 8  # further runs of the reference where its first run doesn't explain an error


def nudged(x: Tensor, seed: int) -> Tensor:
    """x with each entry moved up or down by one unit in its last place."""
    random = torch.Generator().manual_seed(seed)
    towards = torch.randint(2, x.shape, generator=random).to(x.device, x.dtype) * 2 - 1
    return torch.nextafter(x, towards * torch.inf)


def assert_within_twice(
    kernel: Results,
    reference: Results,
    truth: Results,
    dtype: torch.dtype,
    again: Callable[[int], Results] | None = None,
) -> None:
    """The 2x rule for every entry of a computation in `dtype`; a wrong dtype or shape fails too, as does NaN.

    again(seed) is the reference in `dtype` on input that is `nudged`. The rule compares two single worst roundings, and
    where few entries are summed the reference's may happen to be far smaller than the computation's condition explains.
    In float32 its error is therefore the largest over its own run and these, asked for only where the first doesn't
    explain the kernel's: no algorithm in `dtype` can be held to more than the exact result of an input one rounding
    away. A wrong term is wrong by its size, not by its size times a rounding.
    """
    assert kernel.keys() == reference.keys() == truth.keys()
    others: list[Results] = []
    for name, found in kernel.items():
        expected, exact = reference[name], truth[name]
        assert found.dtype == expected.dtype and found.shape == exact.shape, name
        if not found.numel():
            continue
        magnitude, error = exact.abs().max(), (found.double() - exact).abs().max()
        bound = FLOAT64 * magnitude.clamp(min=SMALL_VALUE)
        if dtype != torch.float64:
            roundings = ROUNDINGS[dtype] * torch.finfo(dtype).eps / 2 * magnitude
            bound = TWICE * (expected.double() - exact).abs().max() + roundings
        if dtype == torch.float32 and again and bound < error < torch.inf:
            others = others or [again(seed) for seed in range(NUDGES)]
            bound = TWICE * max((other[name].double() - exact).abs().max() for other in others) + roundings
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}, values up to {magnitude:.3g}"


def far_apart(x: Tensor, dimension: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """x with its entries in one dimension, three or more, 2**30 + 8 apart: 32 bits don't hold the last one's offset.

    It starts 2**31 into its buffer: a wrapped offset reads other memory instead of crashing. What lies between is
    never touched, so it takes address space alone. Skips the test where there is not as much of it.
    """
    entries = x.shape[dimension]
    assert entries >= 3
    strides = list(x.stride())
    strides[dimension] = 2**30 + 8
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    try:
        buffer = torch.empty(2**31 + entries * strides[dimension], dtype=x.dtype, device=x.device)
    except RuntimeError as error:  # out of memory too
        pytest.skip(f"cannot reserve {entries + 2} x 2 GiB: {error}")
    return buffer.as_strided(x.shape, strides, 2**31).copy_(x)
