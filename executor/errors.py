"""What can go wrong while a plan runs."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from planner.errors import UserError


class RunError(UserError):
    """A run that had to stop: a full disk, an I/O error, a source that changed."""

    exit_status = 1


class HopelessError(RunError):
    """One that the same run would meet again, so what it wrote until then is of no use."""


class OutOfRangeError(HopelessError):
    """A weight that has no place in the dtype that it is to be written in."""


def reason(error: OSError) -> str:
    """What went wrong, in words, with what can be done about it where that is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space"
    if error.errno == errno.EMFILE:
        return "more files would be open than this process may have; raise the limit (`ulimit -n`)"
    return error.strerror or str(error)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an OSError within into a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {reason(error)}") from error


@contextmanager
def starting_threads() -> Iterator[None]:
    """Turns what Python raises within, where the system lets no more threads be started, into a RunError."""
    try:
        yield
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        raise RunError(
            "the system lets this process start no more threads; raise the limit on processes (`ulimit -u`) or memory "
            "(`ulimit -v`)"
        ) from error
