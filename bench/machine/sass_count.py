"""Counts the warp instructions that the CUDA kernels issue, from their machine code: no GPU needed.

    python -m bench.machine.sass_count 9.0 8.0        sampling and upsampling at stages 1 and 2 of stvit_small
    python -m bench.machine.sass_count --parts 9.0    and the lines of `run` that they come from
    python -m bench.machine.sass_count --chain 9.0    and the longest chain of them, from barrier to barrier

Launches come from the extension on the tests' emulated device, which notes instead of running them. sass_warp.py then
executes the machine code of every warp of one image as far as control flow goes. Needs nvcc, and the disassembler that
comes with Triton.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from bench.machine import sass_text, sass_warp
from stvit.backends.build import toolkit

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
CACHE = Path(tempfile.gettempdir()) / f"stvit-sass-{os.getuid()}"
# nvcc's names of what the emulated device calls otherwise.
NAMES = {
    "NS_3gpu8bfloat16E": "13__nv_bfloat16",
    "NS_3gpu4halfE": "6__half",
    "13__nv_bfloat16S2_": "13__nv_bfloat16S1_",
    "6__halfS2_": "6__halfS1_",
}
SHAPES = {
    "stage 1": ((128, 64, 56, 56), (8, 8)),
    "stage 2": ((128, 128, 28, 28), (4, 4)),
    "stage 1 of B": ((128, 96, 56, 56), (8, 8)),
    "stage 2 of B": ((128, 192, 28, 28), (4, 4)),
}


class Count(NamedTuple):
    """Warp instructions of one kernel for one image: by source line, and by name."""

    kernel: str
    pixels: int
    instructions: Counter[sass_text.Instruction]
    chain: int  # the longest of a block

    @property
    def each(self) -> float:
        """Warp instructions a pixel."""
        return self.instructions.total() / self.pixels


def disassembled(source: Path, architecture: int) -> dict[str, sass_text.Program]:
    tools = toolkit()
    assert tools is not None, "needs nvcc"
    folder = ROOT / "csrc"
    content = b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".h", ".cuh"))
    key = hashlib.sha256(content + source.read_bytes() + str(architecture).encode()).hexdigest()[:16]
    text = CACHE / f"{source.stem}-{architecture}-{key}.sass"
    if not text.exists():
        CACHE.mkdir(exist_ok=True)
        binary = text.with_suffix(f".{os.getpid()}.cubin")
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        flags = ["-std=c++17", "-O3", "-lineinfo", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-gencode", target]
        subprocess.run([tools.nvcc, *flags, f"-I{folder}", "-cubin", source, "-o", binary], check=True)
        shown = subprocess.run([NVDISASM, "-gi", "-c", binary], check=True, capture_output=True, text=True).stdout
        text.write_text(shown)
        binary.unlink()
    return sass_text.programs(text.read_text())


def program(symbol: str, architecture: int) -> sass_text.Program:
    for name, other in NAMES.items():
        symbol = symbol.replace(name, other)
    for source in sorted((ROOT / "csrc").glob("*.cu")):
        if "walk_kernel" in symbol and not source.stem.startswith("walk_"):
            continue
        if "walk_kernel" not in symbol and source.stem.startswith("walk_"):
            continue
        found = disassembled(source, architecture)
        if symbol in found:
            return found[symbol]
    raise LookupError(symbol)


def count(launch: Any, images: int, pixels: int, architecture: int) -> Count:
    base = sass_warp.PARAMETERS[architecture]
    constants = bytes(base) + launch.arguments + bytes(64)
    constants = launch.threads.to_bytes(4, "little") + constants[4:]  # blockDim.x
    found: Counter[sass_text.Instruction] = Counter()
    longest = 0
    compiled = program(launch.kernel, architecture)
    for block in range(launch.blocks // images):
        warps = [
            sass_warp.Warp(compiled, constants, block, i, launch.threads) for i in range((launch.threads + 31) // 32)
        ]
        for warp in warps:
            found.update(warp.run())
        longest = max(longest, sass_warp.chain([warp.meetings for warp in warps]))
    return Count(launch.kernel, pixels, found, longest)


def calls(
    shape: tuple[int, int, int, int], tile: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Callable[[], object]]:
    """The ops, on tensors of the right kind whose values do not matter."""
    batch, channels, height, width = shape
    grid = height // tile[0], width // tile[1]

    def pixels(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype).to(memory_format=torch.channels_last)

    x, stokens = pixels(*shape), pixels(batch, channels, *grid)
    weights = torch.empty((batch, height, width, 9), dtype=dtype).permute(0, 3, 1, 2)
    pooled = torch.empty((batch, *grid, channels), dtype=dtype)
    mass = torch.empty((batch, 1, *grid))
    ops, scale = torch.ops.stvit_cuda, channels**-0.5
    return {
        "sampling": lambda: ops.sampling(x, *tile, 1, scale),
        "sampling backward": lambda: ops.sampling_backward(stokens, weights, mass, *tile, True),
        "sampling backward, full": lambda: ops.sampling_backward_full(
            stokens, weights, x, stokens, pooled, weights, mass, *tile, 1, scale
        ),
        "upsampling": lambda: ops.upsampling(stokens, weights, *tile, True),
        "upsampling with residual": lambda: ops.upsampling(stokens, weights, *tile, True, x),
        "upsampling backward": lambda: ops.upsampling_backward(x, weights, *tile, True),
        "upsampling backward, full": lambda: ops.upsampling_backward_full(x, stokens, weights, *tile),
    }


def part(one: sass_text.Instruction) -> str:
    """The line of `run` that an instruction comes from."""
    if len(one.place) < 2:
        return "the kernel itself"
    path, number = one.place[1].rsplit(":", 1)
    return Path(path).read_text().splitlines()[int(number) - 1].strip()


def main() -> None:
    from tests.support import emulated

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="+", help="compute capabilities, as 9.0")
    parser.add_argument("--parts", action="store_true", help="also where in `run` the instructions come from")
    parser.add_argument("--chain", action="store_true", help="also the longest chain of instructions of a block")
    parser.add_argument("--shapes", nargs="+", default=["stage 1", "stage 2"], choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--ops", nargs="+", help="beginnings of ops; all by default")
    arguments = parser.parse_args()
    device = emulated.device()
    for name in arguments.shapes:
        shape, tile = SHAPES[name]
        for op, call in calls(shape, tile, getattr(torch, arguments.dtype)).items():
            if arguments.ops and not any(op == wanted for wanted in arguments.ops):
                continue
            for launch in device.recorded(call):
                for architecture in arguments.architectures:
                    found = count(launch, shape[0], shape[2] * shape[3], round(float(architecture) * 10))
                    kernel = "walk" if "walk" in launch.kernel else "spread" if "spread" in launch.kernel else "general"
                    chain = f"  chain {found.chain:7}" if arguments.chain else ""
                    print(f"{name:12} {op:26} {kernel:8} {architecture:5} {found.each:7.1f}{chain}", flush=True)
                    if arguments.parts:
                        parts: Counter[str] = Counter()
                        for one, times in found.instructions.items():
                            parts[part(one)] += times
                        for text, times in parts.most_common():
                            print(f"    {times / found.pixels:8.2f}  {text}")


if __name__ == "__main__":
    main()
