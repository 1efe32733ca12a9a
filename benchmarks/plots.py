"""Draws a run's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import CaseResult, Measurement, Report, Result, Spread
from benchmarks.verdicts import cap_nbytes, planned_tensors

MIB = 1 << 20
OWN, OTHERS = "tab:blue", "darkgray"
INCHES_A_BAR = 0.28

Quantity = Callable[[Measurement], float]


def draw(report: Report, directory: Path) -> list[str]:
    """Write the plots for which there are numbers into `directory`; returns their names."""
    plots = {
        "seconds.png": _bars(report, "seconds", _seconds),
        "peak-memory.png": _bars(report, "peak RSS, MiB", _peak_mib),
        "memory-caps.png": _over_memory_caps(report),
        "growth.png": _over_output_size(report),
        "planning.png": _over_tensors(report),
    }
    for name, figure in plots.items():
        if figure is not None:
            figure.savefig(directory / name, dpi=120, bbox_inches="tight")
    return [name for name, figure in plots.items() if figure is not None]


def _bars(report: Report, label: str, quantity: Quantity) -> Figure | None:
    """The contenders of each case, median with the least and the most."""
    cases = [(case, good) for case in report.cases if len(good := _good(case)) > 1]
    if not cases:
        return None
    heights = [len(good) + 1 for _, good in cases]
    figure = Figure(figsize=(9, sum(heights) * INCHES_A_BAR + 0.6 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)
    for (case, good), (axes,) in zip(cases, grid, strict=True):
        spreads = [result.spread(quantity) for result in good]
        axes.barh(
            [result.name for result in good],
            [over.median for over in spreads],
            xerr=_error_bars(spreads),
            color=[OWN if result.name.startswith("moeplan") else OTHERS for result in good],
            capsize=3,
        )
        axes.invert_yaxis()
        axes.set_title(f"{case.name}: {case.about}", fontsize=10, loc="left")
        axes.set_xlabel(label)
    return figure


def _over_memory_caps(report: Report) -> Figure | None:
    """Time and peak memory over the cap."""
    capped = [
        (cap_nbytes(result.runs[0]) / MIB, result)
        for case in report.group("memory")
        for result in _good(case)
        if "--max-memory" in result.name
    ]
    if not capped:
        return None
    capped.sort(key=lambda point: point[0])
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    caps = [cap for cap, _ in capped]
    names = [f"{cap:.0f}" for cap in caps]  # as names they stand as far apart as each other, whatever they are
    for axes, quantity, label in ((left, _seconds, "seconds"), (right, _peak_mib, "peak RSS, MiB")):
        _line(axes, names, [result.spread(quantity) for _, result in capped], "moeplan")
        axes.set(xlabel="cap, MiB", ylabel=label)
    right.plot(names, caps, linestyle=":", color=OTHERS, label="the cap")
    right.legend()
    _from_zero(left, right)
    return figure


def _over_output_size(report: Report) -> Figure | None:
    """Peak memory under a fixed cap, over the size of the output."""
    lines: dict[str, list[tuple[float, Spread]]] = {}
    for case in report.group("growth"):
        base = case.name.split("-")[-2].upper()
        for result in _good(case):
            if "--max-memory" in result.name:
                point = (case.output_nbytes / 1e9, result.spread(_peak_mib))
                lines.setdefault(f"{base}, {result.name}", []).append(point)
    if not lines:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        _line(axes, [x for x, _ in points], [y for _, y in points], name)
    axes.set(xlabel="output, GB", ylabel="peak RSS, MiB")
    axes.legend(fontsize=8)
    _from_zero(axes)
    return figure


def _over_tensors(report: Report) -> Figure | None:
    """Time and peak memory of --plan over the number of tensors."""
    points = [
        (planned_tensors(result.runs[0]), result)
        for case in report.group("planning")
        for result in _good(case)
        if case.name != "plan-8x7b"
    ]
    if not points:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, quantity, label in ((left, _seconds, "seconds"), (right, _peak_mib, "peak RSS, MiB")):
        _line(axes, [tensors for tensors, _ in points], [result.spread(quantity) for _, result in points], "--plan")
        axes.set(xlabel="tensors", ylabel=label)
    _from_zero(left, right)
    return figure


def _line(axes: Axes, x: Sequence[float] | Sequence[str], y: Sequence[Spread], name: str) -> None:
    axes.errorbar(x, [over.median for over in y], yerr=_error_bars(y), marker="o", capsize=3, label=name)


def _from_zero(*plots: Axes) -> None:
    """Show the zero of the vertical axis, so that a small difference looks small."""
    for axes in plots:
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])


def _error_bars(spreads: Sequence[Spread]) -> tuple[list[float], list[float]]:
    return [over.median - over.least for over in spreads], [over.most - over.median for over in spreads]


def _good(case: CaseResult) -> list[Result]:
    return [result for result in case.results if not result.failure]


def _seconds(run: Measurement) -> float:
    return run.seconds


def _peak_mib(run: Measurement) -> float:
    return run.peak_rss_nbytes / MIB
