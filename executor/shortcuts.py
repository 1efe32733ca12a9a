"""Moving a range between files without carrying its bytes through memory.

A shortcut says what it can reach of a range, by where that lies, and moves that, or as much as it can; the rest is
streamed. Whether one works depends on the file systems, and shows only when it is tried: a refusal is no error, it just
moves nothing. They are tried in the order of `SHORTCUTS`.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

from planner.layout import PAGE

FICLONERANGE = 0x4020940D
"""linux/fs.h: _IOW(0x94, 13, struct file_clone_range)."""

OFFLOADING = {"nfs", "nfs4", "cifs", "smb3", "ceph"}
"""File systems whose server copies ranges by itself. Elsewhere the kernel would only read and write like us."""


class Shortcut(Protocol):
    """A way to move ranges from an open file to another."""

    @property
    def name(self) -> str:
        """What results call it."""

    def reach(self, source_offset: int, target_offset: int, nbytes: int) -> tuple[int, int]:
        """Where, in a range of `nbytes` bytes, the part begins and ends that can be moved, (0, 0) for none: whole
        elements, with whole elements left over."""

    def move(self, source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        """Move `nbytes` bytes that can be; returns how many were, from the first on: all, or whole elements.

        `source` and `target` are file descriptors.
        """


class Reflink:
    """Share physical extents, on XFS, Btrfs and other file systems with copy on write. Takes no time and no space.

    Only whole blocks can be shared, so both offsets must be equal modulo a page, and the edges are left over::

        source   ···|··▓▓▓▓|▓▓▓▓▓▓▓▓|▓▓▓▓▓▓▓▓|▓▓▓·····|···
        target   ···|··▒▒▒▒|▓▓▓▓▓▓▓▓|▓▓▓▓▓▓▓▓|▒▒▒·····|···     ▓ shared, ▒ left over, | page boundary
    """

    name = "reflinked"

    def reach(self, source_offset: int, target_offset: int, nbytes: int) -> tuple[int, int]:
        is_cut_between_elements = target_offset % 8 == 0
        return whole_pages(source_offset, target_offset, nbytes) if is_cut_between_elements else (0, 0)

    def move(self, source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        if nbytes == 0:  # which the system takes for all up to the end of the source
            return 0
        try:
            fcntl.ioctl(target, FICLONERANGE, struct.pack("qQQQ", source, source_offset, nbytes, target_offset))
        except OSError:
            return 0
        return nbytes


class OffloadedCopy:
    """Have a file server copy the range, wherever it lies, with no byte crossing the network."""

    name = "copied by the server"

    def reach(self, source_offset: int, target_offset: int, nbytes: int) -> tuple[int, int]:
        return (0, nbytes) if nbytes >= PAGE else (0, 0)  # what is small is not worth asking for

    def move(self, source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        if os.fstat(source).st_dev != os.fstat(target).st_dev or file_system(target) not in OFFLOADING:
            return 0
        done = 0
        while done < nbytes:
            try:
                count = os.copy_file_range(source, target, nbytes - done, source_offset + done, target_offset + done)
            except OSError:
                break
            if count == 0:
                break
            done += count
        return done if done == nbytes else done - done % PAGE


def file_system(fd: int) -> str:
    """The kind of file system that an open file is on, as /proc/self/mountinfo calls it; "" where that is unknown."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
            for line in mounts:
                mount, _, kind = line.partition(" - ")
                if mount.split()[2] == wanted:
                    return kind.split()[0]
    except OSError:
        pass
    return ""


def whole_pages(source_offset: int, target_offset: int, nbytes: int) -> tuple[int, int]:
    """Where, in a range, the pages begin and end that are whole in source and target alike; (0, 0) for none."""
    begin = -source_offset % PAGE
    end = nbytes - (source_offset + nbytes) % PAGE
    return (begin, end) if (source_offset - target_offset) % PAGE == 0 and begin < end else (0, 0)


def can_reflink(directory: Path, source: Path | None = None) -> bool:
    """Whether a file in `directory` can share extents with `source`; None: with another file there.

    Tried with a file that is gone afterwards. Where that cannot be made, or `source` opened, it is said to be not so.
    """
    try:
        with TemporaryFile(dir=directory) as file, ExitStack() as opened:
            file.write(bytes(2 * PAGE))
            file.flush()
            origin = file if source is None else opened.enter_context(open(source, "rb"))
            return Reflink().move(origin.fileno(), 0, file.fileno(), PAGE, PAGE) == PAGE
    except OSError:
        return False


SHORTCUTS: tuple[Shortcut, ...] = (Reflink(), OffloadedCopy())
