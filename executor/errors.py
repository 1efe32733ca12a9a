"""What can go wrong while a plan runs."""

from planner.errors import UserError


class RunError(UserError):
    """A run that had to stop: a full disk, an I/O error, a source that changed."""

    exit_status = 1
