"""Says where numbers come from, so that nobody compares those of two machines."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.results import Machine


def machine(directory: Path, load_before: float) -> Machine:
    """This machine, and the file system that `directory` is on."""
    return Machine(
        cpu=_first_after("/proc/cpuinfo", "model name") or os.uname().machine,
        num_cpus=len(os.sched_getaffinity(0)),
        memory_nbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{os.uname().sysname} {os.uname().release}",
        file_system=file_system(directory),
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


def _first_after(file: str, key: str) -> str:
    lines = Path(file).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def file_system(directory: Path) -> str:
    """The type of the file system that `directory` is on, as `df` has it: /proc/mounts is not as plain as it looks."""
    command = ["df", "--output=fstype", str(directory)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
