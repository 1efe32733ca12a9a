"""A file on the Hub as a file to read from: each read is a request, but of the beginning, which is here already."""

from __future__ import annotations

import io
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from planner.expr import RemoteFile

if TYPE_CHECKING:
    from moeplan.hub import Hub

HEADS_AT_ONCE = 8


class _RangeStream(io.RawIOBase):
    """A file on the Hub as a file to read from, whose beginning, `head`, is here."""

    def __init__(self, hub: Hub, file: RemoteFile, head: bytes) -> None:
        super().__init__()
        self._hub = hub
        self._file = file
        self._head = head
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.nbytes}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, memory: Any) -> int:
        begin = self._position
        end = min(begin + len(memory), self._file.nbytes)
        if begin >= end:
            return 0
        data = self._head[begin:end] or self._hub.read(self._file, begin, end - begin)
        memory[: len(data)] = data
        self._position += len(data)
        return len(data)


class RemoteStream(io.BufferedReader):
    """The same, for reading as much as is asked for; of a file that takes many small reads, several at once."""

    def __init__(self, hub: Hub, file: RemoteFile, head: bytes) -> None:
        super().__init__(_RangeStream(hub, file, head), 1)  # a larger buffer would be filled each time
        self._hub = hub
        self._file = file

    def read_each(self, offsets: Collection[int], nbytes: int) -> list[bytes]:
        """`nbytes` bytes from each offset. Raises RunError."""
        with ThreadPoolExecutor(HEADS_AT_ONCE) as workers:
            return list(workers.map(lambda offset: self._hub.read(self._file, offset, nbytes), offsets))
