"""What ends a run early, each with its exit code and one line for the user instead of a traceback."""


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
