"""Where a merge's memory goes: the cap that the user set, the process itself, what is left for the plan's buffers."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

from executor.memory import resident_nbytes
from moeplan.errors import UserError
from moeplan.options import memory_nbytes
from planner.errors import BudgetError
from planner.graph import TensorGraph
from planner.plan import Plan
from planner.schedule import compile as compile_plan

MIB = 1 << 20

GRAIN_NBYTES = 16 * MIB
"""Resident sets are rounded up to this: two processes that do the same differ by less."""

INTERPRETER_NBYTES = 64 * MIB
"""What moeplan has resident when it has planned. Less is counted as this, so that equal inputs give equal plans."""

IMPORT_NBYTES = {"torch": 256 * MIB, "moeplan.gates.skeleton": 168 * MIB, "moeplan.gates.quantised": 128 * MIB}
"""What importing a package, and computing with it, adds to that (CPU builds; see `runtime_is_known`).

Where the page cache holds a library in pages of 2 MiB, Linux maps it in such pages. These are the numbers of then: with
pages of 4 KiB, evaluating a model has 110 MiB less of torch resident.
"""

ESTIMATE = "for torch's CPU build; the merge measures the torch that is installed"
"""What to say of numbers that other builds may not keep to."""

GROWTH_NBYTES = 32 * MIB
"""What the process may grow by while a plan is made and runs: modelling code, thread stacks, progress."""

EVALUATING_NBYTES = 64 * MIB
"""What evaluating a model adds to importing `moeplan.gates.skeleton`, where what that takes is measured: modelling
code, and the parts of libraries that only computing comes to. (44 MiB with a CUDA build and a test's prompts.)"""

TENSOR_NBYTES = 4 << 10
"""What it may grow by for each tensor of the output: in the plan, the journal, the headers and the record."""

NUMPY_NBYTES = 16 * MIB
"""What numpy takes, which a run imports before it plans, and `--plan` does not."""


@dataclass(frozen=True, slots=True)
class MemoryCap:
    """The most memory that the process may have resident, and what of it the process takes without any buffer."""

    nbytes: int
    process_nbytes: int
    packages: tuple[str, ...] = ()
    """What the process will import."""

    is_estimate: bool = False
    """Whether `process_nbytes` is reckoned for another build of torch than is installed (see `ESTIMATE`)."""

    @property
    def budget_nbytes(self) -> int:
        """What is left for buffers; negative where even the process does not fit."""
        return self.nbytes - self.process_nbytes


def runtime_is_known() -> bool:
    """Whether `IMPORT_NBYTES` holds for the torch that is installed; other builds take what they take."""
    return version("torch").endswith("+cpu")


def memory_cap(max_memory: str | int | None, packages: Collection[str], num_tensors: int = 0) -> MemoryCap:
    """The cap that `max_memory` means on this machine, for a process that will import `packages` and write so many
    tensors.

    By default half of what is available, beside what the process has already. Raises UserError for what is not a size.
    """
    to_import = [name for name in packages if name not in sys.modules]
    resident = resident_nbytes() + (0 if "numpy" in sys.modules else NUMPY_NBYTES)
    resident = max(-(-resident // GRAIN_NBYTES) * GRAIN_NBYTES, INTERPRETER_NBYTES)
    growth = GROWTH_NBYTES + -(-num_tensors * TENSOR_NBYTES // MIB) * MIB
    process = resident + sum(IMPORT_NBYTES[name] for name in to_import) + growth
    if "moeplan.gates.skeleton" in {*packages}.difference(to_import) and not runtime_is_known():
        process += EVALUATING_NBYTES
    limit = limit_nbytes()
    if max_memory is None:
        nbytes = min(process + min(psutil.virtual_memory().available, limit) // 2, limit)
    else:
        nbytes = memory_nbytes(max_memory, limit)
    return MemoryCap(nbytes, process, tuple(packages), bool(to_import) and not runtime_is_known())


def limit_nbytes() -> int:
    """The memory that there is for this process: the machine's, or what its control group leaves of it."""
    total = psutil.virtual_memory().total
    return min(total, cgroup_limit_nbytes() or total)


def cgroup_limit_nbytes(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The memory limit of the container, service or batch job that this process runs in; None where it has none.

    psutil knows the machine alone. Reads control groups of both versions, under `root`; see cgroups(7).
    """
    limits = []
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.lstrip("/")
        for place in (group, *group.parents):
            if place.is_relative_to(top) and (place / name).exists():
                text = (place / name).read_text().strip()
                limits += [int(text)] if text != "max" else []
    return min(limits, default=None)


class CapError(UserError):
    """What is to be done does not fit its memory cap."""

    def __init__(self, cap: MemoryCap, needed_nbytes: int) -> None:
        self.cap = cap
        process, buffers = (-(-nbytes // MIB) for nbytes in (cap.process_nbytes, needed_nbytes))
        build = f", {ESTIMATE}" if cap.is_estimate else ""
        super().__init__(
            f"the process may take {cap.nbytes // MIB} MiB of memory, which is too little; the smallest that works is "
            f"--max-memory {process + buffers}MiB ({process} MiB for Python and its libraries, {buffers} MiB for "
            f"buffers){build}"
        )


def compile_within(
    cap: MemoryCap, graph: TensorGraph, shard_limit_nbytes: int, threads: int, *, least_nbytes: int = 0
) -> Plan:
    """The plan of `graph` under a memory cap, which leaves at least `least_nbytes` for what comes before the run.

    Raises CapError, with the smallest cap that works.
    """
    try:
        plan = compile_plan(graph, budget_nbytes=cap.budget_nbytes, shard_nbytes=shard_limit_nbytes, threads=threads)
    except BudgetError as error:
        raise CapError(cap, max(error.needed_nbytes, least_nbytes)) from error
    if cap.budget_nbytes < least_nbytes:
        raise CapError(cap, least_nbytes)
    return plan
