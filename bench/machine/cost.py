"""What the kernels of a training step cost, by count: instructions, sectors, wavefronts, bytes; and the time that each
limit of a GPU alone takes. Nothing is timed."""

from __future__ import annotations

import os
import re
from collections import Counter as Counts
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import stvit
from bench.machine.counters import SECTOR, Counters, classify
from bench.machine.gpus import GPU, INTEGER_LANES, SCHEDULERS, SPECIAL_LANES
from bench.machine.processes import compiling_processes
from bench.machine.replay import Recorded, record, replay
from bench.machine.sass import machine_code
from bench.traffic.count import count

PIPES = {
    "alu": "IADD3 LOP3 ISETP SEL SHF LEA PRMT IMNMX VIMNMX FSETP FMNMX FSEL PLOP3 IABS BMSK SGXT F2FP P2R R2P VIADD "
    "ISCADD VABSDIFF",
    "float": "FFMA FADD FMUL HFMA2 HADD2 HMUL2 FSWZADD",
    "multiply": "IMAD",
    "special": "MUFU I2F F2I FRND F2F POPC FLO I2FP",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
LIMITS = ("issue", "alu", "fma", "special", "load/store", "tensor", "L2", "DRAM")


@dataclass(frozen=True)
class Cost:
    """One kernel at one shape, for one launch of the `launches` that a step makes of it.

    instructions: warp instructions of machine code (sass.py), `pipes` those by pipe, `matched` how well they were
    matched; ptx: those of PTX, `classes` by class. sectors and wavefronts: (found, at best), of loads, stores, shared
    memory. passes: through the load/store units. bytes_read and bytes_written: each byte once; l2_bytes: asked of L2.
    """

    op: str
    phase: str
    kernel: str
    shape: tuple[int, ...]
    launches: int
    grid: int
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: float
    pipes: dict[str, float]
    matched: float
    ptx: float
    classes: dict[str, float]
    flops: float
    loads: tuple[float, float]
    stores: tuple[float, float]
    wavefronts: tuple[float, float]
    passes: float
    bytes_read: float
    bytes_written: float
    l2_bytes: float

    @property
    def name(self) -> str:
        """Op, kernel where it has another name, and shape: 'sampling (walk) 128x64x56x56'."""
        kernel = self.kernel.removesuffix("_kernel")
        return f"{self.op}{f' ({kernel})' if kernel != self.op else ''} {'x'.join(map(str, self.shape))}"

    def resident(self, gpu: GPU) -> int:
        """Blocks that a multiprocessor holds at a time."""
        return gpu.resident(self.registers, self.shared, self.warps)

    def waves(self, gpu: GPU) -> float:
        """How often all multiprocessors are filled."""
        return self.grid / (gpu.multiprocessors * self.resident(gpu))

    def limits(self, gpu: GPU) -> dict[str, float]:
        """Seconds of one launch that each limit alone takes, at the least. What a multiprocessor does is counted for
        the one that gets most blocks."""
        most = -(-self.grid // gpu.multiprocessors)
        clock = gpu.clock * self.grid / most  # of the multiprocessors together
        pipe = {name: 32 * self.pipes.get(name, 0.0) for name in PIPES}
        return {
            "issue": self.instructions / SCHEDULERS / clock,
            "alu": pipe["alu"] / INTEGER_LANES / clock,
            "fma": (pipe["float"] / gpu.float_lanes + pipe["multiply"] / INTEGER_LANES) / clock,
            "special": pipe["special"] / SPECIAL_LANES / clock,
            "load/store": self.passes / clock,
            "tensor": self.flops / gpu.tensor,
            "L2": self.l2_bytes / gpu.l2,
            "DRAM": (self.bytes_read + self.bytes_written) / gpu.dram,
        }

    def bound(self, gpu: GPU) -> tuple[str, float]:
        """The worst limit, and its seconds."""
        limits = self.limits(gpu)
        worst = max(limits, key=limits.__getitem__)
        return worst, limits[worst]

    def as_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def step(
    model: str = "stvit_small",
    *,
    batch: int = 128,
    size: int = 224,
    capability: int = 90,
    dtype: torch.dtype = torch.bfloat16,
    autocast: bool = False,
    inference: bool = False,
) -> list[Cost]:
    """The Triton kernels of one training step (forward and backward), or of a forward pass, of a model of stvit on
    images (batch, 3, size, size), in channels_last. Compiled for a GPU of `capability`, 80 or 90. Costs of one
    launch are counted on one image's share of its blocks."""
    recorded = launches(model, batch=batch, size=size, dtype=dtype, autocast=autocast, inference=inference)
    return tally(recorded, measured(recorded, batch=batch, capability=capability))


def launches(
    model: str, *, batch: int, size: int, dtype: torch.dtype = torch.bfloat16, autocast: bool = False,
    inference: bool = False,
) -> list[Recorded]:  # fmt: skip
    """What a step launches, in order; nothing runs."""
    counted = count(
        lambda: getattr(stvit, model)(backend="triton", drop_path_rate=0.1),
        batch, size, dtype, inference=inference, autocast=autocast,
    )  # fmt: skip
    return [record(launched) for launched in counted.launches]


def measured(recorded: Iterable[Recorded], *, batch: int, capability: int) -> dict[str, Cost]:
    """What each distinct launch costs, by its key; by as many processes as there are cores."""
    distinct = {launch.key: launch for launch in recorded}
    with compiling_processes(len(os.sched_getaffinity(0))) as pool:
        found = {key: pool.submit(measure, launch, batch, capability) for key, launch in distinct.items()}
        return {key: future.result() for key, future in found.items()}


def tally(recorded: Iterable[Recorded], costs: dict[str, Cost]) -> list[Cost]:
    """The distinct costs of these launches, each with its number of launches."""
    return [replace(costs[key], launches=times) for key, times in Counts(each.key for each in recorded).items()]


def measure(recorded: Recorded, images: int, capability: int) -> Cost:
    """One launch, in a process where Triton compiles."""
    torch.set_num_threads(1)
    launch, times = replay(recorded, capability, images)
    counters, code = launch.counters, machine_code(launch.compiled, launch.counters)
    pipes: Counts[str] = Counts()
    for name, executed in code.executed.items():
        pipes[PIPE_OF.get(name, "other")] += executed
    loads, stores = (counters.memory(f"global {kind}") for kind in ("load", "store"))
    shared = [counters.memory(f"shared {kind}") for kind in ("load", "store")]
    wavefronts = sum(site.found for site in shared)
    return Cost(
        op=recorded.op,
        phase=recorded.phase,
        kernel=recorded.kernel,
        shape=recorded.shape,
        launches=1,
        grid=launch.grid,
        warps=launch.kernel.program.threads // 32,
        registers=code.registers,
        stack=code.stack,
        shared=launch.kernel.shared,
        instructions=times * sum(code.executed.values()),
        pipes={pipe: times * n for pipe, n in pipes.items()},
        matched=code.matched,
        ptx=times * counters.warp_instructions,
        classes={kind: times * n for kind, n in counters.by_class().items()},
        flops=times * flops(counters),
        loads=(times * loads.found, times * loads.best),
        stores=(times * stores.found, times * stores.best),
        wavefronts=(times * wavefronts, times * sum(site.best for site in shared)),
        passes=times * (wavefronts + _global_passes(counters)),
        bytes_read=sum(min(times * tensor.read, tensor.size) for tensor in counters.touched),
        bytes_written=sum(min(times * tensor.written, tensor.size) for tensor in counters.touched),
        l2_bytes=times * counters.l2_bytes,
    )


def _global_passes(counters: Counters) -> int:
    """A warp's request passes the load/store units once, and once more for every 128 bytes' worth of sectors."""
    return sum(
        max(site.requests, site.found * SECTOR // 128)
        for instruction, site in counters.sites.items()
        if classify(instruction.name).startswith("global")
    )


def flops(counters: Counters) -> float:
    """Of products of matrices; each of a warp group's four warps executes a wgmma."""
    total = 0.0
    for name, executed in counters.by_name().items():
        if found := re.match(r"(wg)?mma(?:_async)?\..*?m(\d+)n(\d+)k(\d+)", name.replace("wgmma.mma_async", "wgmma")):
            m, n, k = map(int, found.groups()[1:])
            total += 2 * m * n * k * executed / (4 if found[1] else 1)
    return total
