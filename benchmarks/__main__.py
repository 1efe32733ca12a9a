"""The command: `make bench`, `make bench-smoke`, `python -m benchmarks`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import interruption, peer, report
from benchmarks.cases import CASES, Case
from benchmarks.machine import machine
from benchmarks.programs import Programs
from benchmarks.publishing import publish
from benchmarks.results import CaseResult, Report
from benchmarks.runner import Settings, run_cases

DEFAULT_DIRECTORY = Path(".bench")
LOG_WIDTH = 160
INTERRUPTED = 128 + signal.SIGINT


def command(
    only: Annotated[list[str] | None, typer.Option(metavar="CASE", help="Run this case or group; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender takes its turn.")] = 3,
    directory: Annotated[
        Path,
        typer.Option(
            "--dir", file_okay=False, help="A directory on the disk to measure. All that is put there is removed."
        ),
    ] = DEFAULT_DIRECTORY,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where the report goes.")] = DEFAULT_DIRECTORY / "report",
    large: Annotated[bool, typer.Option("--large", help="Run what takes 310 GB or many minutes, too.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="One round of everything on tiny models.")] = False,
    mergekit: Annotated[
        Path, typer.Option("--peer", help="The environment that mergekit-moe is installed in.")
    ] = peer.DIRECTORY,
) -> None:
    """Measure moeplan beside its peers and the limits of the machine; write report.md, report.json and plots."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    cases = _chosen(only or [], large=large, smoke=smoke)
    if smoke:
        cases, rounds = [case.tiny() for case in cases], 1
    interruption.heed()
    for needed in (directory, out):
        needed.mkdir(parents=True, exist_ok=True)
    programs = Programs(Path(sys.executable).with_name("moeplan"), peer.program(mergekit))
    with tempfile.TemporaryDirectory(prefix="moeplan-bench-", dir=directory) as work:
        settings = Settings(Path(work).resolve(), rounds, programs, warm_code=not smoke)
        measured = _measured(cases, settings, console, tiny=smoke)
        publish(measured, out, console, views=report, plots="benchmarks.plots")
    failures = [
        f"{case.name}, {result.name}: {result.failure}"
        for case in measured.cases
        for result in case.results
        if result.failure and result.skipped is None
    ]
    if failures:
        console.print("failed:", *failures, sep="\n  ", style="red", soft_wrap=True, markup=False)
    if failures or measured.interrupted:
        raise typer.Exit(INTERRUPTED if measured.interrupted else 1)


def _chosen(only: list[str], *, large: bool, smoke: bool) -> list[Case]:
    unknown = [name for name in only if not any(name in (case.name, case.group) for case in CASES)]
    if unknown:
        known = ", ".join(case.name for case in CASES)
        raise typer.BadParameter(f"there is no case {unknown[0]}; there are {known}", param_hint="--only")
    if not only:
        return [case for case in CASES if (large or not case.large) and (case.smoke or not smoke)]
    return [case for case in CASES if case.name in only or case.group in only]


def _measured(cases: list[Case], settings: Settings, console: Console, *, tiny: bool) -> Report:
    load_before = os.getloadavg()[0]
    started = time.monotonic()
    now = datetime.now().astimezone().isoformat(timespec="minutes")

    def say(message: str) -> None:
        console.print(f"{time.monotonic() - started:6.0f} s  {message}", style="dim", highlight=False, soft_wrap=True)

    results: list[CaseResult] = []
    interrupted = False
    try:
        if not tiny:
            # No program is to be the first that is read from the disk. Hidden gates have each import all it ever does.
            hidden = next(case for case in CASES if case.name == "hidden")
            list(run_cases([hidden.tiny()], replace(settings, rounds=1), say))
        for result in run_cases(cases, settings, say):
            results.append(result)
    except KeyboardInterrupt:
        interrupted = True
    return Report(
        started=now,
        seconds=time.monotonic() - started,
        rounds=settings.rounds,
        tiny=tiny,
        interrupted=interrupted,
        machine=machine(settings.directory, load_before),
        cases=tuple(results),
    )


if __name__ == "__main__":
    typer.run(command)
