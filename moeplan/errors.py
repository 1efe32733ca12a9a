"""What moeplan tells its user: errors that end a command, and warnings that do not."""

from planner.errors import UserError


class MoeplanWarning(UserWarning):
    """Something the user should know that does not stop a merge."""


__all__ = ["MoeplanWarning", "UserError"]
