"""The journal of a run: what of its plan is finished, in a file that outlives the process.

A line of JSON for each chunk, once it is written to all its places, and for each kernel's result that later kernels
need, which is saved beside the journal. The system keeps what a process wrote when the process is killed, not when the
machine goes down; so now and then, when everything written so far is on the disk, a line says so, and after a restart
of the machine only what stands before the last such line counts. Nor does the system keep it for a disk that was
unplugged: so what stands behind that line is unsure, and counts when it has been read again.

Who goes on writes the journal anew: chunks that are sure and lie side by side become one line. So what is in memory of
a journal is a few lines for each stream, and those of the seconds that are unsure, however long it was.

The journal knows nothing of what the plan is for. Its first line holds the `identity` that the caller gives: who finds
a journal with another identity must not go on with it.
"""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from executor.errors import RunError, naming
from executor.files import fsync, sync, write_all
from executor.finished import Chunk, Finished, Interval
from executor.results import Results
from planner.plan import FileSink

NAME = "journal"
RESULTS = "results"

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""How the system says that there is no such file, nor can be."""


class Journal:
    """The journal in `directory`, which exists; None: one that is kept in memory and forgotten.

    `finished` is what earlier runs finished, and what this one adds to it; `unsure` is what they wrote when they synced
    no more: see `confirm`. Safe to add to from several threads. Raises RunError, from any method, where the disk is
    full or fails.
    """

    def __init__(self, directory: Path | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self._directory = directory
        self._lock = Lock()
        self._fd: int | None = None
        self._position = 0
        self._is_lost = False
        self._results: Results | None = None
        self.finished = Finished()
        self.unsure: list[Chunk] = []
        if directory is None:
            return
        self._results = Results(directory / RESULTS)
        self.finished, rest = _trusted(directory)
        with naming(directory / NAME):
            self._fd = self._rewritten(directory, identity or {}, rest)
        for record in rest:
            self._add_again(record)
        self.finished.results = self._results.intact(self.finished.results, self._position)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is finished yet, in this run or before."""
        done = self.finished
        return not (done.streams or done.results or done.publishing or self.unsure)

    @property
    def position(self) -> int:
        """Where the journal ends now: see `mark_safe`."""
        return self._position

    def confirm(self, gone: Collection[Chunk]) -> None:
        """What was unsure is there, but for chunks that are `gone`, with whose streams nobody knows what happened."""
        lost = {chunk.content for chunk in gone}
        with self._lock:
            for chunk in self.unsure:
                if chunk.content not in lost:
                    self.finished.add_chunk(chunk)
            self.unsure = []
            for content in lost:
                self._forget(content)

    def written(self, content: FileSink) -> list[Interval]:
        """The elements of the stream known as `content` that earlier runs wrote, to all places of its record."""
        return self.finished.streams[content].intervals if content in self.finished.streams else []

    def forget(self) -> None:
        """Nothing that was finished is what it should be."""
        with self._lock:
            for key in list(self.finished.results):
                self._drop(key)
        self.forget_streams()

    def forget_stream(self, content: FileSink) -> None:
        """What was written of a stream is to be written again."""
        with self._lock:
            self._forget(content)

    def forget_streams(self) -> None:
        """What was written is not there any more."""
        with self._lock:
            for content in {*self.finished.streams, *(chunk.content for chunk in self.unsure)}:
                self._forget(content)
            self.unsure = []
        # Without this mark, what was forgotten would count again after a restart of the machine. It says nothing that
        # is not true: nothing written counts any more.
        self.mark_safe(self._position)

    def _forget(self, content: FileSink) -> None:
        self.finished.streams.pop(content, None)
        self._append({"forgotten": [content.shard, content.offset]})

    def add_chunk(self, content: FileSink, first: int, numel: int, checksum: int, sinks: Iterable[FileSink]) -> None:
        """Elements `first` to `first + numel` of the stream known as `content` are written to all of `sinks`."""
        with self._lock:
            self.finished.streams[content].count(numel, checksum)
            if not self._is_lost:
                self._append(Chunk(content, first, numel, checksum, frozenset(sinks)).record())

    def mark_safe(self, position: int) -> None:
        """What the journal says up to `position` is on the disk, but for saved results, which are put there now."""
        if self._results is None:
            return
        self._results.sync(position)
        with self._lock:
            self._append({"safe": position})
        self._sync()
        self._results.remove(position)

    def distrust(self) -> None:
        """Syncing failed: nobody knows whether what was written since the last `mark_safe` is on the disk."""
        with self._lock:
            with suppress(RunError):
                self._append({"lost": True})
            self._is_lost = True  # nor does anybody know of what is under way: it counts no more

    def save_result(self, key: str, memory: memoryview) -> None:
        """Save a kernel's result, under a name that the plan gives it."""
        if self._results is None:
            return
        checksum = self._results.save(key, memory)
        with self._lock:
            self.finished.results[key] = checksum
            if not self._is_lost:
                self._append({"result": key, "checksum": checksum})

    def load_result(self, key: str, memory: memoryview) -> None:
        """Fill `memory` with a result that an earlier run saved."""
        assert self._results is not None
        self._results.load(key, self.finished.results[key], memory)

    def drop_result(self, key: str) -> None:
        """Nothing needs this result any more.

        It is removed when what took its place is sure to count: after a restart of the machine this line might not.
        """
        with self._lock:
            if not self._is_lost:  # or what took its place does not count
                self._drop(key)

    def _drop(self, key: str) -> None:
        if self._results is not None and self.finished.results.pop(key, None) is not None:
            self._append({"dropped": key})
            self._results.drop(key, self._position)

    def begin_publishing(self, names: list[str], replaced: list[str]) -> None:
        """The model is complete and on the disk, and its files, `names`, are about to be moved to their place."""
        with self._lock:
            self.finished.publishing, self.finished.replacing = names, replaced
            self._append({"publishing": names, "replacing": replaced})
            self._append({"safe": self._position})
        self._sync()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._fd is None or self._directory is None:
            return
        line = _line(record)
        with naming(self._directory / NAME):
            write_all(self._fd, line, self._position)
        self._position += len(line)

    def _sync(self) -> None:
        if self._fd is not None and self._directory is not None:
            with naming(self._directory / NAME):
                fsync(self._fd)

    def _add_again(self, record: Mapping[str, Any]) -> None:
        """Take over a line that was never safe: but for chunks, which are unsure."""
        if "content" in record:
            self.unsure.append(Chunk.of(record))
            return
        self.finished.add(record)
        if "forgotten" in record:
            self.unsure = [chunk for chunk in self.unsure if chunk.content != FileSink(*record["forgotten"])]

    def _rewritten(self, directory: Path, identity: Mapping[str, Any], rest: Iterable[Mapping[str, Any]]) -> int:
        """Write the journal anew: what is finished for certain, and the `rest`. Returns its file, which takes the old
        one's place."""
        new = directory / f"{NAME}.new"
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            text = _line({"identity": identity, "machine": _machine_start()})
            text += b"".join(map(_line, self.finished.records()))
            text += _line({"safe": len(text)}) + b"".join(map(_line, rest))
            write_all(fd, text, 0)
            fsync(fd)
            new.rename(directory / NAME)
            sync(directory)
        except BaseException:
            os.close(fd)
            raise
        self._position = len(text)
        return fd


def read_identity(directory: Path) -> dict[str, Any] | None:
    """The identity that the journal in `directory` was begun with; None where there is no journal, or none left in it.

    Raises RunError where it cannot be read.
    """
    for record, _ in _records(directory):
        identity = record.get("identity")
        return identity if isinstance(identity, dict) else None
    return None


def read_publishing(directory: Path) -> list[str]:
    """The names of the finished model that was being moved to its place when its run ended.

    Raises RunError where the journal in `directory` cannot be read.
    """
    names: list[str] = []
    for record, _ in _records(directory):
        names = record.get("publishing", names)
    return names


def _trusted(directory: Path) -> tuple[Finished, list[dict[str, Any]]]:
    """What is finished and on the disk for certain, and the lines that count beside that."""
    certain = Finished()
    rest: deque[tuple[dict[str, Any], int]] = deque()
    machine = ""
    for record, end in _records(directory):
        if "identity" in record:
            machine = str(record.get("machine"))
        elif "safe" in record:
            while rest and rest[0][1] <= record["safe"]:
                certain.add(rest.popleft()[0])
        elif "lost" in record:
            rest = deque(entry for entry in rest if "forgotten" in entry[0])
        else:
            rest.append((record, end))
    if not machine or machine != _machine_start():
        rest.clear()
    return certain, [record for record, _ in rest]


def _records(directory: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line's record with the position where the line ends, up to the first line that is none.

    Raises RunError where there is a journal that cannot be read: who took it for none would throw away what it is of.
    """
    end, path = 0, directory / NAME
    with naming(path), ExitStack() as opened:
        try:
            file = opened.enter_context(open(path, "rb"))
        except OSError as error:
            if error.errno in _NOT_THERE:
                return
            raise
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return
            if not isinstance(record, dict):
                return
            end += len(line)
            yield record, end


def _machine_start() -> str:
    """What tells this start of the machine from others; "" where the system has no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
