"""What ends a run before its time: Ctrl-C, SIGTERM, and a terminal that is closed."""

from __future__ import annotations

import signal

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heed() -> None:
    """From now on each of them raises KeyboardInterrupt, so that what is on the disk and mounted is taken away first;
    but for what is ignored, as `nohup` has SIGHUP."""
    for number in INTERRUPTIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
