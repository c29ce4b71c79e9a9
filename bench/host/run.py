"""What an op costs the host: Python, dispatch, autograd and Triton's launcher, with the launch itself left out.

    python -m bench.host
    python -m bench.host --repeats 2000 --json host.json
    python -m bench.host --cuda     # and the CUDA extension, in turn with Triton

Eager training launches a few hundred kernels a step; where the host needs longer for one than the GPU does, the GPU
waits. Each op runs forward and backward on small tensors on the CPU, as Triton's host code would run it on a GPU: the
arguments are bound, specialised and looked up in the cache of compiled kernels, and then nothing is launched. Times are
medians of one process; the ratio is to torch.add, forward and backward, measured in turn with the op, which is what can
be compared between machines.

With --cuda sampling and upsampling also go through the extension, built for the CPU as the tests build it; its launches
are noted instead of run. Left out are then, of either, the calls of the CUDA driver and runtime.

Exit codes: 0 measured, 2 a wrong command line or an interpreter in the way.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness import console, record
from stvit import functional
from stvit.backends import dispatch, extension

ROOT = Path(__file__).resolve().parent.parent.parent
Step = Callable[[], Any]
BATCH, CHANNELS, SIDE, TILE = 2, 64, 16, 8


@contextmanager
def launch_left_out(capability: int = 90) -> Iterator[list[str]]:
    """Within, Triton binds, specialises, compiles and looks up, and launches nothing; the names of what it would."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from bench.machine.launch import Driver

    run, names = JITFunction.run, []

    def bound(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    with (
        mock.patch.object(driver, "_active", Driver(capability)),
        mock.patch.object(JITFunction, "run", bound),
        mock.patch.object(dispatch, "_triton_missing", lambda device: []),
    ):
        yield names


def steps(backend: str = "triton", dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """Each op's forward and backward, and torch.add's. `backend`: of sampling and upsampling."""

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(shape, dtype=dtype)
        return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()

    x, y = leaf(BATCH, CHANNELS, SIDE, SIDE), leaf(BATCH, CHANNELS, SIDE, SIDE)
    grad = torch.ones_like(x)
    taps, bias, gamma = leaf(CHANNELS, 1, 3, 3), leaf(CHANNELS), leaf(CHANNELS)
    weight, keep = leaf(CHANNELS), torch.ones(BATCH)

    def attention() -> Tensor:
        stokens, association = functional.super_token_sampling(x, TILE, backend=backend)
        return functional.token_upsampling(stokens, association, backend)

    def norm_and_skip() -> tuple[Tensor, ...]:
        return functional.channel_layer_norm_and_skip(x, weight, bias, backend="triton")

    forwards: dict[str, Callable[[], Any]] = {
        "torch.add": lambda: torch.add(x, y),
        "residual_depthwise": lambda: functional.residual_depthwise(x, taps, bias, True, "triton"),
        "channel_layer_norm": norm_and_skip,
        "residual_branch": lambda: functional.residual_branch(x, y, gamma, keep, "triton"),
        "sampling + upsampling": attention,
    }

    def step(forward: Callable[[], Any]) -> Step:
        def run() -> None:
            outputs = forward()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [grad] * len(outputs))
            for tensor in (x, y, taps, bias, gamma, weight):
                tensor.grad = None

        return run

    return {name: step(forward) for name, forward in forwards.items()}


def measure(repeats: int) -> list[dict[str, Any]]:
    """A row for each op: microseconds (median), its ratio to torch.add, and the launches of one step."""
    rows = []
    with launch_left_out() as launched:
        every = steps()
        add = every["torch.add"]
        for name, run in every.items():
            run()  # compiles
            launched.clear()
            run()
            launches = list(launched)
            pairs = [(_seconds(run), _seconds(add)) for _ in range(repeats)]
            ours, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
            rows.append({"op": name, "microseconds": 1e6 * ours, "ratio": ours / theirs, "launches": launches})
    return rows


def beside_triton(repeats: int) -> dict[str, Any]:
    """The row of the CUDA extension, in bfloat16, with its ratio to Triton measured in turn with it."""
    from tests.support import emulated

    name, device = "sampling + upsampling", emulated.device()
    before = extension.use(emulated.extension())
    try:
        with launch_left_out():
            every = steps("triton", torch.bfloat16)
            ours, theirs, add = steps("cuda", torch.bfloat16)[name], every[name], every["torch.add"]
            theirs()  # compiles
            launches = [launch.kernel for launch in device.recorded(ours)]
            with device.recording() as forget:
                rounds = []
                for _ in range(repeats):
                    rounds.append((_seconds(ours), _seconds(theirs), _seconds(add)))
                    forget()
    finally:
        extension.use(before)
    cuda, triton, least = (statistics.median(values) for values in zip(*rounds, strict=True))
    return {
        "op": f"{name}, CUDA",
        "microseconds": 1e6 * cuda,
        "ratio": cuda / least,
        "to_triton": cuda / triton,
        "launches": launches,
    }


def _seconds(run: Step) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=console.positive, default=500, metavar="N", help="pairs of an op (500)")
    parser.add_argument("--cuda", action="store_true", help="the CUDA extension too; needs a C++ compiler")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(arguments)
    if dispatch.interpreting():
        console.usage_error("TRITON_INTERPRET is set: the interpreter's host code is another; unset it")
    torch.set_num_threads(1)
    rows = measure(options.repeats)
    if options.cuda:
        sys.path.insert(0, str(ROOT))
        rows.append(beside_triton(options.repeats))
    for row in rows:
        launches, beside = len(row["launches"]), f"{row['to_triton']:8.2f} x Triton" if "to_triton" in row else ""
        times = f"{row['microseconds']:8.0f} us{row['ratio']:8.1f} x torch.add"
        print(f"{row['op']:<28}{times}{launches:4} launches{beside}")
    if options.json:
        record.write_json(options.json, rows)
    return 0
