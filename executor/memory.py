"""How much memory this process takes, as the operating system counts it."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import psutil

LARGE_NBYTES = 4 << 20
"""What is a large allocation. Each new one is cleared by the system, page by page: below this the heap is faster."""

KEPT_NBYTES = 16 << 20
"""What the heap may keep at its end. With less, layer after layer has its activations cleared by the system again."""


def resident_nbytes() -> int:
    """Bytes resident now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_nbytes() -> int:
    """The most bytes that were ever resident.

    On Linux from `VmHWM`, which counts this program alone: `getrusage` starts from what the parent had before `exec`.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_what_is_freed() -> None:
    """Have the heap return large allocations to the system when they are freed. Only glibc's does otherwise.

    By itself it learns to keep what is often freed, up to 32 MiB a piece, and activations, of many sizes, tear holes
    into what it keeps: then a model of more layers takes more memory. Nor may threads have heaps of their own, each of
    which keeps some of what its threads freed. See mallopt(3), M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, LARGE_NBYTES)
        mallopt(-1, KEPT_NBYTES)
        mallopt(-8, 1)
