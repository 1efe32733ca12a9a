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
    """`nbytes` of zeroed memory, given back when the last view of it goes."""
    # Private, though nobody shares it: the system has no large pages for what might be shared.
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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
    """The buffers that hold whole tensors while a kernel needs them. Safe to use from several threads."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self._sizes = sizes
        self._lock = Lock()
        self._alive: dict[int, memoryview] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        with self._lock:
            return sum(self._sizes[buffer] for buffer in self._alive)

    def get(self, buffer: int) -> memoryview:
        """The memory of `buffer`, allocated when first asked for."""
        with self._lock:
            if buffer not in self._alive:
                self._alive[buffer] = allocate(self._sizes[buffer])
            return self._alive[buffer]

    def free(self, buffers: Iterable[int]) -> None:
        with self._lock:
            for buffer in buffers:
                self._alive.pop(buffer, None)
