"""Reading ranges of source files, and noticing when a source is no longer the file that was planned for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from xxhash import xxh3_64_intdigest

from executor.errors import RunError
from planner.expr import SourceFile

DONTNEED = getattr(os, "POSIX_FADV_DONTNEED", None)
"""Advice, where the system takes it, to forget what was read: nothing is read twice, and others need the page cache."""


class SourceReader:
    """Open source files. Safe to read from several threads at once."""

    def __init__(self, sources: Sequence[SourceFile]) -> None:
        self._sources = sources
        self._fds: list[int] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for source in sources:
                try:
                    self._fds.append(os.open(source.path, os.O_RDONLY | os.O_CLOEXEC))
                except OSError as error:
                    raise RunError(f"{source.path}: cannot be opened any more: {error.strerror}") from error
            self.check_unchanged()
            on_error.pop_all()

    def fd(self, source: int) -> int:
        """The open file of a source."""
        return self._fds[source]

    def read_into(self, source: int, offset: int, memory: memoryview) -> None:
        """Fill `memory` from byte `offset` of a source. Raises RunError where the file ends too early or fails."""
        path = self._sources[source].path
        while len(memory):
            try:
                count = os.preadv(self._fds[source], [memory], offset)
            except OSError as error:
                raise RunError(f"{path}: reading at byte {offset} failed: {error.strerror}") from error
            if count == 0:
                raise RunError(f"{path}: the file ends at byte {offset}; it was changed during the run. Start again")
            if DONTNEED is not None:
                os.posix_fadvise(self._fds[source], offset, count, DONTNEED)
            memory, offset = memory[count:], offset + count

    def check_again(self, source: int, offset: int, memory: memoryview) -> None:
        """Read once more what was read into `memory`, which is overwritten. Raises RunError where it differs."""
        before = xxh3_64_intdigest(memory)
        self.read_into(source, offset, memory)
        if xxh3_64_intdigest(memory) != before:
            raise RunError(
                f"{self._sources[source].path}: the {len(memory):,} bytes from byte {offset:,} on were other ones when "
                "read again; the disk, its cable or the memory of this machine is failing"
            )

    def check_unchanged(self) -> None:
        """Raises RunError, naming the file, if a source is not what it was when the run was planned."""
        for source, fd in zip(self._sources, self._fds, strict=True):
            now = os.fstat(fd)
            if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (
                source.device,
                source.inode,
                source.nbytes,
                source.mtime_ns,
            ):
                raise RunError(f"{source.path}: the file was changed since the merge was planned. Start again")

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
