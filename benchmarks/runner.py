"""Runs cases: makes the models, then lets the contenders take turns, round by round, each from the same start."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import page_cache
from benchmarks.cases import Case
from benchmarks.contenders import Contender, Program
from benchmarks.measure import Limits, measure
from benchmarks.models import Models, make_models
from benchmarks.programs import Programs, Task, command
from benchmarks.results import CaseResult, Measurement, Result, not_run
from benchmarks.volumes import VolumeError, volume

KEEP_FREE_NBYTES = 4 * 10**9

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How cases are run. `directory` is on the disk to measure; everything in it is removed.

    `warm_code`: programs and libraries are in the page cache when a program starts.
    """

    directory: Path
    rounds: int
    programs: Programs
    warm_code: bool


def run_cases(cases: list[Case], settings: Settings, say: Say) -> Iterator[CaseResult]:
    """Run each case. Says what is under way."""
    with ExitStack() as stack:
        made: Models | None = None
        sources: tuple[Path, ...] = ()
        for case in cases:
            if case.models != made or case.volume is not None:
                stack.close()
                made = None
            there = 0 if made is None else made.disk_nbytes
            if (reason := _no_room(case.disk_nbytes - there, settings)) is not None:
                yield _skipped(case, reason)
                continue
            try:
                if case.volume is not None:
                    result = _on_volume(case, case.volume, settings, say)
                else:
                    if made is None:
                        say(f"{case.name}: making models")
                        sources = stack.enter_context(_models(case.models, settings.directory))
                        made = case.models
                    result = _run(case, sources, settings.directory, settings, say)
            except OSError as error:  # from a disk that somebody else has filled, say; what was measured is not lost
                result = _failed(case, str(error))
            yield result


def _no_room(further_nbytes: int, settings: Settings) -> str | None:
    needed = further_nbytes + KEEP_FREE_NBYTES
    free = shutil.disk_usage(settings.directory).free
    if needed <= free:
        return None
    return f"needs {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB are free"


def _skipped(case: Case, reason: str) -> CaseResult:
    return _case_result(case, (Result(contender.name, skipped=reason) for contender in dict.fromkeys(case.contenders)))


def _failed(case: Case, reason: str) -> CaseResult:
    return _case_result(case, (Result(each.name, (not_run(reason),)) for each in dict.fromkeys(case.contenders)))


def _case_result(case: Case, results: Iterable[Result]) -> CaseResult:
    return CaseResult(case.name, case.group, case.about, case.read_nbytes, case.output_nbytes, tuple(results))


def _on_volume(case: Case, kind: str, settings: Settings, say: Say) -> CaseResult:
    try:
        with volume(kind, settings.directory, case.volume_nbytes) as mounted:
            say(f"{case.name}: making models")
            with _models(case.models, mounted) as sources:
                return _run(case, sources, mounted, settings, say)
    except VolumeError as error:
        return _skipped(case, str(error))


@contextmanager
def _models(models: Models, directory: Path) -> Iterator[tuple[Path, ...]]:
    place = directory / "sources"
    try:
        yield tuple(make_models(models, place))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run(case: Case, sources: tuple[Path, ...], directory: Path, settings: Settings, say: Say) -> CaseResult:
    work = directory / "work"
    work.mkdir()
    try:
        return _Run(case, Task(case, sources, work), settings, say).result()
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Run:
    """A case under way."""

    def __init__(self, case: Case, task: Task, settings: Settings, say: Say) -> None:
        self._case = case
        self._task = task
        self._settings = settings
        self._say = say
        self._limits = Limits(settings.directory, case.limit_seconds, KEEP_FREE_NBYTES)
        self._runs: dict[str, list[Measurement]] = {contender.name: [] for contender in case.contenders}

    def result(self) -> CaseResult:
        for number in range(self._settings.rounds):
            self._round(number)
        return _case_result(
            self._case,
            (
                Result(contender.name, tuple(self._runs[contender.name]), self._missing(contender))
                for contender in dict.fromkeys(self._case.contenders)
            ),
        )

    def _missing(self, contender: Contender) -> str | None:
        return self._settings.programs.missing(contender.program)

    def _round(self, number: int) -> None:
        for contender in self._case.contenders:
            runs = self._runs[contender.name]
            failed = bool(runs) and runs[-1].error is not None
            if failed or self._missing(contender) is not None:
                continue
            self._say(f"{self._case.name}: round {number + 1} of {self._settings.rounds}, {contender.name}")
            runs.append(self._take_turn(contender, first=number == 0))
        shutil.rmtree(self._task.reference, ignore_errors=True)

    def _take_turn(self, contender: Contender, *, first: bool) -> Measurement:
        if contender.program is Program.CP and not self._task.reference.exists():
            return not_run("there is no output to copy, because moeplan failed")
        out = self._task.out(contender)
        if contender.program in (Program.WRITE_FLOOR, Program.CP):
            out.mkdir()
        self._set_page_cache(contender)
        before = _used_nbytes(self._task.directory)
        measured = self._measure(contender)
        if self._case.volume is not None:
            measured = replace(measured, volume_growth_nbytes=_used_nbytes(self._task.directory) - before)
        if out.exists():
            digest = None
            if first and self._case.check_bytes and contender.program is Program.MOEPLAN and measured.error is None:
                digest = _digest(out)
            written = sum(file.stat().st_size for file in page_cache.files_below(out))
            measured = replace(measured, output_nbytes=written, digest=digest)
            if out != self._task.reference or measured.error is not None or not self._case.is_copied:
                shutil.rmtree(out)
        return measured

    def _measure(self, contender: Contender) -> Measurement:
        argv = command(contender, self._task, self._settings.programs)
        log = self._task.directory / contender.name.replace(" ", "_")
        return _trimmed(measure(argv, self._task.out(contender), log, self._limits))

    def _set_page_cache(self, contender: Contender) -> None:
        os.sync()  # what earlier runs left unwritten is not to be written during this one
        warm = self._task.inputs(contender) if self._case.warm else []
        for directory in (*self._task.sources, self._task.reference):
            page_cache.evict(file for file in page_cache.files_below(directory) if file not in warm)
        code = self._settings.programs.code(contender.program) if self._settings.warm_code else ()
        page_cache.warm([*warm, *code])


def _used_nbytes(directory: Path) -> int:
    """How full the file system is."""
    os.sync()
    return shutil.disk_usage(directory).used


def _digest(directory: Path) -> str:
    """A digest of the weights' names and bytes."""
    whole = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _trimmed(measured: Measurement) -> Measurement:
    """Without the parts of moeplan's report that grow with the models and that no table shows."""
    printed = measured.printed
    if printed is None or "plan" not in printed:
        return measured
    plan = {key: value for key, value in printed["plan"].items() if key != "sources"}
    plan["output"] = {key: value for key, value in plan["output"].items() if key != "shards"}
    return replace(measured, printed={**printed, "plan": plan})
