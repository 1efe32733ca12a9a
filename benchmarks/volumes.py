"""File systems made for a case: XFS or Btrfs in a file, on a loop device. Only root can mount them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.interruption import INTERRUPTIONS

MIN_NBYTES = 512 << 20
SPARE_NBYTES = 1 << 30
UNMOUNT_SECONDS = 5.0


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

    The loop device reads and writes by direct I/O, so its files are in no page cache but their own. Raises VolumeError
    where it cannot be made, and never when it is taken away.
    """
    made = KINDS[kind]
    if os.geteuid() != 0:
        raise VolumeError("only root can mount a file system; run it as root")
    if shutil.which(made.mkfs[0]) is None:
        raise VolumeError(f"{made.mkfs[0]} is missing; apt install {made.package}")
    image, mounted = directory / f"{kind}.img", directory / kind
    with ExitStack() as undo:
        with _uninterrupted():
            undo.callback(image.unlink, missing_ok=True)
            with open(image, "wb") as file:
                file.truncate(max(MIN_NBYTES, holds_nbytes + holds_nbytes // 8 + SPARE_NBYTES))
            _run(*made.mkfs, str(image))
            device = _run("losetup", "--find", "--show", "--direct-io=on", str(image))
            undo.callback(_done, "losetup", "--detach", device)
            mounted.mkdir()
            undo.callback(mounted.rmdir)
            _run("mount", device, str(mounted))
            undo.callback(_unmount, mounted)
        try:
            yield mounted
        finally:
            with _uninterrupted():
                undo.close()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Who interrupts this is heard when it is over."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in INTERRUPTIONS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for missed in came:
            signal.raise_signal(missed)


def _unmount(mounted: Path) -> None:
    """Wait a while for programs that are about to end; one that does not keeps the volume, unseen, until it does."""
    deadline = time.monotonic() + UNMOUNT_SECONDS
    while _done("umount", str(mounted)).returncode:
        if time.monotonic() > deadline:
            _done("umount", "--lazy", str(mounted))
            break
        time.sleep(0.1)


def _run(*argv: str) -> str:
    """What the command prints. Raises VolumeError where it fails."""
    try:
        done = _done(*argv)
    except OSError as error:
        raise VolumeError(f"{argv[0]}: {error.strerror}") from error
    if done.returncode:
        raise VolumeError(f"{' '.join(argv[:2])}: {done.stderr.strip()}")
    return done.stdout.strip()


def _done(*argv: str) -> subprocess.CompletedProcess[str]:
    """The command, in a session of its own, where no Ctrl-C reaches it."""
    return subprocess.run(argv, capture_output=True, text=True, start_new_session=True)
