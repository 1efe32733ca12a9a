"""How much memory this process takes, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


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
