"""The one table of a run, as cells of text: a row for each contender of each case."""

from __future__ import annotations

from benchmarks.contenders import WRITE_FLOOR
from benchmarks.results import CaseResult, Measurement, Report, Result, ratios, spread

MIB = 1 << 20

COLUMNS = ("case", "contender", "seconds", "CPU s", "GB/s", "× floor", "peak MiB", "GB read", "GB written", "")
"""Disk traffic is what the process had the disk do. × floor: over the write floor of the same round."""


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table, of as many cells a row as there are columns. A case is named in its first row alone."""
    return [
        ("" if number else case.name, *_cells(case, result))
        for case in report.cases
        for number, result in enumerate(case.results)
    ]


def _cells(case: CaseResult, result: Result) -> tuple[str, ...]:
    if result.skipped is not None:
        return (result.name, *[""] * 7, f"skipped: {result.skipped}")
    if result.failure is not None:
        return (result.name, *[""] * 7, f"failed: {result.failure}")
    seconds = result.spread(lambda run: run.seconds)
    output = result.runs[-1].output_nbytes
    floor = case.good(WRITE_FLOOR.name)
    return (
        result.name,
        f"{seconds.median:.2f} ({seconds.least:.2f}–{seconds.most:.2f})",
        f"{result.spread(lambda run: run.cpu_seconds).median:.1f}",
        f"{output / seconds.median / 1e9:.2f}" if output else "",
        f"{spread(ratios(result, floor)).median:.2f}" if output and floor is not None else "",
        _peak(result),
        f"{result.spread(lambda run: run.disk_read_nbytes).median / 1e9:.2f}",
        f"{result.spread(lambda run: run.disk_written_nbytes).median / 1e9:.2f}",
        _note(result.runs[-1]),
    )


def _peak(result: Result) -> str:
    """The highest of all rounds; nothing where the program had ended before anybody could look."""
    most = result.spread(lambda run: run.peak_rss_nbytes).most
    return f"{most / MIB:.0f}" if most else ""


def _note(run: Measurement) -> str:
    """What else a run has to say."""
    said = []
    printed = run.printed or {}
    if printed.get("direct") is False:
        said.append("no direct I/O here, so through the page cache")
    if "bfloat16" in printed:
        said.append(f"f32 {printed['float32']:.2f} s, bf16 {printed['bfloat16']:.2f} s without start")
    if "plan" in printed and not run.output_nbytes:
        said.append(f"{printed['plan']['output']['tensors']:,} tensors")
    if run.volume_growth_nbytes is not None:
        said.append(f"adds {run.volume_growth_nbytes / 1e9:z.2f} GB")
    return "; ".join(said)
