"""Ctrl-C: the process ends within a second, wherever it is, with status 130 and a word on how to go on.

Python raises KeyboardInterrupt in the main thread, when that comes to its next bytecode. That is the orderly end, and
not enough: the main thread may wait for a kernel, a server or a library that is being loaded, and an exception in the
middle of an import is a traceback. So before there is anything to put in order, and when Ctrl-C is pressed again, the
process ends at once; and a thread that the system's own signal handler wakes ends it when an orderly end takes long.
Ending at once loses nothing, since a merge can be killed anywhere and gone on with.

So that thread also ends it, at once, where it is told to terminate, or its terminal is closed: what somebody would find
in a cache or a temporary directory is removed before.

This imports nothing that takes time: it has to be there first.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from types import FrameType, TracebackType
from typing import Any

GRACE_SECONDS = 0.5
"""How long an orderly end may take."""

STATUS = 128 + signal.SIGINT
"""As shells have it."""

AT_ONCE = (signal.SIGTERM, signal.SIGHUP)
"""What ends the process without an orderly end."""

WATCHER = "Ctrl-C"
"""The name of the thread that waits for it."""

STDERR = 2
SHOW_CURSOR = "\x1b[?25h"
"""Progress bars hide it."""

_is_orderly = False
_message = "interrupted"
_clearing: list[Callable[[], None]] = []


def watch() -> None:
    """From now on, Ctrl-C ends this process: at once, but for what runs `in_order`. Who started it may have it ignored,
    as shells have of what a script leaves in the background, and nohup of a terminal that is closed: it stays so."""
    awaited, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    for number in (signal.SIGINT, *AT_ONCE):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt if number == signal.SIGINT else _leave_to_watcher)
    sys.unraisablehook = _unraisable
    sys.excepthook = _printed
    Thread(target=_end_in_time, args=(awaited,), name=WATCHER, daemon=True).start()


def unwatch() -> None:
    """Everything is done: Ctrl-C changes nothing any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def in_order(message: str) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt within; `message` is what is said if that does not end the process in time."""
    global _is_orderly, _message
    _is_orderly, _message = True, message
    try:
        yield
    except BaseException as error:
        if _is_orderly:
            raise
        _message = ""  # the caller says it
        if isinstance(error, KeyboardInterrupt):
            raise
        interrupt = KeyboardInterrupt()  # which a library has made an error of its own of
        for note in getattr(error, "__notes__", ()):
            interrupt.add_note(note)
        raise interrupt from error
    finally:
        _is_orderly = False


def clear_at_end(clear: Callable[[], None]) -> None:
    """From now on, `clear` is called where the process is ended at once. It must not wait for anything."""
    if clear not in _clearing:
        _clearing.append(clear)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _is_orderly
    if not _is_orderly:
        _end()
    _is_orderly = False  # who presses it again does not want to wait
    raise KeyboardInterrupt


def _leave_to_watcher(number: int, frame: FrameType | None) -> None:
    """Stands in for what the system does on a signal."""


def _unraisable(what: Any) -> None:
    """Stands in for `sys.unraisablehook`: in destructors and callbacks Python reports what is raised, and goes on."""
    if what.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(what)


def _printed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Stands in for `sys.excepthook`: libraries in C print what is raised while they are imported, and go on."""
    if issubclass(kind, KeyboardInterrupt):
        _end()
    sys.__excepthook__(kind, error, trace)


def _end_in_time(awaited: int) -> None:
    number = 0
    while number not in (signal.SIGINT, *AT_ONCE):
        number = os.read(awaited, 1)[0]
    if number == signal.SIGINT:
        time.sleep(GRACE_SECONDS)
    _end(number)


def _end(number: int = signal.SIGINT) -> None:
    """End the process, whatever its other threads are at."""
    for clear in _clearing:
        with suppress(Exception):
            clear()
    start = f"{SHOW_CURSOR}\n" if os.isatty(STDERR) else ""
    with suppress(OSError):
        os.write(STDERR, f"{start}error: {_message}\n".encode() if _message else b"")
    os._exit(128 + number)
