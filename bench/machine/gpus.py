"""GPUs as a few numbers, each with where it is from."""

from __future__ import annotations

from typing import NamedTuple

GUIDE = "CUDA C++ programming guide 13.0, tables of compute capabilities and of arithmetic throughput"
SCHEDULERS = 4  # of a multiprocessor, each issues an instruction a clock (GUIDE)
INTEGER_LANES = 64  # of a multiprocessor: integers, comparisons, selections, multiplications of integers (GUIDE)
SPECIAL_LANES = 16  # of a multiprocessor: exponentials, reciprocals, conversions (GUIDE)
REGISTERS = 65536  # of a multiprocessor, given to warps in units of 256 (GUIDE)
RESERVED = 1024  # bytes of shared memory that a block takes beside its own (GUIDE)


class GPU(NamedTuple):
    """Per multiprocessor: lanes for float32, warps, blocks, bytes of shared memory (GUIDE). Of the whole: clock in Hz,
    bytes a second of DRAM and of the L2 cache, and 16-bit products by tensor cores, operations a second, dense."""

    name: str
    capability: int
    multiprocessors: int
    clock: float
    float_lanes: int
    warps: int
    blocks: int
    shared: int
    dram: float
    l2: float
    tensor: float
    source: str

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Blocks of so many warps that a multiprocessor holds at a time."""
        by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
        return min(by_registers, self.shared // (shared + RESERVED), self.warps // warps, self.blocks)


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU(
            "A100", 80, 108, 1.41e9, 64, 64, 32, 164 << 10, 2.039e12, 7.22e12, 312e12,
            "NVIDIA A100 whitepaper (SXM4): boost clock, 5120 bytes a clock of L2; datasheet of the 80 GB part: DRAM",
        ),
        GPU(
            "H100", 90, 132, 1.83e9, 128, 64, 32, 228 << 10, 3.352e12, 5.5e12, 989e12,
            "NVIDIA H100 whitepaper (SXM5): the clock at which its peak of tensor cores holds, DRAM; L2: about what "
            "chipsandcheese.com measured on the PCIe part (2 July 2023), NVIDIA states none",
        ),
        GPU(
            "RTX 4090", 89, 128, 2.52e9, 128, 48, 24, 100 << 10, 1.008e12, 5.0e12, 165e12,
            "NVIDIA Ada whitepaper: boost clock, DRAM, products summed in float32; L2: an assumption of about H100's, "
            "NVIDIA states none",
        ),
        GPU(
            "B200", 100, 148, 1.85e9, 128, 64, 32, 228 << 10, 8.0e12, 11.0e12, 2250e12,
            "NVIDIA Blackwell datasheet: DRAM, products; multiprocessors and a clock like H100's: chipsandcheese.com "
            "on B200; L2: an assumption of twice H100's, for its two dies",
        ),
    )
}  # fmt: skip
COUNTED_AS = {80: 80, 89: 80, 90: 90, 100: 90}  # whose code is counted: none newer than 9.0 is emulated
DEFAULT = {80: "A100", 90: "H100"}
