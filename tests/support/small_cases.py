"""Every kernel on small shapes, forward and backward: what compute-sanitizer watches (tests/kernels/test_sanitized.py).

Inputs and truth are made on the CPU: hardly any kernel but ours is instrumented.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import stvit
from stvit import functional

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {HALF: 2e-2, BRAIN: 1e-1, SINGLE: 1e-4, DOUBLE: 1e-9}  # of the largest value


class Case(NamedTuple):
    """Forward and backward of an op on x (B, C, H, W); `settings` are the op's own."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    settings: dict[str, Any]
    channels_last: bool = True

    def __str__(self) -> str:
        sizes, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        settings = " ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.name} {sizes} {dtype} {settings}".rstrip()


class Family(NamedTuple):
    """The cases of an op; those called "tiny" reach all its kernels.

    call: the output (B, C, H, W) from x, the tensors of `others`, the case's settings and a backend.
    others: the shapes of tensors beside x, from its shape, and whether each is differentiated.
    backends: those with kernels of their own for it.
    """

    cases: Sequence[Case]
    call: Callable[..., Tensor]
    others: Callable[[tuple[int, int, int, int]], list[tuple[tuple[int, ...], bool]]] = lambda shape: []
    backends: Sequence[str] = ("triton",)


STAGE, PADDED, WIDE, RUNS, TINY = (1, 64, 16, 24), (2, 20, 7, 10), (1, 300, 6, 8), (1, 8, 64, 66), (1, 3, 2, 2)


def case(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, tile: tuple[int, int], full: bool,
    n_iter: int = 1, channels_last: bool = True, residual: torch.dtype | None = None,
) -> Case:  # fmt: skip
    settings: dict[str, Any] = {"stoken_size": tile, "association_grad": full, "n_iter": n_iter}
    return Case(name, shape, dtype, settings if residual is None else {**settings, "residual": residual}, channels_last)


def attention_cases() -> list[Case]:
    both = (False, True)
    return [
        *(case("stage", STAGE, dtype, (8, 8), full) for dtype in (HALF, BRAIN, SINGLE) for full in both),
        *(case("padded", PADDED, dtype, (4, 3), full) for dtype in (HALF, BRAIN, SINGLE) for full in both),
        # Wider than one block of channels.
        *(case("blocked", WIDE, dtype, (4, 4), full) for dtype in (BRAIN, SINGLE) for full in both),
        case("rounds", PADDED, HALF, (4, 3), False, 2),
        case("rounds", PADDED, SINGLE, (4, 3), True, 2),
        case("planar", PADDED, HALF, (4, 3), True, channels_last=False),
        case("double", PADDED, DOUBLE, (4, 3), True),
        case("added", PADDED, SINGLE, (4, 3), False, residual=SINGLE),
        case("added", PADDED, HALF, (4, 3), False, residual=BRAIN),
        # More tiles than programs worth starting: a program walks a run of them.
        *(case("runs", RUNS, HALF, (2, 2), full) for full in both),
        # Smaller than its tile: a grid of one super token.
        *(case("tiny", TINY, SINGLE, (4, 4), full) for full in both),
    ]


def walk_cases() -> list[Case]:
    """For the kernels of the extension that take eight 16-bit channels at a time: what csrc/plan.cpp makes of a call on
    GPUs with about 100 to 190 multiprocessors. A walk over pixels has three further maps in the full mode."""
    both = (False, True)
    return [
        # One pass, a region being an image, several groups to a row; pixels read once.
        *(case("whole", (192, 8, 23, 38), dtype, (8, 8), full) for dtype in (HALF, BRAIN) for full in both),
        # One pass, several regions to an image, rows of tiles read by two of them.
        *(case("regions", (48, 24, 31, 18), dtype, (4, 4), full) for dtype in (HALF, BRAIN) for full in both),
        # Pooling in a pass of its own; a region is a few tiles. With rounds super tokens are given.
        case("passes", (1, 64, 23, 29), HALF, (8, 8), True),
        case("passes", (1, 40, 19, 22), BRAIN, (3, 5), True, 2),
        # Each number of channels to a warp that there is a kernel for; 392 are too many for any.
        *(case("channels", (1, channels, 7, 8), HALF, (4, 4), True) for channels in (128, 192, 256, 384, 392)),
        # Super tokens to pixels: with a residual, in 16 bits and promoted.
        *(case("added", (1, 40, 9, 30), HALF, (4, 4), False, residual=dtype) for dtype in (HALF, SINGLE)),
        *(case("added", (1, 40, 9, 30), BRAIN, (4, 4), False, residual=dtype) for dtype in (BRAIN, SINGLE)),
    ]


def pixel_cases(**settings: Any) -> list[Case]:
    """For the ops of the rest of the block."""
    return [
        *(Case("stage", STAGE, dtype, settings) for dtype in (HALF, BRAIN, SINGLE)),
        *(Case("odd", PADDED, dtype, settings) for dtype in (HALF, BRAIN, SINGLE)),
        *(Case("blocked", WIDE, dtype, settings) for dtype in (BRAIN, SINGLE)),
        Case("planar", PADDED, HALF, settings, channels_last=False),
        Case("double", PADDED, DOUBLE, settings),
        Case("tiny", TINY, SINGLE, settings),
    ]


def attend(x: Tensor, backend: str, residual: torch.dtype | None = None, **settings: Any) -> Tensor:
    """residual: the dtype in which x is added."""
    stokens, association = stvit.super_token_sampling(x, **settings, backend=backend)
    added = None if residual is None else x.to(residual)
    return stvit.token_upsampling(stokens * 2, association, backend=backend, residual=added)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    """Of the batch, plus x."""
    y, skip = functional.batch_norm_and_skip(
        x, weight, bias, torch.zeros_like(weight), torch.ones_like(weight), backend=backend
    )
    return y + skip


def batch_norm_conv(x: Tensor, weight: Tensor, bias: Tensor, conv: Tensor, conv_bias: Tensor, backend: str) -> Tensor:
    """The convolution behind it, plus x."""
    running = torch.zeros_like(weight), torch.ones_like(weight)
    y, rest, skip = functional.batch_norm_conv_and_skip(
        x, weight, bias, *running, backend=backend, conv=(conv, conv_bias)
    )
    return y + rest.view(-1, 1, 1) + skip


FAMILIES = {
    "attention": Family(attention_cases(), attend, backends=("triton", "cuda")),
    "walks": Family(walk_cases(), attend, backends=("cuda",)),
    "residual_depthwise": Family(
        [*pixel_cases(gelu=False), *pixel_cases(gelu=True)], functional.residual_depthwise,
        lambda shape: [((shape[1], 1, 3, 3), True), ((shape[1],), True)],
    ),
    "channel_layer_norm": Family(
        pixel_cases(), functional.channel_layer_norm, lambda shape: [((shape[1],), True), ((shape[1],), True)]
    ),
    "batch_norm": Family(pixel_cases(), batch_norm, lambda shape: [((shape[1],), True), ((shape[1],), True)]),
    "batch_norm_conv": Family(
        pixel_cases(), batch_norm_conv,
        lambda shape: [(each, True) for each in ((shape[1],), (shape[1],), (shape[1], shape[1], 1, 1), (shape[1],))],
    ),
    # y, LayerScale, and drop-path's factors, which are no variables.
    "residual_branch": Family(
        pixel_cases(), functional.residual_branch,
        lambda shape: [(shape, True), ((shape[1],), True), ((shape[0],), False)],
    ),
}  # fmt: skip


def run(family: Family, case: Case, device: str, backend: str) -> None:
    """Holds the backend's results to the reference in float64, loosely: a run in which the kernels did nothing is not
    to be called clean."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(case.dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 and case.channels_last else x

    inputs = [(draw(*shape), wanted) for shape, wanted in [(case.shape, True), *family.others(case.shape)]]
    grad = draw(*case.shape)

    def results(device: str | torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(device, dtype, copy=True).requires_grad_(wanted) for x, wanted in inputs]
        y = family.call(*leaves, **case.settings, backend=backend)
        y.backward(grad.to(y))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    truth, got = results("cpu", DOUBLE, "reference"), results(device, case.dtype, backend)
    for place, (ours, theirs) in enumerate(zip(got, truth, strict=True)):
        error = float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max())
        what = f"gradient {place}" if place else "output"
        assert error <= TOLERANCE[case.dtype], f"the {what} is off by {error:.1e} of its largest value"
