"""Writing ranges of output shards, durably."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from executor.errors import RunError
from planner.layout import Shard


class ShardWriter:
    """Output shards under way in `directory`, at full size from the start. Safe to write to from several threads.

    Raises RunError, from any method, where the disk is full or fails.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        self._directory = directory
        self._paths = [directory / shard.filename for shard in shards]
        self._fds: list[int] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for number, shard in enumerate(shards):
                self._create(number, shard.nbytes)
                self.write(number, 0, memoryview(shard.header()))
            on_error.pop_all()

    def _create(self, number: int, nbytes: int) -> None:
        try:
            fd = os.open(self._paths[number], os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._fds.append(fd)
            # Asking for the space now finds a disk that is too small before an hour is spent on it.
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            raise self._failed(number, error) from error

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Put `data` at byte `offset` of a shard."""
        while len(data):
            try:
                count = os.pwrite(self._fds[shard], data, offset)
            except OSError as error:
                raise self._failed(shard, error) from error
            data, offset = data[count:], offset + count

    def sync(self) -> None:
        """Wait until every shard is on the disk."""
        for number, fd in enumerate(self._fds):
            try:
                os.fsync(fd)
            except OSError as error:
                raise self._failed(number, error) from error

    def _failed(self, shard: int, error: OSError) -> RunError:
        path = self._paths[shard]
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(f"{path}: the disk is full. Free some space and start again")
        return RunError(f"{path}: writing failed: {error.strerror}")

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
