"""Showing how far a merge is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

if TYPE_CHECKING:
    from executor.engine import Progress


LINE_SECONDS = 10.0
NARROW = 70
"""In fewer columns the bar is short, and without the rate."""
ROUTERS = "routers"
ROUTING = "routing"
"""What `moeplan routes` does. It is measured by no bytes."""


class ProgressBar:
    """Bytes, rate and time left of a run that moves `total_nbytes`, on a terminal; of routing, the share. Where bytes
    do not tell how long it takes, it is the time so far that goes on."""

    def __init__(self, console: Console, total_nbytes: int) -> None:
        from rich import progress  # here, because a plan alone has no use for it

        is_narrow = console.width < NARROW
        bar = progress.BarColumn(bar_width=8 if is_narrow else 24)
        self._always = (progress.TextColumn("{task.description:8}"), bar)
        self._share = progress.TaskProgressColumn()
        self._nbytes = progress.DownloadColumn()
        self._pace = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn(compact=True))[is_narrow:]
        self._elapsed = progress.TimeElapsedColumn()
        self._bar = progress.Progress(*self._always, console=console, transient=True)
        self._task = self._bar.add_task("loading", total=total_nbytes)
        self._bar.start()

    def show(self, state: Progress) -> None:
        doing = _doing(state)
        if doing == ROUTING:
            self._bar.columns = (*self._always, self._share, self._elapsed)
        elif doing == ROUTERS:
            self._bar.columns = (*self._always, self._nbytes, self._elapsed)
        else:
            self._bar.columns = (*self._always, self._nbytes, *self._pace)
        self._bar.update(self._task, completed=state.written_nbytes, description=doing)

    def stop(self) -> None:
        self._bar.stop()


class ProgressLines:
    """The same in a line now and then, for logs and pipes."""

    def __init__(self, console: Console, total_nbytes: int) -> None:
        self._console = console
        self._total = total_nbytes
        self._last = time.monotonic()
        self._said = False
        self._first: tuple[float, int] | None = None

    def show(self, state: Progress) -> None:
        if state.doing == "syncing":
            if self._said:
                self._console.print("syncing: waiting until everything is on the disk")
            return
        now = time.monotonic()
        # What came before the first chunk, such as loading libraries, says nothing about the rate.
        self._first = self._first or (now, state.written_nbytes)
        if now - self._last < LINE_SECONDS:
            return
        self._last, self._said = now, True
        doing = _doing(state)
        said = [f"{doing}: {100 * state.written_nbytes // self._total}%"]
        if doing != ROUTING:
            said.append(f"{decimal(state.written_nbytes)} of {decimal(self._total)}")
        if doing not in (ROUTING, ROUTERS):  # how long these take is not told by bytes
            seconds, nbytes = now - self._first[0], state.written_nbytes - self._first[1]
            rate = nbytes / seconds if seconds else 0.0
            said.append(f"{decimal(int(rate))}/s")
            if rate:
                said.append(f"{_duration((self._total - state.written_nbytes) / rate)} left")
        self._console.print(", ".join(said))

    def stop(self) -> None:
        """Nothing to clean up."""


def progress_on(console: Console, total_nbytes: int) -> ProgressBar | ProgressLines:
    """What fits `console`. A file is no terminal, though the environment may have rich write colours into it."""
    shows_bars = console.is_interactive and console.file.isatty()
    return (ProgressBar if shows_bars else ProgressLines)(console, total_nbytes)


def _doing(state: Progress) -> str:
    """What runs now, in a word. The executor names kernels, and those make routers."""
    known = ("syncing", "verifying", "fetching", ROUTING)
    return "copying" if not state.doing else state.doing if state.doing in known else ROUTERS


def _duration(seconds: float) -> str:
    """`40 s`, `12 min`, `1 h 5 min`"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
