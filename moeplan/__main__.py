"""The `moeplan` command, and `python -m moeplan`. Ctrl-C is taken care of before what takes time is imported."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from contextlib import suppress

from moeplan import interruption


def main() -> None:
    """Run the command with the process's arguments. Raises SystemExit."""
    interruption.watch()
    gc.set_threshold(200_000)  # a plan is many objects and no garbage, and looking for it took a third of the time
    atexit.register(gc.freeze)  # else Python goes through all of torch once more before it ends: a third of a second
    from moeplan.cli import run

    try:
        run(sys.argv[1:])
    except SystemExit as ended:
        if any(thread.daemon and thread.name != interruption.WATCHER for thread in threading.enumerate()):
            _leave(ended.code)
        raise
    finally:
        interruption.unwatch()


def _leave(status: int | str | None) -> None:
    """End the process as it is: a thread may still be loading a library, and Python's own end, which takes everything
    down around it, can crash it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    main()
