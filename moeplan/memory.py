"""Where a merge's memory goes: the cap that the user set, the process itself, what is left for the plan's buffers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import psutil

from executor.memory import resident_nbytes
from moeplan.errors import UserError
from moeplan.options import memory_nbytes

MIB = 1 << 20

RUNTIME_NBYTES = {"torch": 272 * MIB, "transformers": 424 * MIB}
"""What a process that uses a package has resident, everything else that moeplan imports included (CPU builds)."""

GROWTH_NBYTES = 16 * MIB
"""What the interpreter may still grow by while a plan runs: thread stacks, progress, the plan itself."""


@dataclass(frozen=True, slots=True)
class MemoryCap:
    """The most memory that the process may have resident, and what of it the process takes without any buffer."""

    nbytes: int
    process_nbytes: int

    @property
    def budget_nbytes(self) -> int:
        """What is left for buffers; negative where even the process does not fit."""
        return self.nbytes - self.process_nbytes


def memory_cap(max_memory: str | int | None, packages: Collection[str]) -> MemoryCap:
    """The cap that `max_memory` means on this machine, for a process that will use `packages`.

    By default half of what is available, beside what the process has already. Raises UserError for what is not a size.
    """
    resident = resident_nbytes()
    expected = max((RUNTIME_NBYTES[name] for name in packages), default=0)
    process = max(resident + GROWTH_NBYTES, expected)
    memory = psutil.virtual_memory()
    if max_memory is None:
        return MemoryCap(process + memory.available // 2, process)
    return MemoryCap(memory_nbytes(max_memory, memory.total), process)


class CapError(UserError):
    """A merge does not fit its memory cap."""

    def __init__(self, cap: MemoryCap, needed_nbytes: int) -> None:
        smallest = -(-(cap.process_nbytes + needed_nbytes) // MIB)
        super().__init__(
            f"--max-memory: {cap.nbytes / MIB:.0f} MiB are too few for this merge; the smallest that works is "
            f"{smallest}MiB ({cap.process_nbytes / MIB:.0f} MiB for Python and its libraries, "
            f"{needed_nbytes / MIB:.0f} MiB for buffers)"
        )
