"""Memory that a run uses: page-aligned, allocated outside the heap, given back to the system when freed.

The heap would keep freed chunks and fragment; these buffers are mapped for themselves, so what a plan forecasts is what
the process uses.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock

HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
"""Advice, where the system takes it, to use large pages: they are handed out and cleared far faster than small ones."""


def allocate(nbytes: int) -> memoryview:
    """`nbytes` of zeroed memory, given back when the last view of it goes. Raises MemoryError where there is none."""
    try:
        # Private, though nobody shares it: the system has no large pages for what might be shared.
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes could not be mapped") from error
    if HUGEPAGE is not None:
        with suppress(OSError):
            memory.madvise(HUGEPAGE)
    return memoryview(memory)[:nbytes]


class SlabPool:
    """A bounded number of equal chunk buffers, page-aligned.

    Taking one waits until one is free: that is what bounds a run.
    """

    def __init__(self, count: int, slab_nbytes: int) -> None:
        self.nbytes = count * slab_nbytes
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(count):
            self._free.put(allocate(slab_nbytes))

    def take(self) -> memoryview:
        return self._free.get()

    def give_back(self, slab: memoryview) -> None:
        self._free.put(slab)


class WholeTensors:
    """The buffers that hold whole tensors while a kernel needs them. Safe to use from several threads.

    What is freed is kept for the next tensor of its size, since the system clears all memory that it hands out; but
    only while that and the tensors that there are take no more than `keep_within_nbytes`.
    """

    def __init__(self, sizes: tuple[int, ...], keep_within_nbytes: int = 0) -> None:
        self._sizes = sizes
        self._keep_within_nbytes = keep_within_nbytes
        self._lock = Lock()
        self._alive: dict[int, memoryview] = {}
        self._kept: list[memoryview] = []

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of the tensors that there are, and of what is kept beside them."""
        with self._lock:
            return _nbytes(self._alive.values()), _nbytes(self._kept)

    def get(self, buffer: int) -> memoryview:
        """The memory of `buffer`, allocated when first asked for, with anything in it."""
        with self._lock:
            if buffer not in self._alive:
                self._alive[buffer] = self._kept_or_new(self._sizes[buffer])
            return self._alive[buffer]

    def free(self, buffers: Iterable[int]) -> None:
        with self._lock:
            freed = [self._alive.pop(buffer) for buffer in buffers if buffer in self._alive]
            self._kept = sorted([*self._kept, *freed], key=len)
            self._give_back(0)

    def _kept_or_new(self, nbytes: int) -> memoryview:
        for number, memory in enumerate(self._kept):
            if len(memory) == nbytes:
                return self._kept.pop(number)
        self._give_back(nbytes)
        return allocate(nbytes)

    def _give_back(self, more_nbytes: int) -> None:
        """Keep only what may be kept beside `more_nbytes`: the smallest goes first."""
        while self._kept and _nbytes((*self._alive.values(), *self._kept)) + more_nbytes > self._keep_within_nbytes:
            del self._kept[0]


def _nbytes(memories: Iterable[memoryview]) -> int:
    return sum(map(len, memories))
