"""The command: `make bench-routing`, `python -m benchmarks.routing`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import interruption, peer
from benchmarks.machine import machine
from benchmarks.programs import Programs
from benchmarks.publishing import publish
from benchmarks.routing import report
from benchmarks.routing.evaluation import losses, losses_at_equal_weight, num_parameters, reference
from benchmarks.routing.merging import Merge, Workshop
from benchmarks.routing.results import Phase, Report, Result, Run
from benchmarks.routing.rows import ROWS, Row
from benchmarks.routing.settings import FULL, SMOKE, Settings
from benchmarks.routing.texts import texts
from benchmarks.routing.tokens import corpus
from benchmarks.routing.training import trained_models

DEFAULT_OUT = Path(".bench/routing")
LOG_WIDTH = 160


def command(
    only: Annotated[list[str] | None, typer.Option(metavar="ROW", help="Measure this row; repeatable.")] = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Where the report goes, and where trained models are kept.")
    ] = DEFAULT_OUT,
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything tiny, and one variant.")] = False,
    mergekit: Annotated[
        Path, typer.Option("--peer", help="The environment that mergekit-moe is installed in.")
    ] = peer.DIRECTORY,
) -> None:
    """Measure how well routers route, on models trained here; write report.md, report.json and a plot."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    rows = _chosen(only or [])
    interruption.heed()
    out.mkdir(parents=True, exist_ok=True)
    programs = Programs(Path(sys.executable).with_name("moeplan"), peer.program(mergekit))
    measured = _Measuring(SMOKE if smoke else FULL, programs, out.resolve(), console).report(rows, tiny=smoke)
    publish(measured, out, console, views=report, plots="benchmarks.routing.plots")
    failures = [
        f"{result.name}, {result.variant}: {result.failure}"
        for result in measured.results
        if result.failure and result.skipped is None
    ]
    if failures:
        console.print("failed:", *failures, sep="\n  ", style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1)


def _chosen(only: list[str]) -> list[Row]:
    known = {row.key: row for row in ROWS}
    unknown = [key for key in only if key not in known]
    if unknown:
        raise typer.BadParameter(f"there is no row {unknown[0]}; there are {', '.join(known)}", param_hint="--only")
    return [row for row in ROWS if not only or row.key in only]


class _Measuring:
    """A run under way, and where its time has gone."""

    def __init__(self, settings: Settings, programs: Programs, out: Path, console: Console) -> None:
        self._settings = settings
        self._programs = programs
        self._out = out
        self._console = console
        self._started = time.monotonic()
        self._phases: dict[str, float] = {}

    def report(self, rows: list[Row], *, tiny: bool) -> Report:
        load_before = os.getloadavg()[0]
        now = datetime.now().astimezone().isoformat(timespec="minutes")
        settings = self._settings
        with self._phase("text"):
            self._say("collecting text")
            made = corpus(texts(settings), settings)
        with self._phase("training"):
            models = trained_models(made, settings, self._out / "models", self._say)
        with self._phase("evaluation"):
            self._say("evaluating the base and the experts alone")
            references = {
                variant: reference(models.base, experts, made.tokens) for variant, experts in models.experts.items()
            }
        with tempfile.TemporaryDirectory(prefix="work-", dir=self._out) as work:
            workshop = Workshop(Path(work), settings, made, models, self._programs)
            results = [
                self._result(row, variant, workshop)
                for row in rows
                for variant in row.variants
                if variant in settings.variants
            ]
        return Report(
            started=now,
            seconds=time.monotonic() - self._started,
            tiny=tiny,
            settings=settings,
            num_parameters=num_parameters(models.base),
            machine=machine(self._out, load_before),
            phases=tuple(Phase(name, seconds) for name, seconds in self._phases.items()),
            references=references,
            results=tuple(results),
        )

    def _result(self, row: Row, variant: str, workshop: Workshop) -> Result:
        if (missing := self._programs.missing(row.program)) is not None:
            return Result(row.key, row.name, variant, skipped=missing)
        seeds = self._settings.seeds if row.seeded else self._settings.seeds[:1]
        runs: list[Run] = []
        for seed in seeds:
            self._say(f"{row.name}, {variant}, seed {seed}")
            runs.append(self._run(Merge(row, variant, seed), workshop))
            if runs[-1].error is not None:
                break
        return Result(row.key, row.name, variant, tuple(runs))

    def _run(self, merge: Merge, workshop: Workshop) -> Run:
        merged = workshop.directory / "merged"
        try:
            with self._phase(merge.row.program.value):
                made = workshop.merge(merge, merged)
            if made.error is not None:
                return Run(merge.seed, error=made.error)
            judge = losses_at_equal_weight if merge.row.equal else losses
            with self._phase("evaluation"):
                started = time.monotonic()
                try:
                    measured = judge(merged, workshop.corpus.tokens)
                except Exception as error:  # whatever transformers raises at a model that it cannot load
                    return Run(merge.seed, error=f"{type(error).__name__}: {error}")
            return Run(merge.seed, measured, made.seconds, time.monotonic() - started)
        finally:
            shutil.rmtree(merged, ignore_errors=True)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - started

    def _say(self, message: str) -> None:
        seconds = time.monotonic() - self._started
        self._console.print(f"{seconds:6.0f} s  {message}", style="dim", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(command)
