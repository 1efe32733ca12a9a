"""Reading ranges of a local file: from the page cache what is there, the rest past it where that is possible.

Direct I/O reads whole pages, into memory aligned to pages, straight from the disk. It spares a copy of every byte, and
what else a laptop holds in its page cache stays there. What does not fit (small ranges, memory that lies otherwise in
its page than the range in its file, file systems without direct I/O) goes through the page cache, which forgets it.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress

from executor.errors import RunError, reason
from planner.layout import PAGE

MIN_DIRECT_NBYTES = 64 << 10
"""Smaller ranges are not worth a trip to the disk each."""

NOWAIT: int | None = getattr(os, "RWF_NOWAIT", None)
"""Asks, where the system takes it, for what is in the page cache and no more."""

RANDOM = getattr(os, "POSIX_FADV_RANDOM", None)
"""Advice, where the system takes it, to read what is asked for and nothing ahead of it: that comes by direct I/O."""

DONTNEED = getattr(os, "POSIX_FADV_DONTNEED", None)
"""Advice, where the system takes it, to forget what was read: nothing is read twice, and others need the page cache."""


class LocalFile:
    """An open file. Safe to read from several threads at once. Raises RunError where it cannot be opened or read."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise RunError(f"{path}: cannot be opened any more: {reason(error)}") from error
        self._advise(0, 0, RANDOM)
        self._direct_fd: int | None = None
        with suppress(OSError, AttributeError):  # a file system, or a system, without it
            # Not by its path, where another file may be by now.
            self._direct_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def read_into(self, offset: int, slab: memoryview, begin: int, nbytes: int, *, cached: bool = True) -> None:
        """Fill `slab[begin : begin + nbytes]` from byte `offset` of the file; from the disk, if not `cached`.

        Up to a page before and after that may be overwritten. `slab` begins at a page of memory.
        """
        done = self._read_cached(offset, slab[begin : begin + nbytes]) if cached else 0
        done += self._read_directly(offset + done, slab, begin + done, nbytes - done)
        while done < nbytes:
            try:
                count = os.preadv(self.fd, [slab[begin + done : begin + nbytes]], offset + done)
            except OSError as error:
                raise RunError(f"{self.path}: reading at byte {offset + done} failed: {error.strerror}") from error
            if count == 0:
                raise RunError(
                    f"{self.path}: the file ends at byte {offset + done}; it was changed during the run. Start again"
                )
            self._advise(offset + done, count, DONTNEED)
            done += count

    def _read_cached(self, offset: int, memory: memoryview) -> int:
        """Returns how many bytes the page cache had, from the first on."""
        if NOWAIT is None:
            return 0
        try:
            # One page to begin with: what the system has not, it starts to read, though nobody waits for it.
            count = os.preadv(self.fd, [memory[:PAGE]], offset, NOWAIT)
            return count + os.preadv(self.fd, [memory[count:]], offset + count, NOWAIT)
        except OSError:  # nothing is there, or the file system cannot say
            return 0

    def _read_directly(self, offset: int, slab: memoryview, begin: int, nbytes: int) -> int:
        """Returns how many bytes were read: none where direct I/O does not fit, all but the last where a file ends."""
        before = offset % PAGE
        end = -(-(begin + nbytes) // PAGE) * PAGE
        if self._direct_fd is None or nbytes < MIN_DIRECT_NBYTES or begin % PAGE != before or end > len(slab):
            return 0
        try:
            count = os.preadv(self._direct_fd, [slab[begin - before : end]], offset - before)
        except OSError:  # whatever it is, reading through the page cache works or says what is wrong
            return 0
        return min(max(count - before, 0), nbytes)

    def _advise(self, offset: int, nbytes: int, advice: int | None) -> None:
        if advice is not None:
            with suppress(OSError):
                os.posix_fadvise(self.fd, offset, nbytes, advice)

    def close(self) -> None:
        os.close(self.fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)


def allow_open_files(count: int) -> None:
    """Have the system allow this process so many open files, if it may; a `LocalFile` takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256  # what Python and torch have open is far below
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
