"""What can go wrong while a plan runs."""

from planner.errors import UserError


class RunError(UserError):
    """A run that had to stop: a full disk, an I/O error, a source that changed."""

    exit_status = 1


class HopelessError(RunError):
    """One that the same run would meet again, so what it wrote until then is of no use."""
