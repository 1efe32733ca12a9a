"""The root of every error whose message is meant for the user.

Such an error names the thing that is wrong and what to do about it, and is printed without a traceback.
"""


class UserError(Exception):
    """Something the user can mend. `exit_status` is 2 for usage, configuration and sources, 1 for a failed run."""

    exit_status = 2


class BudgetError(UserError):
    """A plan needs more memory than it may use.

    `needed_nbytes` is the smallest budget that works.
    """

    def __init__(self, message: str, needed_nbytes: int) -> None:
        super().__init__(message)
        self.needed_nbytes = needed_nbytes
