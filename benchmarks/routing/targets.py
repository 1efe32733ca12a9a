"""What routers set out to reach, beside what was measured. The thresholds are those of issue 8.

A target holds by the median over the seeds, in the variant that does worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.results import spread
from benchmarks.routing.results import Report
from benchmarks.routing.rows import EQUAL, MERGEKIT_HIDDEN, RIDGE, RIDGE_AVERAGE, RIDGE_FILE, RIDGE_SAMPLES, Row
from benchmarks.routing.settings import VARIANTS
from benchmarks.targets import TargetRow
from benchmarks.verdicts import NotMeasuredError

ISSUE = 8

Points = Callable[[Report, str], list[float]]
"""What is judged of a variant, one number for each seed."""


def target_rows(report: Report) -> list[TargetRow]:
    """All targets. Of a run on tiny models nothing is judged."""
    return [_row(target, report) for target in _TARGETS]


@dataclass(frozen=True, slots=True)
class _Target:
    """In each of `variants`, the median of `points` is at least `least`."""

    says: str
    points: Points
    least: float
    unit: str = "%"
    variants: Sequence[str] = VARIANTS


def _row(target: _Target, report: Report) -> TargetRow:
    try:
        medians = {variant: spread(target.points(report, variant)).median for variant in target.variants}
    except NotMeasuredError as reason:
        return TargetRow(ISSUE, target.says, str(reason), False if reason.failed and not report.tiny else None)
    measured = ", ".join(f"{median:.0f} {target.unit} ({variant})" for variant, median in medians.items())
    holds = None if report.tiny else min(medians.values()) >= target.least
    return TargetRow(ISSUE, target.says, measured, holds)


def _quality(row: Row, report: Report, variant: str) -> list[float]:
    result = report.result(row.key, variant)
    if result is None:
        raise NotMeasuredError(f"not measured: {row.key} was not run with {variant}", failed=False)
    if result.skipped is not None:
        raise NotMeasuredError(f"skipped: {result.skipped}", failed=False)
    if result.failure is not None:
        raise NotMeasuredError(f"{row.key}: {result.failure}", failed=True)
    return report.qualities(result)


def _ahead(row: Row, of: Row, report: Report, variant: str) -> list[float]:
    """By how many points it is ahead of another row, seed by seed: those have the same prompts."""
    ours, theirs = _quality(row, report, variant), _quality(of, report, variant)
    if not of.seeded:
        theirs *= len(ours)
    return [a - b for a, b in zip(ours, theirs, strict=True)]


_TARGETS = (
    _Target(
        "ridge with mergekit-moe's prompts: ≥ 20 points ahead of its hidden",
        partial(_ahead, RIDGE, MERGEKIT_HIDDEN),
        20.0,
        "points",
    ),
    _Target(
        "ridge with mergekit-moe's prompts: ahead of equal weights",
        partial(_ahead, RIDGE, EQUAL),
        0.0,
        "points",
    ),
    _Target("ridge with 4096 tokens an expert: ≥ 50 %", partial(_quality, RIDGE_FILE), 50.0),
    _Target("ridge with samples of the experts: ≥ 45 %", partial(_quality, RIDGE_SAMPLES), 45.0),
    _Target(
        "ridge with an averaged backbone: ≥ the oracle of the base's",
        partial(_quality, RIDGE_AVERAGE),
        100.0,
        variants=VARIANTS[1:],
    ),
)
