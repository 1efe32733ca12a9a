"""What was measured, as plain data, and how it is summed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one program. Sizes are bytes.

    `seconds` includes the start of the process and, in `sync_seconds`, waiting for the output to be on the disk.
    `read_nbytes` and `written_nbytes` are what went through system calls, `disk_...` what the process had the disk do.
    `volume_growth_nbytes` is how much fuller a file system of its own got. `printed` is the JSON that the program
    printed.
    """

    seconds: float
    sync_seconds: float
    cpu_seconds: float
    peak_rss_nbytes: int
    read_nbytes: int
    written_nbytes: int
    disk_read_nbytes: int
    disk_written_nbytes: int
    load: float
    error: str | None = None
    output_nbytes: int = 0
    digest: str | None = None
    volume_growth_nbytes: int | None = None
    printed: dict[str, Any] | None = None


def not_run(reason: str) -> Measurement:
    """Stands for a run that could not even begin."""
    return Measurement(0.0, 0.0, 0.0, 0, 0, 0, 0, 0, 0.0, error=reason)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the least and the most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Result:
    """A contender's runs, one each turn; none where it was skipped, and `skipped` says why."""

    name: str
    runs: tuple[Measurement, ...] = ()
    skipped: str | None = None

    @property
    def failure(self) -> str | None:
        """Why its last run failed, or why it was never run; None where all is well."""
        return self.skipped or next((run.error for run in self.runs if run.error), None)

    def spread(self, of: Callable[[Measurement], float]) -> Spread:
        """The spread of a quantity over the runs."""
        return spread([of(run) for run in self.runs])


@dataclass(frozen=True, slots=True)
class CaseResult:
    """A case's results, in the order in which contenders took turns.

    `read_nbytes` and `output_nbytes` are what has to be read and written at least.
    """

    name: str
    group: str
    about: str
    read_nbytes: int
    output_nbytes: int
    results: tuple[Result, ...]

    def good(self, name: str) -> Result | None:
        """The contender's result, where it was run and nothing failed."""
        return next((result for result in self.results if result.name == name and not result.failure), None)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the numbers come from."""

    cpu: str
    num_cpus: int
    memory_nbytes: int
    kernel: str
    file_system: str
    load_before: float
    load_after: float


@dataclass(frozen=True, slots=True)
class Report:
    """One run of the suite. `interrupted`: `cases` are those that were finished before."""

    started: str
    seconds: float
    rounds: int
    tiny: bool
    interrupted: bool
    machine: Machine
    cases: tuple[CaseResult, ...]

    def case(self, name: str) -> CaseResult | None:
        """The case of this name, where it was run."""
        return next((case for case in self.cases if case.name == name), None)

    def group(self, name: str) -> tuple[CaseResult, ...]:
        """The cases of a group."""
        return tuple(case for case in self.cases if case.group == name)


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(median(values), min(values), max(values))


def ratios(above: Result, below: Result) -> list[float]:
    """Seconds of one contender over those of another, round by round, so that what slows a whole round cancels out."""
    return [a.seconds / b.seconds for a, b in zip(above.runs, below.runs, strict=False)]
