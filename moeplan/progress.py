"""Showing how far a merge is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich import progress
from rich.console import Console
from rich.filesize import decimal

from executor.engine import Progress

LINE_SECONDS = 5.0


class ProgressBar:
    """Bytes, rate and time left of a run that writes `total_nbytes`, on a terminal."""

    def __init__(self, console: Console, total_nbytes: int) -> None:
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("merging", total=total_nbytes)
        self._bar.start()

    def show(self, state: Progress) -> None:
        doing = state.doing.replace("_", " ") or "merging"
        self._bar.update(self._task, completed=state.written_nbytes, description=doing)

    def stop(self) -> None:
        self._bar.stop()


class ProgressLines:
    """The same in a line now and then, for logs and pipes."""

    def __init__(self, console: Console, total_nbytes: int) -> None:
        self._console = console
        self._total = total_nbytes
        self._started = self._last = time.monotonic()

    def show(self, state: Progress) -> None:
        now = time.monotonic()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        rate = state.written_nbytes / (now - self._started)
        # Until some of it is done, the rate says more about what had to be loaded than about what is to come.
        started = state.written_nbytes > self._total / 50
        left = f", {(self._total - state.written_nbytes) / rate:.0f} s left" if started else ""
        self._console.print(
            f"{decimal(state.written_nbytes)} of {decimal(self._total)}, {decimal(int(rate))}/s{left}", highlight=False
        )

    def stop(self) -> None:
        """Nothing to clean up."""


def progress_on(console: Console, total_nbytes: int) -> ProgressBar | ProgressLines:
    """What fits `console`."""
    return (ProgressBar if console.is_terminal else ProgressLines)(console, total_nbytes)
