"""Puts files into the page cache or out of it, so that every contender begins alike."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

CHUNK_NBYTES = 8 << 20


def files_below(directory: Path) -> list[Path]:
    """All plain files in the directory and those below it, by name."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def evict(files: Iterable[Path]) -> None:
    """Take files, which must have been synced, out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(files: Iterable[Path]) -> None:
    """Read files into the page cache."""
    buffer = bytearray(CHUNK_NBYTES)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
