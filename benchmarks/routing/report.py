"""A run's results for the terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.report import markdown_table, targets_to_markdown, targets_to_terminal, where_and_when
from benchmarks.results import spread
from benchmarks.routing.results import Report, Result
from benchmarks.routing.settings import DOMAINS
from benchmarks.routing.targets import target_rows

SCALE_COLUMNS = ("variant", "model", *DOMAINS, "mean")


def facts(report: Report) -> list[str]:
    """What one has to know to read the numbers."""
    settings = report.settings
    lines = [
        where_and_when(report.started, report.seconds, report.machine),
        f"A Llama of {report.num_parameters / 1e6:.1f} million parameters, and an expert for each of {len(DOMAINS)} "
        f"domains ({', '.join(DOMAINS)}), trained here. Two experts work on each token. 0 % is the loss of the base, "
        "100 % that with every token sent to its own domain's expert, in the base's backbone. Medians of "
        f"{len(settings.seeds)} seeds, with the least and the most; {settings.num_windows} held-out windows of "
        f"{settings.window} tokens a domain.",
    ]
    if report.tiny:
        lines.append("Everything is tiny: this shows that it runs, and nothing else. No target is judged.")
    return lines


def columns(report: Report) -> tuple[str, ...]:
    """Of the table of rows."""
    trained = (f"{variant} trained, % of the gap" for variant in report.settings.variants)
    return ("router", *trained, "merge, s", "")


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table, of as many cells a row as there are columns."""
    return [(name, *_cells(report, key)) for key, name in names(report).items()]


def names(report: Report) -> dict[str, str]:
    """The rows that are in the report, by key."""
    return {result.key: result.name for result in report.results}


def _cells(report: Report, key: str) -> list[str]:
    results = [report.result(key, variant) for variant in report.settings.variants]
    there = [result for result in results if result is not None]
    good = [result for result in there if not result.failure]
    seconds = [run.merge_seconds for result in good for run in result.runs]
    reasons = dict.fromkeys(_reason(result) for result in there if result.failure)
    return [
        *(_quality(report, result) for result in results),
        f"{spread(seconds).median:.1f}" if seconds else "",
        "; ".join(reasons),
    ]


def _quality(report: Report, result: Result | None) -> str:
    if result is None or result.failure:
        return ""
    over = spread(report.qualities(result))
    median = f"{over.median:.0f} %"
    return median if len(result.runs) == 1 else f"{median} ({over.least:.0f} to {over.most:.0f})"


def _reason(result: Result) -> str:
    return f"skipped: {result.skipped}" if result.skipped is not None else f"failed: {result.failure}"


def scale(report: Report) -> list[tuple[str, ...]]:
    """The ends of the scale in nats per token: what the percentages are of."""
    return [
        (variant, name, *(f"{loss:.3f}" for loss in (*losses, fmean(losses))))
        for variant, ends in report.references.items()
        for name, losses in (("base", ends.base), ("oracle", ends.oracle), ("each expert alone", ends.own))
    ]


def phases(report: Report) -> str:
    """Where the time went."""
    return "Time: " + ", ".join(f"{phase.name} {phase.seconds:.0f} s" for phase in report.phases) + "."


def to_json(report: Report) -> str:
    """Everything that was measured, the percentages, and the targets."""
    qualities = {
        f"{result.key}, {result.variant}": report.qualities(result) for result in report.results if not result.failure
    }
    data = {**asdict(report), "qualities": qualities, "targets": [asdict(row) for row in target_rows(report)]}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def to_markdown(report: Report, plots: Sequence[str]) -> str:
    """The tables and the targets, followed by the plots, which are files beside it."""
    named = columns(report)
    parts = ["# How well routers route", *facts(report), markdown_table(named, rows(report), named[1:-1])]
    parts.append("## Targets")
    parts.append(targets_to_markdown(target_rows(report)))
    parts.append("## The scale, in nats per token")
    parts.append(markdown_table(SCALE_COLUMNS, scale(report), SCALE_COLUMNS[2:]))
    parts.append(phases(report))
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def to_terminal(report: Report) -> RenderableType:
    """The same for rich."""
    return Group(
        *map(Text, facts(report)),
        Text(),
        _table(columns(report), rows(report), 1),
        Text(),
        targets_to_terminal(target_rows(report)),
        Text(),
        _table(SCALE_COLUMNS, scale(report), 2),
        Text(),
        Text(phases(report)),
    )


def _table(named: Sequence[str], cells: list[tuple[str, ...]], first_number: int) -> Table:
    """The columns from `first_number` on are aligned to the right, but for the last one where it has no name."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(named):
        table.add_column(column, justify="right" if number >= first_number and column else "left")
    for row in cells:
        table.add_row(Text(row[0], style="bold"), *map(Text, row[1:]))
    return table
