"""What of an interrupted run counts, when a disk, a machine or a file failed since."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import repeat
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plans import Stop, digest, go_on, planned, stopping_after

from executor import durability, journal, resuming, verifying
from executor.durability import Durability
from executor.errors import RunError
from executor.journal import Journal
from executor.writer import ShardWriter
from planner.expr import DType, Expr, Opaque, Read, cast, rows, scale
from planner.plan import FileSink, Plan


def fail_to_sync(monkeypatch: pytest.MonkeyPatch, after: Iterator[float]) -> None:
    """Have the next syncs of shards fail, each after so many seconds."""
    fsync = os.fsync

    def failing(fd: int) -> None:
        is_shard = ".safetensors" in str(Path(f"/proc/self/fd/{fd}").readlink())
        seconds = next(after, None) if is_shard else None
        if seconds is not None:
            time.sleep(seconds)
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)


def is_written_anew(plan: Plan, place: Path, whole: Any) -> bool:
    """Whether the next run at `place` takes nothing for finished, and writes what was written as a `whole`."""
    return "resumed" not in go_on(plan, place).nbytes_by_path and digest(place / "model") == whole[0]


def test_what_is_written_is_put_on_the_disk_while_nothing_happens_but_a_kernel(
    reads: dict[str, Read], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durability, "SYNC_SECONDS", 0.0)
    whole = rows(reads["third"], 0, 1000)
    kernel = Opaque("slow", "0", (), DType.F32, (1,), weights=(whole,), block_nbytes=16 << 20)
    plan = planned({"copy": reads["large"], "sums": kernel}, budget=64 << 20)
    synced: list[int] = []
    mark_safe = Journal.mark_safe
    monkeypatch.setattr(Journal, "mark_safe", lambda self, at: (synced.append(at), mark_safe(self, at)))

    def slow(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Any) -> None:
        output.zero_()
        before, deadline = len(synced), time.monotonic() + 30
        while len(synced) < before + 3 and time.monotonic() < deadline:
            weights.for_each_block(weights.matrices[0], 1000, lambda begin, block: None)
        assert len(synced) >= before + 3

    go_on(plan, tmp_path / "place", kernels={"slow": slow})


def test_what_is_written_while_something_is_synced_is_not_taken_for_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Journal(tmp_path, {})
    before, meanwhile = FileSink(0, 8), FileSink(1, 8)
    kept.add_chunk(before, 0, 4, 1, [before])
    monkeypatch.setattr(ShardWriter, "sync", lambda _: kept.add_chunk(meanwhile, 0, 4, 1, [meanwhile]))
    with ThreadPoolExecutor(1) as worker, closing(ShardWriter(tmp_path, [])) as shards:
        Durability(shards, kept, worker).finish()
    kept.close()
    monkeypatch.setattr(journal, "_machine_start", lambda: "another start")
    again = Journal(tmp_path, {})
    again.close()
    assert list(again.finished.streams) == [before]


def test_a_sync_begins_when_the_last_one_was_done_ten_seconds_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, begun = 0.0, list[float]()
    monkeypatch.setattr(durability, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(ShardWriter, "sync", lambda _: begun.append(now))
    with ThreadPoolExecutor(1) as worker, closing(ShardWriter(tmp_path, [])) as shards:
        syncing = Durability(shards, Journal(), worker)
        for second in range(40):
            now = float(second)
            syncing.now_and_then()
            worker.submit(int).result()  # so it is done
    assert begun == [11.0, 23.0, 35.0]


def test_nobody_waits_for_a_sync_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, ended_in_time = Event(), list[bool]()
    monkeypatch.setattr(durability, "SYNC_SECONDS", -1.0)
    monkeypatch.setattr(ShardWriter, "sync", lambda _: ended_in_time.append(may_end.wait(10)))
    with ThreadPoolExecutor(1) as worker, closing(ShardWriter(tmp_path, [])) as shards:
        syncing = Durability(shards, Journal(), worker)
        syncing.now_and_then()
        syncing.now_and_then()
        may_end.set()
        syncing.finish()
    assert ended_in_time == [True, True]


def test_a_sync_that_failed_in_the_background_is_an_error_the_next_time_that_one_might_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later it is none any more: the system says once what it could not write."""
    failures = iter([RunError("the disk is broken")])

    def sync(_: ShardWriter) -> None:
        for failure in failures:
            raise failure

    monkeypatch.setattr(durability, "SYNC_SECONDS", -1.0)
    monkeypatch.setattr(ShardWriter, "sync", sync)
    with ThreadPoolExecutor(1) as worker, closing(ShardWriter(tmp_path, [])) as shards:
        syncing = Durability(shards, Journal(), worker)
        syncing.now_and_then()
        worker.submit(int).result()
        for again in (syncing.now_and_then, syncing.finish):
            with pytest.raises(RunError, match="the disk is broken"):
                again()


@pytest.mark.parametrize("place", ["first", "other"])
def test_what_a_disk_lost_that_was_unplugged_is_written_again_and_nothing_else(
    plan: Plan, tmp_path: Path, whole: Any, place: str
) -> None:
    """A disk may come back without what the system was still to write, though the machine was never down."""
    stopped = tmp_path / "place"
    with pytest.raises(Stop):
        go_on(plan, stopped, on_progress=stopping_after(20_000_000))
    lines = map(json.loads, (stopped / journal.NAME).read_text().splitlines())
    chunks = [line for line in lines if len(line.get("sinks", ())) == (2 if place == "other" else 1)]
    (first, numel), (shard, offset) = chunks[0]["elements"], chunks[0]["sinks"][-1]
    with (stopped / "model" / plan.shards[shard].filename).open("r+b") as file:
        file.seek(offset + 2 * first + numel)
        file.write(bytes(numel))
    result = go_on(plan, stopped)
    assert digest(stopped / "model") == whole[0]
    assert result.checksums == whole[1].checksums
    assert result.nbytes_by_path["resumed"] >= 4_000_000


def test_what_is_read_again_beside_what_a_disk_lost_counts_once(reads: dict[str, Read], tmp_path: Path) -> None:
    outputs: dict[str, Expr] = {
        "copy": reads["large"],
        "halved": cast(scale(reads["large"], 0.5), DType.F16),
        "sums": Opaque("column_sums", "1", (reads["large"],), DType.F32, (1000,)),
    }
    plan = planned(outputs)
    whole = go_on(plan, tmp_path / "whole")

    def stopping(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", kernels={"column_sums": stopping})
    (shard,) = plan.shards
    offset = next(tensor.offset for tensor in shard.tensors if tensor.name == "halved")
    with (tmp_path / "place" / "model" / shard.filename).open("r+b") as file:
        file.seek(offset + 1_000_000)
        file.write(bytes(4096))
    result = go_on(plan, tmp_path / "place")  # reads it for what is halved, and for the kernel
    assert result.nbytes_by_path["resumed"] == reads["large"].nbytes
    assert digest(tmp_path / "place" / "model") == digest(tmp_path / "whole" / "model")
    assert result.checksums == whole.checksums


def test_what_is_read_again_before_it_counts_takes_no_more_memory_than_chunks_will(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    wrong = verifying.wrong

    def noting(ranges: Sequence[verifying.Range], *, num_workers: int, chunk_nbytes: int) -> list[int]:
        taken.append(2 * num_workers * chunk_nbytes)
        return wrong(ranges, num_workers=num_workers, chunk_nbytes=chunk_nbytes)

    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", on_progress=stopping_after(plan.written_nbytes))
    monkeypatch.setattr(resuming, "wrong", noting)
    go_on(plan, tmp_path / "place")
    assert taken == [plan.pool.nbytes]


def test_after_a_restart_of_the_machine_only_what_was_on_the_disk_counts(
    plan: Plan, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    with pytest.raises(Stop):
        go_on(plan, place, on_progress=stopping_after(12_000_000))
    monkeypatch.setattr(journal, "_machine_start", lambda: "another start")
    result = go_on(plan, place)
    assert "resumed" not in result.nbytes_by_path
    assert digest(place / "model") == whole[0]

    monkeypatch.setattr(durability, "SYNC_SECONDS", 0.0)
    with pytest.raises(Stop):
        go_on(plan, tmp_path / "synced", on_progress=stopping_after(plan.written_nbytes))
    monkeypatch.setattr(journal, "_machine_start", lambda: "yet another start")
    assert go_on(plan, tmp_path / "synced").nbytes_by_path["resumed"] > 0
    assert digest(tmp_path / "synced" / "model") == whole[0]


def test_what_could_not_be_synced_does_not_count(
    plan: Plan, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    fail_to_sync(monkeypatch, repeat(0.0))
    with pytest.raises(RunError, match="Input/output error"):
        go_on(plan, place)
    monkeypatch.undo()
    assert is_written_anew(plan, place, whole)


def test_a_failure_to_sync_in_the_background_fails_the_run_however_late_it_comes(
    plan: Plan, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    monkeypatch.setattr(durability, "SYNC_SECONDS", 0.0)
    fail_to_sync(monkeypatch, iter([0.5]))  # by then, everything is written
    with pytest.raises(RunError, match="Input/output error"):
        go_on(plan, place)
    monkeypatch.undo()
    assert is_written_anew(plan, place, whole)


@pytest.mark.parametrize("harm", [Path.unlink, lambda shard: os.truncate(shard, 5000)])
def test_a_shard_that_is_gone_or_cut_is_written_anew(
    plan: Plan, tmp_path: Path, whole: Any, harm: Callable[[Path], None]
) -> None:
    place = tmp_path / "place"
    with pytest.raises(Stop):
        go_on(plan, place, on_progress=stopping_after(plan.written_nbytes))
    harm(min((place / "model").iterdir()))
    assert is_written_anew(plan, place, whole)


def test_a_shard_that_was_gone_is_not_trusted_after_a_restart_of_the_machine_either(
    plan: Plan, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    monkeypatch.setattr(durability, "SYNC_SECONDS", 0.0)
    with pytest.raises(Stop):
        go_on(plan, place, on_progress=stopping_after(plan.written_nbytes))
    monkeypatch.undo()
    for shard in (place / "model").iterdir():
        shard.unlink()
    with pytest.raises(Stop):  # the shards are there again, at full size, with next to nothing in them
        go_on(plan, place, on_progress=stopping_after(0))
    monkeypatch.setattr(journal, "_machine_start", lambda: "another start")
    assert is_written_anew(plan, place, whole)
