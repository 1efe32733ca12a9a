"""Reading back what was written: against checksums, and to copy it within the output."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor.checksums import checksum
from executor.errors import RunError
from executor.verifying import Range, wrong
from executor.writer import ShardWriter
from planner.layout import Shard


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """A low limit, which may be raised again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_model_of_more_shards_than_files_may_be_open_is_verified(tmp_path: Path, few_open_files: None) -> None:
    ranges = []
    for number in range(300):
        data = bytes([number % 256]) * 64
        (tmp_path / str(number)).write_bytes(data)
        ranges.append(Range(tmp_path / str(number), 0, 32, 2, 0, checksum(memoryview(data), 2, 0, 0)))
    assert wrong(ranges) == []


def test_a_shard_that_is_cut_while_it_is_read_back_is_an_error(tmp_path: Path) -> None:
    shard = Shard("model.safetensors", 4096, 8192, ())
    writer = ShardWriter(tmp_path, [shard])
    os.truncate(tmp_path / shard.filename, 5000)
    with pytest.raises(RunError, match="ends at byte 5000"):
        writer.read_back(0, 4096, memoryview(bytearray(4096)))
    writer.close()
