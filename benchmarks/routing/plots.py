"""Draws how far each row has come from the base to the oracle."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.results import spread
from benchmarks.routing.report import names
from benchmarks.routing.results import Report, Result

NAME = "routing.png"
COLORS = ("tab:blue", "tab:orange")
INCHES_A_ROW = 0.55


def draw(report: Report, directory: Path) -> list[str]:
    """Write the plot into `directory`; returns the names of what was written."""
    keys = [key for key in names(report) if any(_good(report, key, variant) for variant in report.settings.variants)]
    if not keys:
        return []
    figure = Figure(figsize=(10, INCHES_A_ROW * len(keys) + 1.2), layout="constrained")
    axes = figure.subplots()
    variants = report.settings.variants
    height = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        results = [(row, result) for row, key in enumerate(keys) for result in _good(report, key, variant)]
        spreads = [spread(report.qualities(result)) for _, result in results]
        bars = axes.barh(
            [row + (number - (len(variants) - 1) / 2) * height for row, _ in results],
            [over.median for over in spreads],
            height=0.9 * height,
            xerr=(
                [over.median - over.least for over in spreads],
                [over.most - over.median for over in spreads],
            ),
            capsize=3,
            color=COLORS[number % len(COLORS)],
            label=f"{variant} trained",
        )
        axes.bar_label(bars, labels=[f"{over.median:.0f} %" for over in spreads], padding=4, fontsize=8)
    axes.set_yticks(range(len(keys)), [names(report)[key] for key in keys])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
    axes.margins(x=0.12)
    axes.set_xlabel("% of the gap between the base (0) and the oracle (100)")
    axes.legend(loc="upper right")
    figure.savefig(directory / NAME, dpi=120)
    return [NAME]


def _good(report: Report, key: str, variant: str) -> list[Result]:
    """The row's result in this variant, where there is one to draw."""
    result = report.result(key, variant)
    return [] if result is None or result.failure else [result]
