"""Reading ranges of files again, at the speed of the disk, to see whether they are what was written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np

from executor.blocks import chunks
from executor.buffers import SlabPool
from executor.checksums import MODULUS, checksum
from executor.errors import RunError, starting_threads
from executor.local import LocalFile, allow_open_files
from planner.expr import BLOCK
from planner.layout import PAGE

WORKERS = 4
CHUNK_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Range:
    """`numel` elements of `itemsize` bytes at byte `offset` of `file`: of a stream, from its element `first` on.

    They should have `checksum`, where the stream's first block has `head_numel` elements; where that is None, they
    should equal those at byte `source_offset` of `source`.
    """

    file: Path
    offset: int
    numel: int
    itemsize: int
    head_numel: int
    checksum: int | None
    source: Path | None = None
    source_offset: int = 0
    first: int = 0


@starting_threads()
def wrong(
    ranges: Sequence[Range],
    on_progress: Callable[[int], None] | None = None,
    *,
    num_workers: int = WORKERS,
    chunk_nbytes: int = CHUNK_NBYTES,
) -> list[int]:
    """The indices of the ranges that are not what they should be, or cannot be read: from the disk, where it can be
    asked past the page cache.

    `on_progress` is told how many bytes were read. Each worker takes two chunks of memory. Raises RunError where a file
    cannot be opened.
    """
    with ExitStack() as opened, ThreadPoolExecutor(num_workers) as workers:
        paths = _paths(ranges)
        allow_open_files(2 * len(paths))
        files = {path: opened.enter_context(closing(LocalFile(str(path)))) for path in paths}
        reading = _Reading(ranges, files, SlabPool(2 * num_workers, chunk_nbytes + 2 * PAGE))
        under_way = (workers.submit(reading.check, *chunk) for chunk in _chunks(ranges, chunk_nbytes))
        for chunk in _begun_before(under_way, 2 * num_workers):
            chunk.result()
            if on_progress is not None:
                on_progress(reading.done_nbytes)
    return reading.wrong()


class _Reading:
    """Ranges that are read again, chunk by chunk, by several threads; `slabs` has two for each of them."""

    def __init__(self, ranges: Sequence[Range], files: Mapping[Path, LocalFile], slabs: SlabPool) -> None:
        self._ranges = ranges
        self._files = files
        self._slabs = slabs
        self._lock = Lock()
        self._sums = [0] * len(ranges)
        self._differing: set[int] = set()
        self.done_nbytes = 0

    def check(self, index: int, first: int, numel: int) -> None:
        """Read `numel` elements of a range, from the stream's element `first` on."""
        of = self._ranges[index]
        begin, nbytes = (first - of.first) * of.itemsize, numel * of.itemsize
        part, is_same = 0, True
        slab, other = self._slabs.take(), self._slabs.take()
        try:
            data = self._read(of.file, of.offset + begin, nbytes, slab)
            if of.source is None:
                part = checksum(data, of.itemsize, first, of.head_numel)
            else:
                there = self._read(of.source, of.source_offset + begin, nbytes, other)
                is_same = np.array_equal(np.frombuffer(data, np.uint8), np.frombuffer(there, np.uint8))
        except RunError:
            is_same = False
        finally:
            self._slabs.give_back(slab)
            self._slabs.give_back(other)
        with self._lock:
            self._sums[index] = (self._sums[index] + part) % MODULUS
            if not is_same:
                self._differing.add(index)
            self.done_nbytes += nbytes

    def wrong(self) -> list[int]:
        """The indices of the ranges that are not what they should be, when all is read."""
        return [
            index
            for index, of in enumerate(self._ranges)
            if index in self._differing or (of.source is None and self._sums[index] != of.checksum)
        ]

    def _read(self, path: Path, offset: int, nbytes: int, slab: memoryview) -> memoryview:
        at = offset % PAGE
        self._files[path].read_into(offset, slab, at, nbytes, cached=False)
        return slab[at : at + nbytes]


def _begun_before(work: Iterator[Future[None]], count: int) -> Iterator[Future[None]]:
    """`work`, of which the next `count` are begun before each is given: no more, since a model has very many."""
    begun = deque(islice(work, count))
    while begun:
        yield begun.popleft()
        begun.extend(islice(work, 1))


def _paths(ranges: Sequence[Range]) -> list[Path]:
    return list(dict.fromkeys(path for of in ranges for path in (of.file, of.source) if path is not None))


def _chunks(ranges: Sequence[Range], chunk_nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Chunks of whole blocks: index of the range, first element, number of elements."""
    for index, of in enumerate(ranges):
        chunk_numel = chunk_nbytes // of.itemsize // BLOCK * BLOCK
        for first, numel in chunks(of.first, of.numel, of.head_numel, chunk_numel):
            yield index, first, numel
