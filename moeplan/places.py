"""Where models are: a directory, or another place that has files. And how a file there is opened.

Everything in it may come from a stranger, so a file is read in bounded memory, only if it is a regular one, and nothing
outside the directory is opened. What is wrong is a CheckpointError that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from moeplan.errors import UserError
from moeplan.untrusted_json import JSONError, parse_object, show
from planner.expr import Source, SourceFile

MAX_CONFIG_NBYTES = 2**20
"""The most that is read of a config, a model's or an adapter's."""

LFS_POINTER = b"version https://git-lfs"
INSTEAD_OF_GGUF = "give the model that the GGUF was converted from"


class CheckpointError(UserError):
    """A source model cannot be read: it is not there, not a checkpoint, broken, or hostile."""


class Place(Protocol):
    """Where a model is. Its small files are in the directory `path`; its weights may be elsewhere."""

    @property
    def path(self) -> Path: ...

    @property
    def label(self) -> str:
        """What the user calls it."""

    def names(self) -> Collection[str]:
        """The names of its files. Raises CheckpointError."""

    def has(self, name: str) -> bool:
        """Whether it has the file `name`."""

    def prepare(self, names: Collection[str]) -> None:
        """Told which files of weights will be opened, so that what takes long can be begun."""

    @property
    def incomplete(self) -> str:
        """Why files may not be there, and what to do about it."""

    def opened(self, name: str) -> AbstractContextManager[tuple[BinaryIO, Source]]:
        """The file of weights `name`, open for reading, and what plans are to read it as. Raises CheckpointError."""


@dataclass(frozen=True)
class LocalPlace:
    """A local directory, which holds everything."""

    path: Path

    @property
    def label(self) -> str:
        return str(self.path)

    def names(self) -> list[str]:
        try:
            return [file.name for file in self.path.iterdir()]
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be listed ({error.strerror})") from None

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def prepare(self, names: Collection[str]) -> None:
        """Nothing here takes long."""

    @property
    def incomplete(self) -> str:
        return "is the download complete, and is this the model's directory?"

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[BinaryIO, SourceFile]]:
        with opened(self.path, name) as file:
            status = os.fstat(file.fileno())
            path = _one_path(file.name, status)
            yield file, SourceFile(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, path)


def as_place(place: str | Path | Place) -> Place:
    """`place`, or the local directory of that path. Raises CheckpointError where there is none, with what to do."""
    if isinstance(place, (str, Path)):
        place = LocalPlace(Path(place))
    if isinstance(place, LocalPlace):
        _check_is_directory(place.path)
    return place


def _check_is_directory(path: Path) -> None:
    if not str(path).isprintable():
        raise CheckpointError(
            f"{show(str(path))}: is not the path of a directory; it has characters that cannot be shown"
        )
    try:
        is_directory = path.is_dir()
        exists = is_directory or path.exists()
    except OSError as error:
        raise CheckpointError(f"{show(str(path))}: cannot be opened ({error.strerror})") from None
    if not exists:
        on_the_hub = "a model on the Hub is named ORG/NAME or ORG/NAME@REVISION"
        raise CheckpointError(f"{path}: no such directory{instead_of(str(path))}; {on_the_hub}")
    if not is_directory:
        give = INSTEAD_OF_GGUF if path.suffix == ".gguf" else "give the directory that holds it"
        raise CheckpointError(f"{path}: is a file, and no model's directory: {give}")


def instead_of(path: str) -> str:
    """What may have been meant by a `path` where no directory is: the end of a message, or nothing."""
    plain, _, revision = path.partition("@")
    if path.startswith("~") or "$" in path:
        return "; ~ and $ are not expanded in the YAML"
    with suppress(OSError):
        if plain and revision and Path(plain).is_dir():
            return f"; {plain} is a directory here, which has no revisions: leave @{revision} out"
        names = [entry.name for entry in Path(path).parent.iterdir() if entry.is_dir()]
        if near := get_close_matches(Path(path).name, names, 1):
            return f"; did you mean {Path(path).parent / near[0]}?"
    return ""


_paths: dict[tuple[int, int], str] = {}


def _one_path(path: str, status: os.stat_result) -> str:
    """The path that a file was first opened by, so that hard links to it are one source; `path` where that is gone."""
    identity = (status.st_dev, status.st_ino)
    first = _paths.setdefault(identity, path)
    try:
        known = Path(first).stat()
    except OSError:
        known = None
    if known is None or (known.st_dev, known.st_ino) != identity:
        _paths[identity] = first = path
    return first


def read_json(path: Path, name: str, max_nbytes: int) -> dict[str, Any]:
    """The JSON object in the file `name` of a checkpoint's directory. Raises CheckpointError."""
    where = path / name
    with opened(path, name) as file:
        text = file.read(max_nbytes + 1)
    refuse_lfs_pointer(where, text)
    if len(text) > max_nbytes:
        raise CheckpointError(f"{where}: is larger than {max_nbytes:,} bytes; a real one is not")
    try:
        return parse_object(text)
    except JSONError as error:
        raise CheckpointError(f"{where}: {error}") from None


def refuse_lfs_pointer(where: Path, start: bytes) -> None:
    """Raises CheckpointError where a file begins with `start` as what stands in for large files in git does."""
    if start.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{where}: is a git-LFS pointer, not the file itself; `git lfs pull`, in the clone it is from, fetches that"
        )


@contextmanager
def opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """The regular file `name` of the checkpoint's directory, open for reading; its `name` is its real path.

    Raises CheckpointError where it cannot be read, or is really a file of another place than the checkpoint's.
    """
    where = path / name
    try:
        directory = os.path.realpath(path, strict=True)
        real_path = os.path.realpath(where, strict=True)
        if not _may_follow(Path(directory), Path(real_path)):
            raise CheckpointError(
                f"{where}: is a symbolic link out of the checkpoint, to {show(real_path)}; put the file itself there"
            )
        # Before it is opened: opening a FIFO waits, and opening a device may do anything.
        if not Path(real_path).is_file():
            raise CheckpointError(f"{where}: is not a regular file")
        with open(real_path, "rb", opener=_open_without_waiting) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{where}: is not there, or links to nothing; is the download complete?") from None
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def _may_follow(directory: Path, target: Path) -> bool:
    """Whether a file of `directory` may really be `target`: in it, or where the Hub's cache keeps a snapshot's bytes.

    That is `models--org--name/blobs/HASH` beside `models--org--name/snapshots/REVISION`, or, since the cache shares
    blobs between repositories, `blobs/HH/HASH` beside `models--org--name`.
    """
    if target.is_relative_to(directory):
        return True
    for revision in (directory, *directory.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return target.parent == repository / "blobs" or target.parent.parent == repository.parent / "blobs"
    return False
