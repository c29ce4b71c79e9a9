"""``--processes N``: torchrun's launcher, without its report of thirty lines when a process fails."""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence


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
    try:
        elastic_launch(config, sys.executable)("-m", "stvit.train", *argv)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:  # passed on to the processes, which have ended
        return 128 + int(error.sigval)
    return 0


def _quiet() -> None:
    """Silence the launcher, whose modules have levels of their own: the program says itself what happened."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
