"""File systems made for a case: XFS or Btrfs in a file, on a loop device. Only root can mount them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIN_NBYTES = 512 << 20
SPARE_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Kind:
    mkfs: tuple[str, ...]
    package: str


KINDS = {
    "xfs": _Kind(("mkfs.xfs", "-q", "-m", "reflink=1"), "xfsprogs"),
    "btrfs": _Kind(("mkfs.btrfs", "-q"), "btrfs-progs"),
}


class VolumeError(Exception):
    """A file system cannot be made here; the message says why."""


@contextmanager
def volume(kind: str, directory: Path, holds_nbytes: int) -> Iterator[Path]:
    """A new file system of this kind with room for `holds_nbytes`, mounted below `directory` until the end.

    The loop device reads and writes by direct I/O, so its files are in no page cache but their own. Raises VolumeError.
    """
    made = KINDS[kind]
    if os.geteuid() != 0:
        raise VolumeError("only root can mount a file system; run it as root")
    if shutil.which(made.mkfs[0]) is None:
        raise VolumeError(f"{made.mkfs[0]} is missing; apt install {made.package}")
    image, mounted = directory / f"{kind}.img", directory / kind
    device = ""
    try:
        with open(image, "wb") as file:
            file.truncate(max(MIN_NBYTES, holds_nbytes + holds_nbytes // 8 + SPARE_NBYTES))
        _run(*made.mkfs, str(image))
        device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
        mounted.mkdir()
        _run("mount", device, str(mounted))
        try:
            yield mounted
        finally:
            _run("umount", str(mounted))
    finally:
        if device:
            _run("losetup", "--detach", device)
        if mounted.exists():
            mounted.rmdir()
        image.unlink(missing_ok=True)


def _run(*argv: str) -> str:
    """What the command prints. Raises VolumeError where it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except OSError as error:
        raise VolumeError(f"{argv[0]}: {error.strerror}") from error
    if done.returncode:
        raise VolumeError(f"{' '.join(argv[:2])}: {done.stderr.strip()}")
    return done.stdout.strip()
