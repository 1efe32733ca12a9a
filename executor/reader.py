"""Reading ranges of sources, and noticing when a source is no longer the file that was planned for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from executor.errors import RunError, naming
from executor.local import LocalFile
from planner.expr import RemoteFile, Source, SourceFile

if TYPE_CHECKING:
    from executor.remote import OnWait, RemoteReader


class SourceReader:
    """Open sources: files, and files that others hold. Safe to read from several threads at once.

    `headers` are sent to the hosts of remote sources; `on_wait` is told where these are waited for.
    """

    def __init__(
        self, sources: Sequence[Source], headers: Mapping[str, str] | None = None, on_wait: OnWait | None = None
    ) -> None:
        self._sources = sources
        self._files: dict[int, LocalFile] = {}
        self._remote: RemoteReader | None = None
        with ExitStack() as on_error:
            on_error.callback(self.close)
            for number, source in enumerate(sources):
                if isinstance(source, SourceFile):
                    self._files[number] = LocalFile(source.path)
            self.check_unchanged()
            on_error.pop_all()
        if len(self._files) < len(sources):
            from executor.remote import RemoteReader  # here, because TLS takes memory that most runs can spare

            self._remote = RemoteReader(headers, on_wait)

    def fd(self, source: int) -> int | None:
        """The open file of a source; None for one that is not on this machine."""
        return self._files[source].fd if source in self._files else None

    def read_into(
        self, source: int, offset: int, slab: memoryview, begin: int, nbytes: int, *, cached: bool = True
    ) -> None:
        """Fill `slab[begin : begin + nbytes]` from byte `offset` of a source; from the disk, if not `cached`.

        Up to a page before and after that may be overwritten. `slab` begins at a page of memory. Raises RunError where
        the file ends too early or fails.
        """
        file = self._sources[source]
        if isinstance(file, RemoteFile):
            assert self._remote is not None
            self._remote.read_into(file, offset, slab[begin : begin + nbytes])
        else:
            self._files[source].read_into(offset, slab, begin, nbytes, cached=cached)

    def check_again(self, source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
        """Read once more what `read_into` read, over it. Raises RunError where it differs."""
        before = xxh3_64_intdigest(slab[begin : begin + nbytes])
        self.read_into(source, offset, slab, begin, nbytes, cached=False)
        if xxh3_64_intdigest(slab[begin : begin + nbytes]) != before:
            raise RunError(
                f"{name_of(self._sources[source])}: the {nbytes:,} bytes from byte {offset:,} on were other ones when "
                "read again; the disk, its cable or the memory of this machine is failing"
            )

    def check_unchanged(self) -> None:
        """Raises RunError, naming the file, if a source is not what it was when the run was planned.

        What comes from a remote file is checked as it comes.
        """
        for number, file in self._files.items():
            source = self._sources[number]
            assert isinstance(source, SourceFile)
            with naming(Path(source.path)):
                now = os.fstat(file.fd)
            if (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) != (
                source.device,
                source.inode,
                source.nbytes,
                source.mtime_ns,
            ):
                raise RunError(f"{source.path}: the file was changed since the merge was planned. Start again")

    def interrupt(self) -> None:
        """Have reads that wait for a network fail soon."""
        if self._remote is not None:
            self._remote.interrupt()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
        if self._remote is not None:
            self._remote.close()


def name_of(source: Source) -> str:
    """Where a source is, for people: its path or URL."""
    return source.path if isinstance(source, SourceFile) else source.url
