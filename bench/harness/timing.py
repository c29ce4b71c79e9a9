"""How every benchmark measures: warm-up, repeats, median with spread, peak memory, bandwidth of a large copy.

On a GPU time is taken by CUDA events around each repeat, with inputs rotated through more memory than the L2 cache
holds, so that no repeat finds its input there. On the CPU it is wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

ROTATED_BYTES = 256 * 2**20  # more than the L2 cache of any GPU so far (H100 50 MB, B200 126 MB)


class Timing(NamedTuple):
    """Milliseconds a call: median, 20th and 80th percentile over `repeats` calls."""

    median: float
    p20: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        median, p20, p80 = torch.tensor(times, dtype=torch.float64).quantile(quantiles).tolist()
        return cls(median, p20, p80, len(times))


def copies_needed(bytes_a_call: int) -> int:
    """Sets of inputs to rotate through so that they don't all fit the L2 cache; at least 2, at most 64."""
    return max(2, min(64, ROTATED_BYTES // max(1, bytes_a_call) + 1))


def measure(
    calls: Sequence[Callable[[], Any]], device: torch.device, *,
    warmup: int = 3, repeats: int = 20, seconds: float = 2.0, queue_ms: float = 0.0,
) -> Timing:  # fmt: skip
    """Times calls[0], calls[1], ... in turn, one per repeat: at least 3 repeats, then until `repeats` or `seconds`.

    queue_ms: a GPU waits so long before each repeat's clock starts. Where that is more than `host_ms`, the host has
    queued the whole call by then, and the time is the GPU's alone; 0 times the launches too.
    """
    for i in range(warmup):
        calls[i % len(calls)]()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < repeats and time.perf_counter() - began < seconds):
        call = calls[len(times) % len(calls)]
        times.append(_gpu_ms(call, queue_ms) if device.type == "cuda" else _cpu_ms(call))
    return Timing.of(times)


def _cpu_ms(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def host_ms(call: Callable[[], Any], device: torch.device) -> float | None:
    """Milliseconds that the host needs to launch a call, the median of five; None on the CPU."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        times.append(_cpu_ms(call))
    torch.cuda.synchronize()
    return sorted(times)[2]


def _gpu_ms(call: Callable[[], Any], queue_ms: float = 0.0) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queue_ms > 0:
        torch.cuda._sleep(int(queue_ms * 2e6))  # clock cycles; GPUs run at about 2 GHz
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of device memory that one call takes at its peak beyond what is held already; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes a second, read plus written, of a large device copy: what the floor of an op is held against."""
    nbytes = nbytes or (2**30 if device.type == "cuda" else 2**26)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    timing = measure([lambda: target.copy_(source)], device, repeats=30)
    return 2 * nbytes / (timing.median * 1e-3)
