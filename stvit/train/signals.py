"""SIGTERM and SIGUSR1: schedulers send them before they take a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Within the block these signals are remembered, and all processes agree on the step after which they stop.

    A signal reaches processes at different steps, and one that stops alone leaves the others waiting. So each step
    begins a sum of everyone's flags and reads that of the step before: nobody waits, and all read the same. It goes
    through a group of its own on the CPU. Repeated signals are ignored: torchrun and SLURM may both send one.
    """

    def __init__(self, world_size: int) -> None:
        self.received = ""
        self._group: Any = dist.new_group(backend="gloo") if world_size > 1 else None
        self._pending: tuple[torch.Tensor, Any] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether to stop now; every process must ask equally often."""
        if self._group is None:
            return bool(self.received)
        flag = torch.tensor(int(bool(self.received)))
        before, self._pending = self._pending, (flag, dist.all_reduce(flag, group=self._group, async_op=True))
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    @property
    def name(self) -> str:
        """The signal for the user to see; it may have reached another process only."""
        return self.received or "a signal to another process"


def ignore_in_worker(_: int) -> None:
    """Loader processes leave Ctrl-C and the signals above to the process that trains: its step needs their images."""
    for number in (signal.SIGINT, *SIGNALS):
        signal.signal(number, signal.SIG_IGN)
