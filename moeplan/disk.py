"""The space on the disk of a directory that may not be there yet."""

from __future__ import annotations

import shutil
from pathlib import Path


def existing(directory: Path) -> Path:
    """`directory`, or the nearest directory above it that exists."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return place


def on_one_disk(first: Path, second: Path) -> bool:
    """Whether two directories, which need not be there yet, are or will be on one file system."""
    return existing(first).stat().st_dev == existing(second).stat().st_dev


def free_nbytes(directory: Path) -> int:
    """The space that is free where `directory` is or will be."""
    return shutil.disk_usage(existing(directory)).free
