"""Ratios are of one round; a target holds, is missed, or was not measured, and the report says which."""

from dataclasses import replace

import pytest

from benchmarks.cases import MEMORY_CAPS, PLANNED_EXPERTS
from benchmarks.contenders import (
    COPY_CAPPED,
    CP,
    MATMUL,
    READ_BASE,
    READ_FLOOR,
    WRITE_FLOOR,
    Contender,
    mergekit,
    moeplan,
)
from benchmarks.results import CaseResult, Machine, Report, Result, not_run, ratios
from benchmarks.targets import TargetRow, target_rows

MIB = 1 << 20
RUN = replace(not_run(""), error=None, printed={"result": {"read_nbytes": 1000}})


def result(contender: Contender, *seconds: float, peak_mib: int = 300, **more: object) -> Result:
    runs = tuple(replace(RUN, seconds=s, peak_rss_nbytes=peak_mib * MIB, **more) for s in seconds)
    return Result(contender.name, runs)


def report(*results: Result, case: str = "random", tiny: bool = False) -> Report:
    measured = CaseResult(case, case, "", read_nbytes=1000, output_nbytes=1000, results=results)
    return Report("now", 1.0, 3, tiny, False, Machine("", 1, 1, "", "", 0.0, 0.0), (measured,))


def together(*reports: Report) -> Report:
    return replace(reports[0], cases=tuple(case for measured in reports for case in measured.cases))


def row(measured: Report, words: str) -> TargetRow:
    return next(row for row in target_rows(measured) if words in row.target)


def test_a_ratio_is_taken_within_each_round() -> None:
    # The disk was three times as slow in the second round, for both.
    assert ratios(result(moeplan(), 1.5, 4.5), result(WRITE_FLOOR, 1.0, 3.0)) == [1.5, 1.5]


@pytest.mark.parametrize(("seconds", "holds"), [((4.4, 4.5, 9.0), True), ((4.4, 4.6, 4.7), False)])
def test_a_target_holds_by_the_median(seconds: tuple[float, ...], holds: bool) -> None:
    measured = report(result(WRITE_FLOOR, 3.0, 3.0, 3.0), result(moeplan(), *seconds))
    assert row(measured, "(warm): ≤ 1.5 × the write floor").holds is holds


@pytest.mark.parametrize(("seconds", "holds"), [((1.0, 2.0, 9.0), True), ((1.0, 1.9, 9.0), False)])
def test_as_fast_as_another_is_by_the_median_too(seconds: tuple[float, ...], holds: bool) -> None:
    judged = row(report(result(CP, *seconds), result(moeplan(), 1.0, 1.0, 1.0)), "(warm): ≥ 2 × as fast as cp")
    assert (judged.holds, judged.measured) == (holds, f"{seconds[1]:.2f} × (1.00–9.00)")


@pytest.mark.parametrize(("seconds", "holds"), [((9.0, 10.0, 30.0), True), ((9.0, 10.1, 30.0), False)])
def test_seconds_are_judged_by_the_median(seconds: tuple[float, ...], holds: bool) -> None:
    judged = row(
        report(result(moeplan(), *seconds, output_nbytes=1000), case="xfs-8x7b"),
        "XFS, 8 × 7B from sparse files: ≤ 10 s",
    )
    assert (judged.holds, judged.measured) == (holds, f"{seconds[1]:.2f} s (9.00–30.00)")


@pytest.mark.parametrize(("seconds", "holds"), [(3.2, True), (3.3, False)])
def test_what_is_converted_is_allowed_the_longer_of_reading_and_writing(seconds: float, holds: bool) -> None:
    measured = report(result(READ_FLOOR, 2.0), result(WRITE_FLOOR, 1.0), result(moeplan(), seconds), case="f32")
    assert row(measured, "f32 → bf16").holds is holds


@pytest.mark.parametrize(("larger", "holds"), [(210, True), (211, False)])
def test_a_peak_is_the_same_to_five_in_a_hundred(larger: int, holds: bool) -> None:
    peaks = {"growth-7b-2": 200, "growth-7b-8": larger}
    measured = together(*(report(result(COPY_CAPPED, 1.0, peak_mib=mib), case=name) for name, mib in peaks.items()))
    judged = row(measured, "copy, 7B: peak RSS the same")
    assert (judged.holds, judged.measured) == (holds, f"200 MiB, then {larger} MiB")


@pytest.mark.parametrize(("own", "holds"), [(30, True), (31, False)])
def test_hidden_is_allowed_a_tenth_of_the_peer_s_memory(own: int, holds: bool) -> None:
    peer = result(mergekit("hidden"), 1.0, peak_mib=300)
    measured = report(result(moeplan(gate_mode="hidden"), 1.0, peak_mib=own), peer, case="hidden")
    judged = row(measured, "hidden: ≤ a tenth of mergekit-moe's memory")
    assert (judged.holds, judged.measured) == (holds, f"{own} MiB of 300 MiB: {own / 300:.2f} ×")


@pytest.mark.parametrize(("seconds", "holds"), [((1.0, 2.0, 7.0), True), ((1.0, 2.0, 7.1), False)])
def test_planning_is_linear_where_a_further_tensor_costs_as_much_at_the_end_or_little_more(
    seconds: tuple[float, ...], holds: bool
) -> None:
    planned = [
        report(
            result(moeplan("--plan"), took, printed={"plan": {"output": {"tensors": tensors}}}),
            case=f"plan-70b-{num_experts}",
        )
        for num_experts, took, tensors in zip(PLANNED_EXPERTS[1:], seconds, (1000, 2000, 6000), strict=True)
    ]
    judged = row(together(*planned), "--plan: linear")
    last = 1250 if holds else 1275
    assert (judged.holds, judged.measured) == (holds, f"{last} µs a further tensor, 1000 µs before")


def test_a_memory_cap_is_judged_by_the_worst_run() -> None:
    runs = result(moeplan(), 1.0, 1.0, 1.0)
    exceeded = replace(runs.runs[1], peak_rss_nbytes=385 * MIB)
    measured = report(replace(runs, runs=(runs.runs[0], exceeded, runs.runs[2])))
    assert row(measured, "copy, 4 × 1.1B (warm): peak RSS").measured == "385 MiB"
    assert row(measured, "copy, 4 × 1.1B (warm): peak RSS").holds is False
    kept = report(result(moeplan(), 1.0, peak_mib=384))
    assert row(kept, "copy, 4 × 1.1B (warm): peak RSS").holds is True


def test_a_target_whose_run_failed_is_missed() -> None:
    failed = Result(moeplan().name, (not_run("exit status 1: no"),))
    missed = row(report(result(CP, 1.0), failed), "(warm): ≥ 2 × as fast as cp")
    assert (missed.holds, missed.measured) == (False, "moeplan: exit status 1: no")


def test_what_was_skipped_or_not_run_is_neither_held_nor_missed() -> None:
    measured = report(result(moeplan(), 1.0), Result(mergekit().name, skipped="it is not there"))
    skipped, absent = row(measured, "(warm): ≥ 5 × as fast as mergekit-moe"), row(measured, "upcycling")
    assert (skipped.holds, skipped.measured) == (None, "skipped: it is not there")
    assert (absent.holds, absent.measured) == (None, "not measured: upcycling was not run")


def test_nothing_is_judged_on_tiny_models() -> None:
    measured = report(result(WRITE_FLOOR, 1.0), result(moeplan(), 9.0), tiny=True)
    assert row(measured, "(warm): ≤ 1.5 × the write floor").holds is None


@pytest.mark.parametrize(("seconds", "holds"), [(7.2, True), (7.3, False)])
def test_hidden_is_allowed_the_longer_of_reading_and_computing(seconds: float, holds: bool) -> None:
    # 2.0 + 1.3 × max(1.0, 4.0): the arithmetic in the faster of the two dtypes.
    matmul = result(MATMUL, 30.0, printed={"float32": 9.0, "bfloat16": 4.0})
    hidden = result(moeplan(gate_mode="hidden"), seconds)
    measured = report(result(moeplan(), 2.0), result(READ_BASE, 1.0), matmul, hidden, case="hidden")
    assert row(measured, "random + 1.3").holds is holds


@pytest.mark.parametrize(
    ("counted", "kernel", "disk", "holds"),
    [
        (1000, 1000 + 128 * MIB, 0, True),
        (2000, 50 * MIB, 0, False),
        (1000, 1001 + 128 * MIB, 0, False),
        (1000, 0, 1001 + 128 * MIB, False),
    ],
)
def test_reading_once_is_what_the_engine_counts_and_what_the_kernel_saw(
    counted: int, kernel: int, disk: int, holds: bool
) -> None:
    printed = {"result": {"read_nbytes": counted}}
    little, run = (
        result(moeplan(), 1.0, printed=printed, read_nbytes=read, disk_read_nbytes=from_disk)
        for read, from_disk in ((0, 0), (kernel, disk))
    )
    measured = report(replace(run, runs=run.runs + little.runs), case="upcycling")
    assert row(measured, "upcycling").holds is holds


@pytest.mark.parametrize(("counted", "holds"), [(1000, True), (1001, False)])
def test_hidden_gates_are_to_read_nothing_again(counted: int, holds: bool) -> None:
    run = result(moeplan(gate_mode="hidden"), 1.0, printed={"result": {"read_nbytes": counted}})
    another = report(case="random")
    another = replace(another, cases=(replace(another.cases[0], read_nbytes=2000),))
    judged = row(together(another, report(run, case="hidden")), "hidden: each byte of the base read once")
    assert (judged.holds, judged.measured.endswith(f", {counted - 1000} more")) == (holds, True)


def test_what_is_read_once_and_what_is_shared_is_so_in_every_round() -> None:
    read_twice = result(moeplan(), 1.0, printed={"result": {"read_nbytes": 2000}}).runs
    once = result(moeplan(), 1.0)
    measured = report(replace(once, runs=read_twice + once.runs), case="upcycling")
    assert row(measured, "upcycling").holds is False
    copied, shared = (result(moeplan(), 1.0, output_nbytes=1000, volume_growth_nbytes=growth) for growth in (500, 0))
    measured = report(replace(shared, runs=copied.runs + shared.runs), case="xfs-8x7b")
    judged = row(measured, "XFS, 8 × 7B from sparse files: adds")
    assert (judged.holds, judged.measured) == (False, "50.00% of 0.0 GB")
    for growth, holds in ((9, True), (10, False)):
        measured = report(result(moeplan(), 1.0, output_nbytes=1000, volume_growth_nbytes=growth), case="xfs-8x7b")
        assert row(measured, "XFS, 8 × 7B from sparse files: adds").holds is holds


@pytest.mark.parametrize("cap", ["384MiB", MEMORY_CAPS[0]])
@pytest.mark.parametrize(
    ("digests", "measured", "holds"),
    [(("a", "a"), "equal", True), (("a", "b"), "NOT equal", False), ((None, None), "NOT equal", False)],
)
def test_outputs_of_other_bytes_are_said_to_be_so(
    cap: str, digests: tuple[str | None, str | None], measured: str, holds: bool
) -> None:
    contenders = moeplan(), moeplan("--max-memory", cap)
    results = [result(each, 1.0, digest=digest) for each, digest in zip(contenders, digests, strict=True)]
    verdict = row(report(*results, case="memory"), f"{cap}, 1.1B: bytes as without a cap")
    assert (verdict.measured, verdict.holds) == (measured, holds)
