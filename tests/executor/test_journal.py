"""What a journal keeps, and when it is on the disk."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from executor import journal
from executor.durability import Durability
from executor.errors import RunError
from executor.journal import Journal
from executor.writer import ShardWriter
from planner.plan import FileSink


def test_results_that_an_earlier_run_had_no_time_to_remove_are_removed(tmp_path: Path) -> None:
    kept = Journal(tmp_path, {})
    for name in ("first", "second"):
        kept.save_result(name, memoryview(bytes(100)))
    kept.drop_result("first")
    kept.close()
    again = Journal(tmp_path, {})
    again.mark_safe(again.position)
    again.close()
    assert [file.name for file in (tmp_path / journal.RESULTS).iterdir()] == ["second"]


def test_a_result_stands_until_that_of_the_next_kernel_is_sure_to_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (memoryview(bytes([number] * 100)) for number in (1, 2))
    kept = Journal(tmp_path, {})
    kept.save_result("first", first)
    synced = kept.position
    kept.save_result("second", second)
    kept.drop_result("first")
    kept.mark_safe(synced)
    kept.close()
    with monkeypatch.context() as restarted:
        restarted.setattr(journal, "_machine_start", lambda: "another start")
        again = Journal(tmp_path, {})
    assert list(again.finished.results) == ["first"]
    found = memoryview(bytearray(100))
    again.load_result("first", found)
    assert found == first
    again.save_result("second", second)
    again.drop_result("first")
    again.mark_safe(again.position)
    again.close()
    assert [file.name for file in (tmp_path / journal.RESULTS).iterdir()] == ["second"]


def test_results_are_put_on_the_disk_when_they_are_to_count_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Journal(tmp_path, {})
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd)))
    for name in ("first", "second", "third"):
        kept.save_result(name, memoryview(bytes(100)))
    kept.drop_result("first")
    assert synced == []  # a kernel does not wait for the disk
    position = kept.position
    kept.drop_result("second")
    kept.mark_safe(position)
    assert sorted(synced[:2]) == ["second", "third"]
    assert synced[2:] == [journal.RESULTS, tmp_path.name, journal.NAME]
    synced.clear()
    kept.mark_safe(kept.position)
    assert synced == [journal.NAME]
    kept.close()

    again = Journal(tmp_path, {})  # of a process that was killed, results may be in the page cache alone
    synced.clear()
    again.forget_streams()
    assert synced == ["third", journal.RESULTS, tmp_path.name, journal.NAME]
    again.close()


def test_a_result_that_could_not_be_synced_fails_the_run_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def failing(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().parent.name == journal.RESULTS:
            raise OSError(28, "No space left on device")
        fsync(fd)

    kept = Journal(tmp_path, {})
    kept.add_chunk(FileSink(0, 8), 0, 4, 1, [FileSink(0, 8)])
    kept.save_result("first", memoryview(bytes(100)))
    with closing(ShardWriter(tmp_path, [])) as writer, ThreadPoolExecutor(1) as worker, monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        with pytest.raises(RunError, match=f"{journal.RESULTS}/first: No space left on device"):
            Durability(writer, kept, worker).finish()
    kept.close()
    again = Journal(tmp_path, {})
    again.confirm([])
    assert again.written(FileSink(0, 8), [FileSink(0, 8)]) == [(0, 4)]
    again.close()


def test_a_result_that_is_saved_again_meanwhile_is_not_removed_as_one_that_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Journal(tmp_path, {})
    kept.save_result("first", memoryview(bytes(100)))
    kept.close()
    monkeypatch.setattr(journal, "_machine_start", lambda: "another start")
    again = Journal(tmp_path, {})
    assert not again.finished.results
    fsync = os.fsync

    def saving(fd: int) -> None:
        fsync(fd)
        if not again.finished.results:
            again.save_result("first", memoryview(bytes(200)))

    monkeypatch.setattr(os, "fsync", saving)
    again.mark_safe(again.position)
    again.mark_safe(again.position)
    assert (tmp_path / journal.RESULTS / "first").read_bytes() == bytes(200)
    again.close()


def test_what_is_noted_after_a_failure_to_sync_does_not_count_either(tmp_path: Path) -> None:
    kept = Journal(tmp_path, {})
    kept.distrust()
    kept.add_chunk(FileSink(0, 8), 0, 4, 1, [FileSink(0, 8)])
    kept.close()
    assert Journal(tmp_path, {}).is_empty
