"""``--processes N``: torchrun's launcher, without its report of thirty lines when a process fails."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # those of torchrun
LATER = 0.01  # seconds


def launch(argv: Sequence[str], processes: int) -> int:
    """Run the program in ``processes`` processes of this machine; returns the first failure's exit code, or 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    if any(field.name == "signals_to_handle" for field in dataclasses.fields(config)):  # not before torch 2.9
        config.signals_to_handle = ""
        for number in SIGNALS:
            signal.signal(number, _stop)
    try:
        elastic_launch(config, sys.executable)("-m", "stvit.train", *argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:  # passed on to the processes, which have ended
        return 128 + int(error.sigval)
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise what the launcher stops by; a little later where the signal finds it within ``subprocess``.

    An exception there can leave the lock of a process taken, for which the launcher then waits for ever.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException

    while frame is not None:
        if frame.f_code.co_filename == subprocess.__file__:
            again = threading.Timer(LATER, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise SignalException(f"Process {os.getpid()} got signal: {number}", sigval=signal.Signals(number))


def _quiet() -> None:
    """Silence the launcher, whose modules have levels of their own: the program says itself what happened."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
