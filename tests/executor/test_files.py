"""Whole files, and waiting for the disk."""

import ctypes
import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from executor import files
from executor.files import BLOCK_NBYTES, copy_file, reserve, sync, write_file


def test_a_file_has_what_was_put_into_it_and_nothing_of_what_was_there(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(2 * BLOCK_NBYTES + 1)
    for name in ("file", "copy"):
        (tmp_path / name).write_bytes(bytes(3 * BLOCK_NBYTES))
    write_file(tmp_path / "file", data)
    copy_file(tmp_path / "file", tmp_path / "copy")
    assert (tmp_path / "file").read_bytes() == (tmp_path / "copy").read_bytes() == data


def test_a_file_that_is_copied_is_whole_when_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    write_file(tmp_path / "file", b"data")
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    copy_file(tmp_path / "file", tmp_path / "copy")
    assert sizes == [4]


def test_a_file_that_cannot_be_copied_for_what_it_is_copied_from_names_that(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output error") as failed:
        copy_file(Path("/proc/self/mem"), tmp_path / "copy")
    assert failed.value.filename == "/proc/self/mem"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF])
def test_a_file_system_that_syncs_no_directories_is_one_to_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    write_file(tmp_path / "file", b"data")
    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(code)):
        sync(tmp_path / "file")


def test_a_directory_that_could_not_be_put_on_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


@pytest.mark.parametrize(
    ("code", "calls"), [(0, ["full"]), (errno.ENOTSUP, ["full", "usual"]), (errno.ENOTTY, ["full", "usual"])]
)
def test_where_the_drive_keeps_what_it_is_given_in_memory_it_is_told_to_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: list[str]
) -> None:
    """As macOS has it. Not all its file systems can."""
    called: list[str] = []

    def full(fd: int, command: int) -> None:
        assert command == 51
        called.append("full")
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_FULLFSYNC", 51)
    monkeypatch.setattr(fcntl, "fcntl", full)
    monkeypatch.setattr(os, "fsync", lambda fd: called.append("usual"))
    for write in (
        lambda: write_file(tmp_path / "file", b"data"),
        lambda: copy_file(tmp_path / "file", tmp_path / "copy"),
        lambda: sync(tmp_path),
    ):
        called.clear()
        write()
        assert called == calls


def test_a_drive_that_could_not_write_what_it_was_given_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, command: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "_FULLFSYNC", 51)
    monkeypatch.setattr(fcntl, "fcntl", full)
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "file", b"data")


def test_space_that_is_reserved_is_there_and_space_that_is_not_is_an_error(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), 4096, 1 << 20)
        assert os.fstat(file.fileno()).st_blocks * 512 >= 1 << 20
        with pytest.raises(OSError, match=r"File too large|No space left on device"):
            reserve(file.fileno(), 0, 1 << 62)
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        reserve(file.fileno(), 0, 4096)


def test_where_a_file_system_cannot_reserve_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, mode: int, offset: object, nbytes: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1

    monkeypatch.setattr(files, "_FALLOCATE", unsupported)
    with (tmp_path / "file").open("wb") as file:
        os.ftruncate(file.fileno(), 1 << 20)
        reserve(file.fileno(), 0, 1 << 20)
        assert os.fstat(file.fileno()).st_blocks == 0
