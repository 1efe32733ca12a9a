"""Says where numbers come from, so that nobody compares those of two machines."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.results import Machine


def machine(directory: Path, load_before: float) -> Machine:
    """This machine, and the file system that `directory` is on."""
    return Machine(
        cpu=_first_after("/proc/cpuinfo", "model name") or os.uname().machine,
        num_cpus=len(os.sched_getaffinity(0)),
        memory_nbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{os.uname().sysname} {os.uname().release}",
        file_system=file_system(directory.resolve()),
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


def _first_after(file: str, key: str) -> str:
    lines = Path(file).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def file_system(directory: Path) -> str:
    """The type of the file system that `directory`, a resolved path, is on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [mount for mount in mounts if directory.is_relative_to(mount[1])]
    # Of several mounts at one place, the last is the one that is seen.
    return max(reversed(above), key=lambda mount: len(mount[1]))[2]
