"""Reading back what was written: against checksums, and to copy it within the output."""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from executor import verifying
from executor.checksums import checksum
from executor.errors import RunError
from executor.local import LocalFile
from executor.verifying import Range, wrong
from executor.writer import ShardWriter
from planner.expr import BLOCK
from planner.layout import Shard


def test_a_model_of_more_shards_than_files_may_be_open_is_verified(tmp_path: Path, few_open_files: None) -> None:
    ranges = []
    for number in range(300):
        data = bytes([number % 256]) * 64
        (tmp_path / str(number)).write_bytes(data)
        ranges.append(Range(tmp_path / str(number), 0, 32, 2, 0, checksum(memoryview(data), 2, 0, 0)))
    assert wrong(ranges) == []


def test_blocks_of_one_size_that_were_exchanged_are_noticed(tmp_path: Path) -> None:
    head, *blocks = b"head", b"a" * BLOCK, b"b" * BLOCK
    expected = checksum(memoryview(head + b"".join(blocks)), 1, 0, len(head))
    for name, content in (("right", [head, *blocks]), ("wrong", [head, *reversed(blocks)])):
        (tmp_path / name).write_bytes(b"".join(content))
    numel = len(head) + 2 * BLOCK
    ranges = [Range(tmp_path / name, 0, numel, 1, len(head), expected) for name in ("right", "wrong")]
    assert wrong(ranges) == [1]


def test_no_more_chunks_are_under_way_than_workers_can_take_soon_however_large_a_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numel, begun, ahead = 500 * BLOCK, 0, 0
    data = memoryview(bytes(numel))
    (tmp_path / "model").write_bytes(data)
    chunks, read = verifying._chunks, list[int]()

    def counting(ranges: Sequence[Range], chunk_nbytes: int) -> Iterator[tuple[int, int, int]]:
        nonlocal begun
        for chunk in chunks(ranges, chunk_nbytes):
            begun += 1
            yield chunk

    monkeypatch.setattr(verifying, "_chunks", counting)
    ranges = [Range(tmp_path / "model", 0, numel, 1, 0, checksum(data, 1, 0, 0))]

    def noting(nbytes: int) -> None:
        nonlocal ahead
        read.append(nbytes)
        ahead = max(ahead, begun - len(read))

    assert wrong(ranges, noting, num_workers=3, chunk_nbytes=BLOCK) == []
    assert (begun, read[-1], len(read)) == (500, numel, 500)
    assert ahead < 6


def test_a_shard_that_is_cut_while_it_is_read_back_is_an_error(tmp_path: Path) -> None:
    shard = Shard("model.safetensors", 4096, 8192, ())
    writer = ShardWriter(tmp_path, [shard])
    os.truncate(tmp_path / shard.filename, 5000)
    with pytest.raises(RunError, match="ends at byte 5000"):
        writer.read_back(0, 4096, memoryview(bytearray(4096)))
    writer.close()


def test_what_cannot_be_read_is_wrong_though_it_is_compared_with_a_source(tmp_path: Path) -> None:
    data = bytes(4 * BLOCK)
    (tmp_path / "model").write_bytes(data)
    (tmp_path / "source").write_bytes(data[:-1])
    compared = Range(tmp_path / "model", 0, 4 * BLOCK, 1, 0, None, tmp_path / "source")
    assert wrong([compared]) == [0]
    (tmp_path / "source").write_bytes(data)
    assert wrong([compared]) == []


def test_what_is_read_back_is_asked_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page cache has of a file that was written may not be what the disk has."""
    data = bytes(4 * BLOCK)
    (tmp_path / "model").write_bytes(data)
    asked: list[bool] = []
    read_into = LocalFile.read_into

    def noting(self: LocalFile, *place: Any, cached: bool = True) -> None:
        asked.append(cached)
        read_into(self, *place, cached=cached)

    monkeypatch.setattr(LocalFile, "read_into", noting)
    assert wrong([Range(tmp_path / "model", 0, 4 * BLOCK, 1, 0, checksum(memoryview(data), 1, 0, 0))]) == []
    assert set(asked) == {False}


def test_shards_and_their_names_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink()))
    with closing(ShardWriter(tmp_path, [Shard("model.safetensors", 4096, 8192, ())])) as writer:
        writer.sync()
    assert synced == [tmp_path / "model.safetensors", tmp_path]
