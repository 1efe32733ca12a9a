"""Ways to judge a target by what was measured. Each gives the numbers as text, and whether the target holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from benchmarks.cases import PLANNED_EXPERTS
from benchmarks.contenders import MATMUL, READ_BASE, Contender, mergekit, moeplan
from benchmarks.results import Measurement, Report, Result, ratios, spread

MIB = 1 << 20

LIBRARIES_NBYTES = 128 * MIB
"""What Python reads of itself and its libraries while it starts; the kernel counts that, too."""

BEND = 1.25
"""How much more a further tensor may cost at the end of a curve that is called a straight line."""


Verdict = tuple[str, bool]


class NotMeasuredError(Exception):
    """There is nothing to judge by. `failed`: because a run failed, so the target is missed."""

    def __init__(self, reason: str, *, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed


def _result(report: Report, case_name: str, contender: Contender) -> Result:
    case = report.case(case_name)
    result = next((each for each in case.results if each.name == contender.name), None) if case is not None else None
    if result is None:
        raise NotMeasuredError(f"not measured: {case_name} was not run", failed=False)
    if result.skipped is not None:
        raise NotMeasuredError(f"skipped: {result.skipped}", failed=False)
    if result.failure is not None:
        raise NotMeasuredError(f"{result.name}: {result.failure}", failed=True)
    return result


# ------------------------------------------------------------------------------------------------ kinds of targets


def _times(values: Sequence[float]) -> str:
    over = spread(values)
    return f"{over.median:.2f} × ({over.least:.2f}–{over.most:.2f})"


def slower(case: str, contender: Contender, bounds: tuple[Contender, ...], at_most: float, report: Report) -> Verdict:
    """Seconds of `contender` over the longest of `bounds`, round by round."""
    below = [ratios(_result(report, case, contender), _result(report, case, bound)) for bound in bounds]
    values = [min(each) for each in zip(*below, strict=True)]
    return _times(values), spread(values).median <= at_most


def faster(case: str, contender: Contender, than: Contender, at_least: float, report: Report) -> Verdict:
    values = ratios(_result(report, case, than), _result(report, case, contender))
    return _times(values), spread(values).median >= at_least


def seconds(case: str, contender: Contender, at_most: float, report: Report) -> Verdict:
    over = _result(report, case, contender).spread(lambda run: run.seconds)
    return f"{over.median:.2f} s ({over.least:.2f}–{over.most:.2f})", over.median <= at_most


def peak(case: str, contender: Contender, at_most: int, report: Report) -> Verdict:
    """The highest peak of all rounds, since a cap is one that always holds."""
    most = _result(report, case, contender).spread(_peak_rss).most
    return f"{most / MIB:.0f} MiB", most <= at_most


def same_peak(contender: Contender, smaller: str, larger: str, report: Report) -> Verdict:
    before = _result(report, smaller, contender).spread(_peak_rss).median
    after = _result(report, larger, contender).spread(_peak_rss).median
    return f"{before / MIB:.0f} MiB, then {after / MIB:.0f} MiB", after <= 1.05 * before


def same_bytes(case: str, contender: Contender, as_that_of: Contender, report: Report) -> Verdict:
    digests = {_result(report, case, each).runs[0].digest for each in (contender, as_that_of)}
    equal = len(digests) == 1 and None not in digests
    return ("equal" if equal else "NOT equal"), equal


def added(case: str, report: Report) -> Verdict:
    """The most of all rounds, since what can be shared is shared each time."""
    runs = _result(report, case, moeplan()).runs
    share = max((run.volume_growth_nbytes or 0) / run.output_nbytes for run in runs)
    return f"{share:.2%} of {runs[0].output_nbytes / 1e9:.1f} GB", share < 0.01


# ------------------------------------------------------------------------------------------------ single targets


def upcycling_reads_once(report: Report) -> Verdict:
    runs = _result(report, "upcycling", moeplan()).runs
    there, counted = _distinct_nbytes(report, "upcycling"), _most_read(runs)
    kernel = max(max(run.read_nbytes, run.disk_read_nbytes) for run in runs)
    text = f"{there:,} bytes there are; engine {counted:,}, /proc/PID/io {kernel:,}"
    return text, counted == there and kernel <= there + LIBRARIES_NBYTES


def hidden_reads_once(report: Report) -> Verdict:
    counted = _most_read(_result(report, "hidden", moeplan(gate_mode="hidden")).runs)
    there = _distinct_nbytes(report, "hidden")
    return f"{there:,} bytes there are; engine {counted:,}, {counted - there:,} more", counted == there


def _most_read(runs: Sequence[Measurement]) -> int:
    """What the engine counted in the round where that was most."""
    return max(_reported(run, "result", "read_nbytes") for run in runs)


def _distinct_nbytes(report: Report, case_name: str) -> int:
    """The bytes of the distinct source tensors of a case that was run."""
    return next(case.read_nbytes for case in report.cases if case.name == case_name)


def hidden_in_time(report: Report) -> Verdict:
    """Seconds of the hidden run over what is allowed, round by round."""
    hidden, plain, base, matmul = (
        _result(report, "hidden", contender).runs
        for contender in (moeplan(gate_mode="hidden"), moeplan(), READ_BASE, MATMUL)
    )
    values = [
        run.seconds / (random.seconds + 1.3 * max(read.seconds, _arithmetic_seconds(product)))
        for run, random, read, product in zip(hidden, plain, base, matmul, strict=True)
    ]
    return f"{_times(values)} of what is allowed", spread(values).median <= 1.0


def _arithmetic_seconds(run: Measurement) -> float:
    """The arithmetic in the dtype that this machine is faster in."""
    return float(min((run.printed or {}).values()))


def hidden_memory(report: Report) -> Verdict:
    own = _result(report, "hidden", moeplan(gate_mode="hidden")).spread(_peak_rss).median
    peers = _result(report, "hidden", mergekit("hidden")).spread(_peak_rss).median
    return f"{own / MIB:.0f} MiB of {peers / MIB:.0f} MiB: {own / peers:.2f} ×", own <= peers / 10


def planning_is_linear(report: Report) -> Verdict:
    """What a further tensor costs on the last part of the curve, over what it costs on the part before."""
    points = []
    for num_experts in PLANNED_EXPERTS[-3:]:
        result = _result(report, f"plan-70b-{num_experts}", moeplan("--plan"))
        points.append((planned_tensors(result.runs[0]), result.spread(lambda run: run.seconds).median))
    slopes = [(t1 - t0) / (n1 - n0) for (n0, t0), (n1, t1) in pairwise(points)]
    text = f"{slopes[1] * 1e6:.0f} µs a further tensor, {slopes[0] * 1e6:.0f} µs before"
    return text, slopes[1] <= BEND * slopes[0]


def planned_tensors(run: Measurement) -> int:
    """The tensors of the output that a run of moeplan planned."""
    return _reported(run, "plan", "output", "tensors")


def cap_nbytes(run: Measurement) -> int:
    """The memory cap that a run of moeplan had."""
    return _reported(run, "plan", "memory", "cap_nbytes")


def _peak_rss(run: Measurement) -> float:
    return run.peak_rss_nbytes


def _reported(run: Measurement, *path: str) -> int:
    """A number in the JSON that moeplan printed."""
    value = run.printed
    for key in path:
        value = (value or {})[key]
    if not isinstance(value, int):
        raise TypeError(f"moeplan's {'.'.join(path)} is {value!r}, not a number of bytes")
    return value
