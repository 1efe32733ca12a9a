"""What the project set out to reach, beside what was measured.

The thresholds are the issues'. Where an issue has a word for a number (once, linear, does not grow), the row says what
number it was judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.cases import MEMORY_CAPS, PLANNED_EXPERTS, growth_name
from benchmarks.contenders import (
    CAP,
    COPY_CAPPED,
    CP,
    HIDDEN_7B_CAPPED,
    HIDDEN_70B_CAPPED,
    READ_FLOOR,
    RIDGE_7B_CAPPED,
    UNCHECKED,
    WRITE_FLOOR,
    mergekit,
    moeplan,
)
from benchmarks.results import Report
from benchmarks.shapes import LLAMA_7B, LLAMA_70B
from benchmarks.verdicts import (
    BEND,
    NotMeasuredError,
    Verdict,
    added,
    faster,
    hidden_in_time,
    hidden_memory,
    hidden_reads_once,
    peak,
    planning_is_linear,
    same_bytes,
    same_peak,
    seconds,
    slower,
    upcycling_reads_once,
)

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class TargetRow:
    """A target, what was measured, and whether it holds; None where that was not measured, and `measured` says why."""

    issue: int
    target: str
    measured: str
    holds: bool | None


@dataclass(frozen=True, slots=True)
class _Target:
    issue: int
    says: str
    judge: Callable[[Report], Verdict]


def target_rows(report: Report) -> list[TargetRow]:
    """All targets. Of a run on tiny models nothing is judged."""
    return [_row(target, report) for target in _TARGETS]


def _row(target: _Target, report: Report) -> TargetRow:
    try:
        measured, holds = target.judge(report)
    except NotMeasuredError as reason:
        return TargetRow(target.issue, target.says, str(reason), False if reason.failed and not report.tiny else None)
    return TargetRow(target.issue, target.says, measured, None if report.tiny else holds)


_LAST_PLANNED = f"plan-70b-{PLANNED_EXPERTS[-1]}"
_COPY_70B = growth_name(LLAMA_70B, 4)
_COPY_7B_LEAST, _COPY_7B_MOST = (growth_name(LLAMA_7B, layers) for layers in (2, 8))
_HIDDEN_7B, _HIDDEN_7B_TWICE = (growth_name(LLAMA_7B, layers, "hidden") for layers in (4, 8))
_HIDDEN_70B, _HIDDEN_70B_TWICE = (growth_name(LLAMA_70B, layers, "hidden") for layers in (2, 4))


def _copy_targets(case: str) -> tuple[_Target, ...]:
    about = f"copy, 4 × 1.1B ({'warm' if case == 'random' else case})"
    return (
        _Target(4, f"{about}: ≤ 1.5 × the write floor", partial(slower, case, moeplan(), (WRITE_FLOOR,), 1.5)),
        _Target(4, f"{about}: ≥ 2 × as fast as cp", partial(faster, case, moeplan(), CP, 2.0)),
        _Target(4, f"{about}: ≥ 5 × as fast as mergekit-moe", partial(faster, case, moeplan(), mergekit(), 5.0)),
        _Target(4, f"{about}: peak RSS ≤ 384 MiB", partial(peak, case, moeplan(), 384 * MIB)),
    )


def _volume_targets(kind: str, title: str) -> tuple[_Target, ...]:
    sparse = f"{kind}-8x7b"
    return (
        _Target(4, f"{title}, 8 × 7B from sparse files: ≤ 10 s", partial(seconds, sparse, moeplan(), 10.0)),
        _Target(4, f"{title}, 8 × 7B from sparse files: adds < 1 % of its size in blocks", partial(added, sparse)),
        _Target(
            4,
            f"{title}, 4 × 1.1B: bytes as in the copied one (--clone-tensors)",
            partial(same_bytes, f"{kind}-clown-car", moeplan(), moeplan("--clone-tensors")),
        ),
    )


_TARGETS: tuple[_Target, ...] = (
    *_copy_targets("cold"),
    *_copy_targets("random"),
    _Target(4, "upcycling 8 ×: each source byte read once (/proc: + 128 MiB of libraries)", upcycling_reads_once),
    _Target(
        4,
        "f32 → bf16: ≤ 1.6 × the longer of read floor and write floor",
        partial(slower, "f32", moeplan(), (READ_FLOOR, WRITE_FLOOR), 1.6),
    ),
    *_volume_targets("xfs", "XFS"),
    *_volume_targets("btrfs", "Btrfs"),
    _Target(4, f"--max-memory {CAP}, 1.1B: peak RSS ≤ 384 MiB", partial(peak, "memory", COPY_CAPPED, 384 * MIB)),
    _Target(
        4, f"--max-memory {CAP}, 1.1B: bytes as without a cap", partial(same_bytes, "memory", COPY_CAPPED, moeplan())
    ),
    _Target(
        4,
        f"--max-memory {MEMORY_CAPS[0]}, 1.1B: bytes as without a cap",
        partial(same_bytes, "memory", moeplan("--max-memory", MEMORY_CAPS[0]), moeplan()),
    ),
    _Target(
        4,
        f"--max-memory {CAP}, 70B with 4 layers: peak RSS ≤ 384 MiB",
        partial(peak, _COPY_70B, COPY_CAPPED, 384 * MIB),
    ),
    _Target(
        4,
        f"--max-memory {CAP}, 70B with 4 layers: bytes as without a cap",
        partial(same_bytes, _COPY_70B, COPY_CAPPED, moeplan()),
    ),
    _Target(
        4,
        "copy, 7B: peak RSS the same for 4 × the layers (to 5 %)",
        partial(same_peak, COPY_CAPPED, _COPY_7B_LEAST, _COPY_7B_MOST),
    ),
    _Target(4, "--plan, 8 × 7B: ≤ 1 s", partial(seconds, "plan-8x7b", moeplan("--plan"), 1.0)),
    _Target(4, "--plan, 128 experts of a 70B: ≤ 5 s", partial(seconds, _LAST_PLANNED, moeplan("--plan"), 5.0)),
    _Target(4, "--plan, 128 experts of a 70B: ≤ 500 MB", partial(peak, _LAST_PLANNED, moeplan("--plan"), 500 * 10**6)),
    _Target(4, f"--plan: linear in tensors (at most {BEND} × the cost of a tensor before)", planning_is_linear),
    _Target(5, "hidden: ≤ random + 1.3 × the longer of reading the base and the arithmetic", hidden_in_time),
    _Target(
        5,
        "hidden: ≥ 3 × as fast as mergekit-moe",
        partial(faster, "hidden", moeplan(gate_mode="hidden"), mergekit("hidden"), 3.0),
    ),
    _Target(5, "hidden: ≤ a tenth of mergekit-moe's memory", hidden_memory),
    _Target(5, "hidden, 7B with 4 layers: peak RSS ≤ 1 GiB", partial(peak, _HIDDEN_7B, HIDDEN_7B_CAPPED, GIB)),
    _Target(
        5,
        "hidden, 70B with 2 layers: peak RSS ≤ 1.25 GiB",
        partial(peak, _HIDDEN_70B, HIDDEN_70B_CAPPED, GIB + GIB // 4),
    ),
    _Target(
        5,
        "hidden, 7B: peak RSS the same for twice the layers (to 5 %)",
        partial(same_peak, HIDDEN_7B_CAPPED, _HIDDEN_7B, _HIDDEN_7B_TWICE),
    ),
    _Target(
        5,
        "hidden, 70B: peak RSS the same for twice the layers (to 5 %)",
        partial(same_peak, HIDDEN_70B_CAPPED, _HIDDEN_70B, _HIDDEN_70B_TWICE),
    ),
    _Target(5, "hidden: each byte of the base read once", hidden_reads_once),
    _Target(
        6,
        "checksums and journal, 4 × 1.1B: ≤ 1.05 × the time without them",
        partial(slower, "checks", moeplan(), (UNCHECKED,), 1.05),
    ),
    _Target(
        8,
        "ridge, 7B with 4 layers, 4 × 4096 tokens: peak RSS ≤ 2 GiB",
        partial(peak, "ridge-7b-4", RIDGE_7B_CAPPED, 2 * GIB),
    ),
)
