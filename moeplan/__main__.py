"""The `moeplan` command, and `python -m moeplan`. Ctrl-C is taken care of before what takes time is imported."""

from __future__ import annotations

import atexit
import gc
import sys

from moeplan import interruption


def main() -> None:
    """Run the command with the process's arguments. Raises SystemExit."""
    interruption.watch()
    gc.set_threshold(200_000)  # a plan is many objects and no garbage, and looking for it took a third of the time
    atexit.register(gc.freeze)  # else Python goes through all of torch once more before it ends: a third of a second
    from moeplan.cli import run

    try:
        run(sys.argv[1:])
    finally:
        interruption.unwatch()


if __name__ == "__main__":
    main()
