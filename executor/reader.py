"""Reading ranges of source files, and noticing when a source is no longer the file that was planned for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack

from xxhash import xxh3_64_intdigest

from executor.errors import RunError
from executor.local import LocalFile
from planner.expr import SourceFile


class SourceReader:
    """Open source files. Safe to read from several threads at once."""

    def __init__(self, sources: Sequence[SourceFile]) -> None:
        self._sources = sources
        self._files: list[LocalFile] = []
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for source in sources:
                self._files.append(LocalFile(source.path))
            self.check_unchanged()
            on_error.pop_all()

    def fd(self, source: int) -> int:
        """The open file of a source."""
        return self._files[source].fd

    def read_into(self, source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
        """Fill `slab[begin : begin + nbytes]` from byte `offset` of a source.

        Up to a page before and after that may be overwritten. `slab` begins at a page of memory. Raises RunError where
        the file ends too early or fails.
        """
        self._files[source].read_into(offset, slab, begin, nbytes)

    def check_again(self, source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
        """Read once more what `read_into` read, over it. Raises RunError where it differs."""
        before = xxh3_64_intdigest(slab[begin : begin + nbytes])
        self.read_into(source, offset, slab, begin, nbytes)
        if xxh3_64_intdigest(slab[begin : begin + nbytes]) != before:
            raise RunError(
                f"{self._sources[source].path}: the {nbytes:,} bytes from byte {offset:,} on were other ones when "
                "read again; the disk, its cable or the memory of this machine is failing"
            )

    def check_unchanged(self) -> None:
        """Raises RunError, naming the file, if a source is not what it was when the run was planned."""
        for source, file in zip(self._sources, self._files, strict=True):
            now = os.fstat(file.fd)
            if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (
                source.device,
                source.inode,
                source.nbytes,
                source.mtime_ns,
            ):
                raise RunError(f"{source.path}: the file was changed since the merge was planned. Start again")

    def close(self) -> None:
        while self._files:
            self._files.pop().close()
