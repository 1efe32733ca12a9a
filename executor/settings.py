"""Settings of the whole process, which several threads may want at the same time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from threading import Lock


class Shared:
    """Makes one context manager for all threads of a function that gives one: who is within first enters that, and who
    is within last leaves it. So settings are put back when nobody needs them any more, to what they were before."""

    def __init__(self, settings: Callable[[], AbstractContextManager[None]]) -> None:
        self._settings = settings
        self._lock = Lock()
        self._within = 0
        self._entered = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                self._entered.enter_context(self._settings())
            self._within += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._entered.close()
