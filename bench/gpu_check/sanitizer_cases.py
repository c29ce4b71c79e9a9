"""The program that `make gpu-check STAGE=sanitizer` runs under compute-sanitizer: every kernel, on small shapes.

Each case runs forward and backward on a backend with kernels of its own and holds the results to the float64 reference
loosely, so that a run in which the kernels did nothing is not called clean. Inputs are made on the CPU: hardly any
kernel but ours is instrumented. Without the sanitizer it takes seconds. `--device cpu` needs TRITON_INTERPRET=1.

    python -m bench.gpu_check.sanitizer_cases
    python -m bench.gpu_check.sanitizer_cases --only blocked
    python -m bench.gpu_check.sanitizer_cases --only "cuda walks"
    python -m bench.gpu_check.sanitizer_cases --plant cuda    # a fault: a sanitizer that misses it is of no use
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

# Before torch takes memory: with its caching allocator a write past a tensor lands in memory that is still valid.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
import triton
import triton.language as tl
from torch import Tensor

import stvit
from stvit import functional
from stvit.backends import dispatch, registry

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
    # y, LayerScale, and drop-path's factors, which are no variables.
    "residual_branch": Family(
        pixel_cases(), functional.residual_branch,
        lambda shape: [(shape, True), ((shape[1],), True), ((shape[0],), False)],
    ),
}  # fmt: skip


def run(family: Family, case: Case, device: torch.device, backend: str) -> None:
    """Raises AssertionError where the backend's results are not roughly those of the reference in float64."""
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


@triton.jit
def planted_kernel(target, offset, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(target + offset + tl.arange(0, LENGTH), 1.0)


def plant(backend: str, device: torch.device) -> None:
    """triton: one write 3 KiB past the end of a tensor of 1 KiB. cuda: memory of 64 pixels, read for 4096."""
    if backend == "triton":
        planted_kernel[(1,)](torch.zeros(256, device=device), 1024, LENGTH=32)
    else:
        weights = torch.zeros(1, 64, 64, 9, device=device).permute(0, 3, 1, 2)
        pixels = torch.zeros(1, 8, 64, 64, device=device)
        pixels.untyped_storage().resize_(8 * 64 * 4)  # behind the tensor's back
        registry.kernels("cuda", "upsampling").upsampling_backward(pixels, weights, 8, 8, False)
    if device.type == "cuda":
        torch.cuda.synchronize()


def able(device: torch.device) -> list[str]:
    """The backends that can run; of the others the reasons are told. Builds the extension."""
    found = []
    for name in dispatch.BACKENDS:
        reasons = dispatch.prepare(name, device)
        if reasons:
            print(f"left out: {name}: {'; '.join(reasons)}", flush=True)
        elif name != "reference":
            found.append(name)
    return found


def run_part(device: torch.device, backends: Sequence[str], word: str, part: int, parts: int) -> list[bool]:
    """Whether each case passed, of every parts-th case from `part` on whose line holds `word`."""
    every = [
        (backend, name, case)
        for backend in backends
        for name, family in FAMILIES.items()
        if backend in family.backends
        for case in family.cases
    ]
    passed = []
    for backend, name, case in every[part::parts]:
        line = f"{backend} {name} {case}"
        garbage = backend == "triton" and case.dtype == BRAIN and device.type == "cpu"  # the interpreter's bfloat16
        if garbage or word not in line:
            continue
        try:
            run(FAMILIES[name], case, device, backend)
            print(f"ok     {line}", flush=True)
            passed.append(True)
        except Exception as error:
            traceback.print_exc()
            print(f"FAILED {line}: {error}", flush=True)
            passed.append(False)
    return passed


def run_all(device: torch.device, word: str, processes: int) -> int:
    backends = able(device)
    if processes == 1:
        passed = run_part(device, backends, word, 0, 1)
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = [pool.submit(run_part, device, backends, word, part, processes) for part in range(processes)]
            passed = [case for part in parts for case in part.result()]
    print(f"cases: {len(passed)} ran, {passed.count(False)} failed, backends: {', '.join(backends) or 'none'}")
    return 1 if False in passed else 0 if passed else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all cases ran and agree; 1: some did not; 2: nothing to run here."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check.sanitizer_cases",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", metavar="WORD", help="the cases whose line holds this word")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="side by side, which compiles sooner")
    parser.add_argument("--plant", choices=("triton", "cuda"), help="a fault in its kernel instead of the cases")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; --device cpu with TRITON_INTERPRET=1 runs the cases in Triton's interpreter")
        return 2
    if options.plant:
        plant(options.plant, device)
        return 0
    return run_all(device, options.only, max(1, options.processes))


if __name__ == "__main__":
    sys.exit(main())
