"""A run's results for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.contenders import LIMITS
from benchmarks.results import Machine, Report
from benchmarks.table import COLUMNS, rows
from benchmarks.targets import TargetRow, target_rows

TARGET_COLUMNS = ("issue", "target", "measured", "holds")
RIGHT = ("seconds", "CPU s", "GB/s", "× floor", "peak MiB", "GB read", "GB written")
HOLDS = {True: "yes", False: "NO", None: "–"}


def where_and_when(started: str, seconds: float, machine: Machine) -> str:
    """What the numbers of a run are from."""
    return (
        f"{started}, {seconds / 60:.0f} minutes; {machine.cpu}, {machine.num_cpus} CPUs, "
        f"{machine.memory_nbytes / (1 << 30):.0f} GiB of memory, {machine.kernel}, {machine.file_system}; "
        f"load {machine.load_before:.1f} before, {machine.load_after:.1f} after (the suite's own included)"
    )


def facts(report: Report) -> list[str]:
    """What one has to know to read the numbers."""
    lines = [
        where_and_when(report.started, report.seconds, report.machine),
        f"Medians of {report.rounds} interleaved rounds, with the least and the most. Time includes the start of the "
        f"process and waiting for the disk. Programs are in the page cache when they start; sources are where the case "
        "is called warm. Peaks are of all rounds.",
    ]
    if report.tiny:
        lines.append("The models are tiny: this shows that everything runs, and nothing else. No target is judged.")
    if report.interrupted:
        lines.append("The run was interrupted: cases that were not finished by then are missing here.")
    return lines


def to_json(report: Report) -> str:
    """Everything that was measured, and the targets."""
    data = {**asdict(report), "targets": [asdict(row) for row in target_rows(report)]}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def to_markdown(report: Report, plots: Sequence[str]) -> str:
    """The table and the targets, followed by the plots, which are files beside it."""
    parts = ["# moeplan's benchmarks", *facts(report)]
    parts.append("\n".join(f"- **{name}**: {about}" for name, about in _legend(report)))
    parts.append(markdown_table(COLUMNS, rows(report), RIGHT))
    parts.append("## Targets")
    parts.append(targets_to_markdown(target_rows(report)))
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def to_terminal(report: Report) -> RenderableType:
    """The same for rich."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in RIGHT else "left")
    for row in rows(report):
        table.add_row(Text(row[0], style="bold"), *(Text(cell) for cell in row[1:]))
    targets = targets_to_terminal(target_rows(report))
    return Group(*(Text(fact) for fact in facts(report)), Text(), table, Text(), targets)


def _legend(report: Report) -> list[tuple[str, str]]:
    """What the names in the table stand for."""
    return [(case.name, case.about) for case in report.cases] + [(limit.name, limit.program.value) for limit in LIMITS]


def targets_to_markdown(rows: Iterable[TargetRow]) -> str:
    """The table of targets and verdicts."""
    return markdown_table(TARGET_COLUMNS, map(_target_cells, rows))


def targets_to_terminal(rows: Iterable[TargetRow]) -> RenderableType:
    """The same for rich."""
    targets = Table(box=None, pad_edge=False, header_style="dim")
    for column in TARGET_COLUMNS:
        targets.add_column(column)
    for row in rows:
        targets.add_row(*(Text(cell, style=_style(row)) for cell in _target_cells(row)))
    return targets


def markdown_table(columns: Sequence[str], rows: Iterable[tuple[str, ...]], right: Sequence[str] = ()) -> str:
    """A table of text, with the columns in `right` aligned to the right."""
    lines = [columns, ["---:" if column in right else "---" for column in columns], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _target_cells(row: TargetRow) -> tuple[str, ...]:
    return str(row.issue), row.target, row.measured, HOLDS[row.holds]


def _style(row: TargetRow) -> str:
    return {True: "green", False: "red", None: "dim"}[row.holds]
