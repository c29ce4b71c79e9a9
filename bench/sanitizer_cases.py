"""The program that `make gpu-check STAGE=sanitizer` runs under compute-sanitizer: every kernel, on small shapes.

Each case runs forward and backward on a backend with kernels of its own and holds the results to the float64 reference
loosely, so that a run in which the kernels did nothing is not called clean. Inputs are made on the CPU: hardly any
kernel but ours is instrumented. Without the sanitizer it takes seconds. `--device cpu` needs TRITON_INTERPRET=1.

    python -m bench.sanitizer_cases
    python -m bench.sanitizer_cases --only blocked
    python -m bench.sanitizer_cases --plant      # one write out of bounds: a sanitizer that misses it is of no use
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
from stvit import dispatch, functional

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

    inputs: from what draws a tensor of a shape, tensors and whether each is differentiated, x first.
    call: the output (B, C, H, W) from these tensors, the case's settings and a backend.
    """

    cases: Sequence[Case]
    inputs: Callable[[Case, Callable[..., Tensor]], list[tuple[Tensor, bool]]]
    call: Callable[..., Tensor]


STAGE, PADDED, WIDE, RUNS, TINY = (1, 64, 16, 24), (2, 20, 7, 10), (1, 300, 6, 8), (1, 8, 64, 66), (1, 3, 2, 2)


def attention_cases() -> list[Case]:
    def case(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, tile: tuple[int, int], full: bool,
             n_iter: int = 1, channels_last: bool = True) -> Case:  # fmt: skip
        settings = {"stoken_size": tile, "association_grad": full, "n_iter": n_iter}
        return Case(name, shape, dtype, settings, channels_last)

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
        # More tiles than programs worth starting: a program walks a run of them.
        *(case("runs", RUNS, HALF, (2, 2), full) for full in both),
        # Smaller than its tile: a grid of one super token.
        *(case("tiny", TINY, SINGLE, (4, 4), full) for full in both),
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


def attend(x: Tensor, backend: str, **settings: Any) -> Tensor:
    stokens, association = stvit.super_token_sampling(x, **settings, backend=backend)
    return stvit.token_upsampling(stokens * 2, association, backend=backend)


def of_pixels(case: Case, draw: Callable[..., Tensor]) -> list[tuple[Tensor, bool]]:
    return [(draw(*case.shape), True)]


def of_depthwise(case: Case, draw: Callable[..., Tensor]) -> list[tuple[Tensor, bool]]:
    channels = case.shape[1]
    return [(draw(*case.shape), True), (draw(channels, 1, 3, 3), True), (draw(channels), True)]


def of_norm(case: Case, draw: Callable[..., Tensor]) -> list[tuple[Tensor, bool]]:
    return [(draw(*case.shape), True), (draw(case.shape[1]), True), (draw(case.shape[1]), True)]


def of_branch(case: Case, draw: Callable[..., Tensor]) -> list[tuple[Tensor, bool]]:
    """x, y, LayerScale, and drop-path's factors, which are no variables."""
    batch, channels = case.shape[:2]
    return [(draw(*case.shape), True), (draw(*case.shape), True), (draw(channels), True), (draw(batch), False)]


FAMILIES = {
    "attention": Family(attention_cases(), of_pixels, attend),
    "residual_depthwise": Family(
        [*pixel_cases(gelu=False), *pixel_cases(gelu=True)], of_depthwise, functional.residual_depthwise
    ),
    "channel_layer_norm": Family(pixel_cases(), of_norm, functional.channel_layer_norm),
    "residual_branch": Family(pixel_cases(), of_branch, functional.residual_branch),
}


def run(family: Family, case: Case, device: torch.device, backend: str) -> None:
    """Raises AssertionError where the backend's results are not roughly those of the reference in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator).to(case.dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 and case.channels_last else x

    inputs, grad = family.inputs(case, draw), draw(*case.shape)

    def results(device: str | torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
        leaves = [x.to(device, dtype, copy=True).requires_grad_(wanted) for x, wanted in inputs]
        y = family.call(*leaves, **case.settings, backend=backend)
        y.backward(grad.to(device, dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    truth, got = results("cpu", DOUBLE, "reference"), results(device, case.dtype, backend)
    for place, (ours, theirs) in enumerate(zip(got, truth, strict=True)):
        error = float((ours.cpu().double() - theirs).abs().max() / theirs.abs().max())
        what = f"gradient {place}" if place else "output"
        assert error <= TOLERANCE[case.dtype], f"the {what} is off by {error:.1e} of its largest value"


@triton.jit
def planted_kernel(target, offset, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(target + offset + tl.arange(0, LENGTH), 1.0)


def plant(device: torch.device) -> None:
    """One write 3 KiB past the end of a tensor of 1 KiB."""
    planted_kernel[(1,)](torch.zeros(256, device=device), 1024, LENGTH=32)
    torch.cuda.synchronize()


def run_part(device: torch.device, backends: Sequence[str], word: str, part: int, parts: int) -> tuple[int, int]:
    """(cases that ran, of these failed), of every parts-th case from `part` on whose line holds `word`."""
    every = [(b, name, case) for b in backends for name, family in FAMILIES.items() for case in family.cases]
    ran = failed = 0
    for backend, name, case in every[part::parts]:
        line = f"{backend} {name} {case}"
        garbage = case.dtype == BRAIN and device.type == "cpu"  # the interpreter's arithmetic of bfloat16
        if garbage or word not in line:
            continue
        ran += 1
        try:
            run(FAMILIES[name], case, device, backend)
            print(f"ok     {line}", flush=True)
        except Exception as error:
            failed += 1
            traceback.print_exc()
            print(f"FAILED {line}: {error}", flush=True)
    return ran, failed


def run_all(device: torch.device, word: str, processes: int) -> int:
    backends = [name for name in dispatch.BACKENDS if name != "reference" and not dispatch.why_not(name, device)]
    if processes == 1:
        counts = [run_part(device, backends, word, 0, 1)]
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            parts = [pool.submit(run_part, device, backends, word, part, processes) for part in range(processes)]
            counts = [part.result() for part in parts]
    ran, failed = (sum(count) for count in zip(*counts, strict=True))
    print(f"cases: {ran} ran, {failed} failed, backends: {', '.join(backends) or 'none'}")
    return 1 if failed else 0 if ran else 2


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all cases ran and agree; 1: some did not; 2: nothing to run here."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sanitizer_cases", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", metavar="WORD", help="the cases whose line holds this word")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="side by side, which compiles sooner")
    parser.add_argument("--plant", action="store_true", help="one write out of bounds instead of the cases")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device; --device cpu with TRITON_INTERPRET=1 runs the cases in Triton's interpreter")
        return 2
    if options.plant:
        plant(device)
        return 0
    return run_all(device, options.only, max(1, options.processes))


if __name__ == "__main__":
    sys.exit(main())
