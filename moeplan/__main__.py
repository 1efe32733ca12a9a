"""The `moeplan` command, and `python -m moeplan`. Ctrl-C is taken care of before what takes time is imported."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import threading
from contextlib import suppress

from moeplan import interruption


def main() -> None:
    """Run the command with the process's arguments. Raises SystemExit."""
    _open_standard_streams()
    interruption.watch()
    gc.set_threshold(200_000)  # a plan is many objects and no garbage, and looking for it took a third of the time
    from moeplan.cli import run

    try:
        run(sys.argv[1:])
    except SystemExit as ended:
        interruption.unwatch()
        if any(thread.daemon and thread.name != interruption.WATCHER for thread in threading.enumerate()):
            _leave(ended.code)
        if "torch" in sys.modules:  # which Python would take apart first, for a tenth of a second and more
            atexit._run_exitfuncs()
            _leave(ended.code)
        raise


def _open_standard_streams() -> None:
    """Have all three, though who started the process may have closed some: the next files that are opened would get
    their numbers, and what libraries say there. What standard output has no character for is a question mark there,
    which keeps columns as wide as they are."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _leave(status: int | str | None) -> None:
    """End the process as it is, without Python's own end, which takes everything down: a thread may still be loading a
    library, and that crashes there."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main()
