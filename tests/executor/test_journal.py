"""What a journal keeps, and when it is on the disk."""

import json
import os
import random
import tracemalloc
from collections.abc import Callable
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


def test_a_journal_is_under_its_name_on_the_disk_before_anything_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noting)
    Journal(tmp_path, {}).close()
    assert synced == [tmp_path / f"{journal.NAME}.new", tmp_path]


def test_the_identity_that_a_journal_was_begun_with_can_be_read(tmp_path: Path) -> None:
    assert journal.read_identity(tmp_path) is None
    Journal(tmp_path, {"config": {"a": 1}}).close()
    assert journal.read_identity(tmp_path) == {"config": {"a": 1}}
    assert json.loads((tmp_path / journal.NAME).read_text().splitlines()[0])["identity"] == {"config": {"a": 1}}


def test_a_journal_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    """Or all that it says is finished would be thrown away."""
    (tmp_path / journal.NAME).mkdir()
    for read in (journal.read_identity, journal.read_publishing, Journal):
        with pytest.raises(RunError, match=rf"/{journal.NAME}: Is a directory"):
            read(tmp_path)


def test_where_no_journal_can_be_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "file", "loop", 300 * "long"):
        assert journal.read_identity(tmp_path / name) is None


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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda file: file.write_bytes(b"y" * 100),
            "is not what was saved there any more; the next run computes it again",
        ),
        (Path.unlink, "No such file or directory"),
    ],
    ids=["damaged", "gone"],
)
def test_a_result_that_fails_before_it_is_used_is_computed_by_the_next_run(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    kept = Journal(tmp_path, {})
    kept.save_result("first", memoryview(bytes(100)))
    spoil(tmp_path / journal.RESULTS / "first")
    with pytest.raises(RunError, match=f"/first: {message}"):
        kept.load_result("first", memoryview(bytearray(100)))
    kept.close()
    again = Journal(tmp_path, {})
    again.close()
    assert not again.finished.results


def test_a_result_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    kept = Journal(tmp_path, {})
    (tmp_path / journal.RESULTS / "first").mkdir(parents=True)
    with pytest.raises(RunError, match="/first: Is a directory"):
        kept.save_result("first", memoryview(bytes(100)))
    kept.close()


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
        with pytest.raises(RunError, match=f"{journal.RESULTS}/first: the disk is full"):
            Durability(writer, kept, worker).finish()
    kept.close()
    again = Journal(tmp_path, {})
    again.confirm([])
    assert again.written(FileSink(0, 8)) == [(0, 4)]
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


@pytest.mark.parametrize("restarted", [False, True])
def test_after_a_failure_to_sync_what_was_sure_can_still_be_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    kept = Journal(tmp_path, {})
    kept.add_chunk(FileSink(0, 8), 0, 4, 1, [FileSink(0, 8)])
    kept.save_result("first", memoryview(bytes(100)))
    kept.mark_safe(kept.position)
    kept.distrust()
    kept.forget()
    kept.close()
    if restarted:
        monkeypatch.setattr(journal, "_machine_start", lambda: "another start")
    assert Journal(tmp_path, {}).is_empty


def test_what_was_forgotten_before_a_failure_to_sync_does_not_count_again(tmp_path: Path) -> None:
    kept = Journal(tmp_path, {})
    for content in (FileSink(0, 8), FileSink(1, 8)):
        kept.add_chunk(content, 0, 4, 1, [content])
    kept.mark_safe(kept.position)
    kept.forget_stream(FileSink(0, 8))
    kept.distrust()
    kept.close()
    again = Journal(tmp_path, {})
    again.close()
    assert list(again.finished.streams) == [FileSink(1, 8)]


def test_after_a_failure_to_sync_a_result_counts_until_what_was_made_of_it_does(tmp_path: Path) -> None:
    kept = Journal(tmp_path, {})
    kept.save_result("first", memoryview(bytes(100)))
    kept.mark_safe(kept.position)
    kept.distrust()
    kept.save_result("second", memoryview(bytes(100)))
    kept.drop_result("first")
    kept.close()
    again = Journal(tmp_path, {})
    again.close()
    assert list(again.finished.results) == ["first"]


def test_where_restarts_of_the_machine_cannot_be_told_only_what_is_on_the_disk_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_machine_start", lambda: "")
    content = FileSink(0, 8)
    kept = Journal(tmp_path, {})
    kept.add_chunk(content, 0, 4, 1, [content])
    kept.mark_safe(kept.position)
    kept.add_chunk(content, 4, 4, 1, [content])
    kept.close()
    again = Journal(tmp_path, {})
    again.close()
    assert (again.written(content), again.unsure) == ([(0, 4)], [])


def test_chunks_that_lie_side_by_side_are_one_line_when_they_are_gone_on_with(tmp_path: Path) -> None:
    content, sinks = FileSink(0, 8), [FileSink(0, 8), FileSink(1, 8)]
    chunks = [number for number in range(100) if number != 40]
    random.Random(0).shuffle(chunks)
    kept = Journal(tmp_path, {})
    for number in chunks:
        kept.add_chunk(content, 10 * number, 10, number, sinks)
    kept.save_result("result", memoryview(bytes(100)))
    kept.mark_safe(kept.position)
    kept.add_chunk(content, 5000, 10, 1, sinks)
    kept.close()
    for _ in range(2):
        again = Journal(tmp_path, {})
        again.close()
        assert again.written(content) == [(0, 400), (410, 1000)]
        assert (again.finished.streams[content].numel, again.finished.streams[content].checksum) == (990, sum(chunks))
        assert list(again.finished.results) == ["result"]
        assert [chunk.first for chunk in again.unsure] == [5000]
        # The identity, two runs of chunks, the result, that they are safe, and the chunk that is not.
        assert (tmp_path / journal.NAME).read_bytes().count(b"\n") == 6


def test_the_memory_that_a_journal_takes_does_not_grow_with_the_chunks_that_are_safe(tmp_path: Path) -> None:
    kept = Journal(tmp_path, {})
    for number in range(5000):
        kept.add_chunk(FileSink(0, 8), 10 * number, 10, 1, [FileSink(0, 8)])
        if number % 100 == 99:
            kept.mark_safe(kept.position)
    kept.close()
    tracemalloc.start()
    again = Journal(tmp_path, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    again.close()
    assert again.written(FileSink(0, 8)) == [(0, 50_000)]
    assert peak < 1 << 20


def test_a_journal_is_empty_until_one_thing_is_finished(tmp_path: Path) -> None:
    content = FileSink(0, 8)
    entries = [
        lambda kept: kept.add_chunk(content, 0, 4, 1, [content]),
        lambda kept: kept.save_result("first", memoryview(bytes(100))),
        lambda kept: kept.begin_publishing(["model.safetensors"], []),
    ]
    for number, enter in enumerate(entries):
        (tmp_path / str(number)).mkdir()
        kept = Journal(tmp_path / str(number), {})
        assert kept.is_empty
        enter(kept)
        assert not kept.is_empty
        kept.close()
        assert not Journal(tmp_path / str(number), {}).is_empty


def test_that_a_model_is_being_moved_to_its_place_counts_after_a_restart_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Journal(tmp_path, {})
    kept.begin_publishing(["model.safetensors"], ["old.safetensors"])
    kept.close()
    monkeypatch.setattr(journal, "_machine_start", lambda: "another start")
    again = Journal(tmp_path, {})
    again.close()
    assert (again.finished.publishing, again.finished.replacing) == (["model.safetensors"], ["old.safetensors"])


def test_of_what_several_runs_wrote_those_places_count_that_have_all_of_it(tmp_path: Path) -> None:
    first, second, third = (FileSink(0, offset) for offset in (8, 16, 24))
    kept = Journal(tmp_path, {})
    kept.add_chunk(first, 0, 4, 1, [first, second])
    kept.add_chunk(first, 4, 4, 1, [first, third])
    kept.mark_safe(kept.position)
    kept.close()
    again = Journal(tmp_path, {})
    again.close()
    assert again.finished.streams[first].sinks == {first}


def test_a_sync_that_was_under_way_when_all_was_forgotten_has_nothing_count_again_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Journal(tmp_path, {})
    kept.add_chunk(FileSink(0, 8), 0, 4, 1, [FileSink(0, 8)])
    before = kept.position
    kept.forget()
    kept.mark_safe(before)
    kept.close()
    monkeypatch.setattr(journal, "_machine_start", lambda: "another start")
    assert Journal(tmp_path, {}).is_empty
