"""Writing ranges of output shards, durably, and past the page cache where that is possible.

Direct I/O writes whole pages, from memory aligned to pages, straight to the disk. It spares a copy of every byte and
does not fill the page cache with an output that nobody reads soon. What does not fit (the edges of a range, small
ranges, file systems without direct I/O) goes through the page cache; no page goes both ways, unless the system takes a
part of it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

from executor.errors import RunError, naming
from executor.files import fsync, reserve, sync, write_all
from executor.local import MIN_DIRECT_NBYTES
from executor.shortcuts import Reflink, whole_pages
from planner.layout import PAGE, Shard
from planner.plan import FileSink


class ShardWriter:
    """Output shards under way in `directory`, at full size from the start. Safe to write to from several threads.

    A shard that is there already, from a run that was interrupted, keeps what is in it.

    `nbytes` counts what was written, by way: "direct", "buffered". Raises RunError, from any method, where the disk is
    full or fails.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        self.nbytes: Counter[str] = Counter()
        self._lock = Lock()
        self._directory = directory
        self._shards = shards
        self._paths = [directory / shard.filename for shard in shards]
        self._fds: list[int] = []
        self._direct_fds: list[int | None] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for number, shard in enumerate(shards):
                self._create(number, shard.nbytes)
                self.write(number, 0, memoryview(shard.header()))
            on_error.pop_all()

    def fd(self, shard: int) -> int:
        """The open file of a shard."""
        return self._fds[shard]

    def tensor(self, sink: FileSink) -> str:
        """The name of the output tensor that `sink` is in."""
        tensors = self._shards[sink.shard].tensors
        return next(t.name for t in tensors if t.offset <= sink.offset < t.offset + t.nbytes)

    def reserve(self, shard: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the space for byte ranges (begin, end) now: a disk that is too small shows before an hour is spent."""
        for begin, end in _merged(ranges):
            with naming(self._paths[shard]):
                reserve(self._fds[shard], begin, end - begin)

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Put `data` at byte `offset` of a shard."""
        begin = -offset % PAGE
        end = len(data) - (offset + len(data)) % PAGE
        fd = self._direct_fds[shard]
        if fd is None or end - begin < MIN_DIRECT_NBYTES or (_address(data) + begin) % PAGE:
            self._write(shard, offset, data)
            return
        self._write(shard, offset, data[:begin])
        done = begin + self._write_direct(shard, fd, offset + begin, data[begin:end])
        self._write(shard, offset + done, data[done:])

    def share(self, origin: FileSink, target: FileSink, nbytes: int) -> tuple[int, int]:
        """Make `nbytes` at `target` share extents with those at `origin`, as far as that goes; returns which part."""
        begin, end = whole_pages(origin.offset, target.offset, nbytes)
        source, sink = self._fds[origin.shard], self._fds[target.shard]
        shared = Reflink().move(source, origin.offset + begin, sink, target.offset + begin, end - begin)
        self._count("shared within the output", shared)
        return begin, begin + shared

    def read_back(self, shard: int, offset: int, memory: memoryview) -> None:
        """Fill `memory` with what was written at byte `offset` of a shard."""
        while len(memory):
            with naming(self._paths[shard]):
                count = os.preadv(self._fds[shard], [memory], offset)
            if count == 0:
                raise RunError(f"{self._paths[shard]}: ends at byte {offset}; it was changed during the run")
            memory, offset = memory[count:], offset + count

    def sync(self) -> None:
        """Wait until every shard, and its name, is on the disk."""
        for path, fd in zip(self._paths, self._fds, strict=True):
            with naming(path):
                fsync(fd)
        with naming(self._directory):
            sync(self._directory)

    def close(self) -> None:
        for fd in (*self._fds, *self._direct_fds):
            if fd is not None:
                os.close(fd)
        self._fds.clear()
        self._direct_fds.clear()

    def _create(self, number: int, nbytes: int) -> None:
        path = self._paths[number]
        with naming(path):
            self._fds.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
            os.ftruncate(self._fds[number], nbytes)
        try:
            self._direct_fds.append(os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC))
        except (OSError, AttributeError):  # a file system, or a system, without it
            self._direct_fds.append(None)

    def _write(self, shard: int, offset: int, data: memoryview) -> None:
        with naming(self._paths[shard]):
            write_all(self._fds[shard], data, offset)
        self._count("buffered", len(data))

    def _write_direct(self, shard: int, fd: int, offset: int, data: memoryview) -> int:
        """Write whole pages from the start of `data`; returns how many bytes, which may be fewer, or none."""
        with naming(self._paths[shard]):
            try:
                done = os.pwrite(fd, data, offset)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                done = 0
        self._count("direct", done)
        return done

    def _count(self, way: str, nbytes: int) -> None:
        with self._lock:
            self.nbytes[way] += nbytes


def _address(memory: memoryview) -> int:
    """Where `memory` lies; 1, which is aligned to nothing, where it cannot be asked."""
    return 1 if memory.readonly else ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif begin < end:
            merged.append((begin, end))
    return merged
