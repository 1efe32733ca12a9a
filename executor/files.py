"""Whole files, and waiting for the disk: a name that is there after a power cut has the content that was waited for."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

BLOCK_NBYTES = 1 << 20

_FALLOCATE = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)  # Linux's

_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None)  # macOS's


def write_file(path: Path, data: bytes | memoryview, *, wait: bool = True) -> None:
    """Put `data` into the file `path`, and `wait` until it is on the disk. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, data, 0)
        if wait:
            fsync(fd)
    finally:
        os.close(fd)


def copy_file(source: Path, path: Path) -> None:
    """Put what `source` holds into the file `path`, a block at a time, and wait until it is there.

    Raises OSError, which names `source` where that cannot be read.
    """
    with open(source, "rb") as file, open(path, "wb") as target:
        while block := _read(file):
            target.write(block)
        target.flush()
        fsync(target.fileno())


def _read(file: BinaryIO) -> bytes:
    try:
        return file.read(BLOCK_NBYTES)
    except OSError as error:
        error.filename = str(file.name)
        raise


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`, however little the system takes at a time. Raises OSError."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count


def reserve(fd: int, offset: int, nbytes: int) -> None:
    """Have the space for `nbytes` from byte `offset` on, where the file system can. Raises OSError where there is none.

    By fallocate(2) itself: posix_fallocate(3), which Python has, writes a byte of each page where that is not
    supported, so the whole file once more.
    """
    if _FALLOCATE is None or nbytes == 0:
        return
    code = errno.EINTR
    while code == errno.EINTR:
        is_done = _FALLOCATE(fd, 0, ctypes.c_int64(offset), ctypes.c_int64(nbytes)) == 0
        code = 0 if is_done else ctypes.get_errno()
    if code not in (0, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code))


def fsync(fd: int) -> None:
    """Wait until an open file is on the disk. Raises OSError.

    macOS's fsync(2) leaves it in the memory of the drive, and another call does not, where the file system has that.
    """
    if _FULLFSYNC is not None:
        try:
            fcntl.fcntl(fd, _FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(fd)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk. Raises OSError.

    Some file systems (shared folders of virtual machines, for one) have no such thing for directories.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(fd)
