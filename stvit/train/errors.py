"""What ends a run early, each with its exit code and one line for the user instead of a traceback."""

from __future__ import annotations


class Stop(Exception):
    """A run ends here; the message is for the user."""

    exit_code = 1


class UserError(Stop):
    """A flag, a path or a file is wrong."""

    exit_code = 2


class LossNotFinite(Stop):
    """The training loss became NaN or infinite."""


class Interrupted(Stop):
    """Ctrl-C during the run."""

    exit_code = 130


class Preempted(Stop):
    """SIGTERM or SIGUSR1; the state was saved."""

    exit_code = 143


def disk_error(error: OSError) -> Stop:
    """For a file that can't be written: "PATH: no space left on device"."""
    where = error.filename or "standard output"
    return Stop(f"{where}: {(error.strerror or str(error)).lower()}; files that were there are as they were")
