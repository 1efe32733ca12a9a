"""What can go wrong while a plan runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from planner.errors import UserError


class RunError(UserError):
    """A run that had to stop: a full disk, an I/O error, a source that changed."""

    exit_status = 1


class HopelessError(RunError):
    """One that the same run would meet again, so what it wrote until then is of no use."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an OSError within into a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
