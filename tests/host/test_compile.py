"""The kernels of sampling and upsampling, compiled for GPUs that need not be there, at the stages of published models
and at shapes that strangers bring.

Nothing may spill from registers to the stack, and no kernel may hold an atomic instruction. Run as a
program, ``python tests/host/test_compile.py 90`` prints what each kernel takes on a GPU of compute capability 9.0, as
JSON lines.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from stvit.backends import registry

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = [80, 90, 100]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
STAGES = {  # channels, and the side of a super token
    "stvit_small, stage 1": (64, 8),
    "stvit_small, stage 2": (128, 4),
    "stvit_base and stvit_large, stage 1": (96, 8),
    "stvit_base and stvit_large, stage 2": (192, 4),
}
# A batch of one gives each program a tile, one of 64 a row of them; sides of 384 are multiples of 16, those of 224 are
# not. Triton compiles another kernel for each.
BATCHES = {224: 1, 384: 64}
# Channels that fill no block, and neighbouring lanes along pixels. float64, which is for checks, is not held to this.
STRANGERS = [
    ("3 channels", 3, 8, torch.float16, torch.channels_last),
    ("40 channels", 40, 8, torch.float32, torch.channels_last),
    ("40 channels", 40, 8, torch.float16, torch.contiguous_format),
    ("90 channels", 90, 4, torch.bfloat16, torch.channels_last),
    ("128 channels, NCHW", 128, 4, torch.float16, torch.contiguous_format),
    ("192 channels, NCHW", 192, 4, torch.float16, torch.contiguous_format),
]


class Compiled(NamedTuple):
    """One kernel, where it came from and what it takes."""

    stage: str
    image: int
    dtype: str
    op: str
    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int
    atomics: int


Call = Callable[[], Any]


def op(name: str, *arguments: Any) -> tuple[str, Call]:
    return name, lambda: getattr(torch.ops.stvit, name)(*arguments, "triton")


def attention(x: torch.Tensor, tile: int) -> Iterator[tuple[str, Call]]:
    """The ops of sampling and upsampling on pixels x (B, C, H, W), in both gradient modes."""
    batch, channels, height, width = x.shape
    gh, gw = height // tile, width // tile
    weights = x.new_empty(batch, height, width, 9).permute(0, 3, 1, 2)
    stokens = torch.empty_like(x[:, :, :gh, :gw], memory_format=torch.channels_last)
    mass = x.new_empty(batch, 1, gh, gw, dtype=torch.float32)
    pooled, scale = x.new_empty(batch, gh, gw, channels), channels**-0.5
    given = (stokens, weights, x, stokens, pooled, weights, mass)
    yield op("sampling", x, tile, tile, 1, scale, True)
    yield op("sampling_backward", stokens, weights, mass, tile, tile, True)
    yield op("sampling_backward_full", *given, tile, tile, 1, scale)
    yield op("upsampling", stokens, weights, None, tile, tile, True)
    yield op("upsampling", stokens, weights, x, tile, tile, True)
    yield op("upsampling_backward", x, weights, tile, tile, True)
    yield op("upsampling_backward_full", x, stokens, weights, tile, tile)


def inputs() -> Iterator[tuple[str, int, torch.Tensor, int]]:
    """What pixels and tiles are compiled for: a name, the side of the image, pixels and the side of a super token."""
    for image, batch in BATCHES.items():
        for stage, (channels, tile) in STAGES.items():
            side = image * tile // 32  # a quarter of the image with tiles of 8, an eighth with tiles of 4
            for dtype in DTYPES:
                x = torch.empty(batch, channels, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
                yield stage, image, x, tile
    for name, channels, tile, dtype, memory_format in STRANGERS:
        x = torch.empty(2, channels, 6 * tile, 5 * tile, dtype=dtype).contiguous(memory_format=memory_format)
        yield name, 6 * tile, x, tile


def chosen(capability: int, share: bool) -> list[tuple[str, int, torch.Tensor, int]]:
    """All of the inputs; or a sixth of them, no two GPUs the same."""
    shift = CAPABILITIES.index(capability)

    def mine(group: int, place: int) -> bool:  # of inputs that differ in their dtype, and in that group
        return (group + shift) % 2 == 0 and (group + shift) % len(DTYPES) == place

    return [given for i, given in enumerate(inputs()) if not share or mine(*divmod(i, len(DTYPES)))]


def compile_all(capability: int, share: bool) -> Iterator[Compiled]:
    from tests.support.compiled import compile_call

    for name, image, x, tile in chosen(capability, share):
        for op_name, call in attention(x, tile):
            for usage in compile_call(call, capability):
                yield Compiled(name, image, str(x.dtype), op_name, *usage)


def test_the_shares_are_half_of_it() -> None:
    """`make test` has time for no more; every stage and every dtype is in it."""
    taken = [(name, image, x.dtype) for capability in CAPABILITIES for name, image, x, _ in chosen(capability, True)]
    assert len(set(taken)) == len(taken) == len(list(inputs())) / 2
    assert {dtype for _, _, dtype in taken} == set(DTYPES) and {name for name, _, _ in taken} >= set(STAGES)


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.compiled_all)], ids=["a sixth", "all"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills_or_atomics(
    capability: int, share: bool, run_python: Callable[..., Any]
) -> None:
    """In a process of its own: this one may interpret Triton instead of compiling it."""
    output = run_python(__file__, str(capability), *["share"] * share, env={"PYTHONPATH": str(ROOT)}).stdout
    compiled = [Compiled(**json.loads(line)) for line in output.splitlines()]
    from tests.support.compiled import MOST_STACK

    assert not [kernel for kernel in compiled if kernel.atomics or kernel.stack > MOST_STACK]
    # What was compiled is all there is: each op at each shape and dtype, and each kernel that isn't of the block's ops.
    for name, image, x, _ in chosen(capability, share):
        found = {kernel.op for kernel in compiled if kernel[:3] == (name, image, str(x.dtype))}
        assert found == set(registry.SUPER_TOKEN_OPS)
    of_the_block = {op.removesuffix("_backward") for op in registry.BLOCK_OPS} | {"partial_sums"}
    files = [path for path in (ROOT / "kernels").glob("*.py") if path.stem not in of_the_block]
    written = re.findall(r"^def (\w+_kernel)\(", "".join(path.read_text() for path in files), re.MULTILINE)
    assert {kernel.kernel for kernel in compiled} == set(written)


if __name__ == "__main__":
    for kernel in compile_all(int(sys.argv[1]), share="share" in sys.argv):
        print(json.dumps(kernel._asdict()), flush=True)
