"""What the table says: a row for each contender of each case, and what else a run has to say."""

from dataclasses import replace

import pytest

from benchmarks.contenders import CP, READ_FLOOR, WRITE_FLOOR, mergekit, moeplan
from benchmarks.results import CaseResult, Machine, Report, Result, not_run
from benchmarks.table import COLUMNS, _note, rows

MIB = 1 << 20
RUN = replace(not_run(""), error=None)


def test_a_row_sums_up_a_contender_s_rounds_or_says_why_there_is_nothing_to_sum_up() -> None:
    floor = tuple(replace(RUN, seconds=seconds) for seconds in (1.0, 2.0, 10.0))
    own = tuple(
        replace(
            RUN,
            seconds=seconds,
            cpu_seconds=2 * seconds,
            peak_rss_nbytes=mib * MIB,
            disk_read_nbytes=3 * 10**9,
            disk_written_nbytes=4 * 10**9,
            output_nbytes=6 * 10**9,
        )
        for seconds, mib in ((1.5, 90), (2.0, 92), (14.0, 91))
    )
    results = (
        Result(WRITE_FLOOR.name, floor),
        Result(moeplan().name, own),
        Result(READ_FLOOR.name, (RUN,)),
        Result(CP.name, (RUN, not_run("no space"))),
        Result(mergekit().name, skipped="it is not there"),
    )
    cases = tuple(
        CaseResult(name, name, "", read_nbytes=0, output_nbytes=0, results=of)
        for name, of in (("a", results), ("b", results[1:3]))
    )
    table = rows(Report("now", 1.0, 3, False, False, Machine("", 1, 1, "", "", 0.0, 0.0), cases))
    assert {len(row) for row in table} == {len(COLUMNS)}
    assert [row[0] for row in table] == ["a", "", "", "", "", "b", ""]
    assert [row[1:] for row in table[:5]] == [
        ("write floor", "2.00 (1.00–10.00)", "0.0", "", "", "", "0.00", "0.00", ""),
        ("moeplan", "2.00 (1.50–14.00)", "4.0", "3.00", "1.40", "92", "3.00", "4.00", ""),
        ("read floor", "0.00 (0.00–0.00)", "0.0", "", "", "", "0.00", "0.00", ""),
        ("cp", *[""] * 7, "failed: no space"),
        ("mergekit-moe", *[""] * 7, "skipped: it is not there"),
    ]
    assert table[5][1:] == ("moeplan", "2.00 (1.50–14.00)", "4.0", "3.00", "", "92", "3.00", "4.00", "")


@pytest.mark.parametrize(("growth", "said"), [(-4096, "adds 0.00 GB"), (6_770_000_000, "adds 6.77 GB")])
def test_what_a_run_adds_to_a_file_system_is_never_minus_nothing(growth: int, said: str) -> None:
    assert _note(replace(not_run(""), volume_growth_nbytes=growth)) == said


def test_a_run_says_what_is_to_be_known_of_its_numbers() -> None:
    plan = {"plan": {"output": {"tensors": 31_203}}}
    said = {
        "": {"direct": True},
        "no direct I/O here, so through the page cache": {"direct": False},
        "f32 1.25 s, bf16 0.50 s without start": {"float32": 1.25, "bfloat16": 0.5},
        "31,203 tensors": plan,
    }
    assert [_note(replace(RUN, printed=printed)) for printed in said.values()] == list(said)
    assert _note(replace(RUN, printed=plan, output_nbytes=1)) == ""
