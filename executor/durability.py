"""When what is written is on the disk for good."""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future

from executor.errors import RunError
from executor.journal import Journal
from executor.writer import ShardWriter

SYNC_SECONDS = 10.0
"""How often what is written is put on the disk: the most work that a machine that goes down can lose."""


class Durability:
    """Puts what `writer` wrote on the disk, in a `worker` while more is written, and has the journal say so."""

    def __init__(self, writer: ShardWriter, journal: Journal, worker: Executor) -> None:
        self._writer = writer
        self._journal = journal
        self._worker = worker
        self._syncing: Future[None] | None = None
        self._synced = time.monotonic()

    def now_and_then(self) -> None:
        """Begin to, if the last time is long ago. One thread at a time calls this. Raises RunError where it failed."""
        if self._syncing is not None and self._syncing.done():
            self._syncing.result()
            self._syncing, self._synced = None, time.monotonic()
        if self._syncing is None and time.monotonic() - self._synced > SYNC_SECONDS:
            self._syncing = self._worker.submit(self._sync)

    def finish(self) -> None:
        """Do, and wait for it. Raises RunError where that failed at any time: the system says so once."""
        if self._syncing is not None:
            self._syncing.result()
        self._sync()

    def _sync(self) -> None:
        position = self._journal.position
        try:
            self._writer.sync()
        except RunError:
            self._journal.distrust()
            raise
        self._journal.mark_safe(position)
