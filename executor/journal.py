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

import bisect
import json
import os
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from xxhash import xxh3_64_intdigest

from executor.checksums import MODULUS
from executor.errors import RunError
from executor.files import fsync, sync, write_all, write_file
from planner.plan import FileSink

NAME = "journal"
RESULTS = "results"

Interval = tuple[int, int]
"""Elements from the first number up to the second."""


@dataclass(frozen=True)
class Chunk:
    """Elements `first` to `first + numel` of the stream known as `content`, said to be in all of `sinks`."""

    content: FileSink
    first: int
    numel: int
    checksum: int
    sinks: frozenset[FileSink]

    @staticmethod
    def of(record: Mapping[str, Any]) -> Chunk:
        """The chunk that a line of the journal is about."""
        first, numel = record["elements"]
        sinks = frozenset(FileSink(*sink) for sink in record["sinks"])
        return Chunk(FileSink(*record["content"]), first, numel, record["checksum"], sinks)

    def record(self) -> dict[str, Any]:
        """The line that is about it."""
        return {
            "content": [self.content.shard, self.content.offset],
            "elements": [self.first, self.numel],
            "checksum": self.checksum,
            "sinks": sorted([sink.shard, sink.offset] for sink in self.sinks),
        }


@dataclass
class StreamRecord:
    """What is finished of one stream: `checksum` is the sum of `numel` elements'.

    `intervals`, ascending, with something left out between them, are what earlier runs wrote, and `sinks` the places
    that have all of that.
    """

    checksum: int = 0
    numel: int = 0
    intervals: list[Interval] = field(default_factory=list)
    sinks: frozenset[FileSink] = frozenset()

    def count(self, numel: int, checksum: int) -> None:
        self.checksum = (self.checksum + checksum) % MODULUS
        self.numel += numel

    def extend(self, first: int, numel: int, sinks: frozenset[FileSink]) -> None:
        self.sinks = self.sinks & sinks if self.intervals else sinks
        begin, end = first, first + numel
        at = bisect.bisect(self.intervals, (begin, end))
        if at < len(self.intervals) and self.intervals[at][0] == end:
            _, end = self.intervals.pop(at)
        if at > 0 and self.intervals[at - 1][1] == begin:
            at -= 1
            begin, _ = self.intervals.pop(at)
        self.intervals.insert(at, (begin, end))


@dataclass
class Finished:
    """What is finished of a run.

    `streams` are known by the first place in the output that each goes to; `results`, the checksums of kernels'
    saved results, by the names that the plan gives them.
    """

    streams: dict[FileSink, StreamRecord] = field(default_factory=lambda: defaultdict(StreamRecord))
    results: dict[str, int] = field(default_factory=dict)
    publishing: list[str] | None = None
    """The names of a finished model that is being moved to its place, and"""

    replacing: list[str] = field(default_factory=list)
    """of what it takes the place of."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Take over what a line of the journal says."""
        match record:
            case {"content": _}:
                self.add_chunk(Chunk.of(record))
            case {"forgotten": content}:
                self.streams.pop(FileSink(*content), None)
            case {"result": key, "checksum": checksum}:
                self.results[key] = checksum
            case {"dropped": key}:
                self.results.pop(key, None)
            case {"publishing": names, "replacing": replaced}:
                self.publishing, self.replacing = names, replaced

    def add_chunk(self, chunk: Chunk) -> None:
        stream = self.streams[chunk.content]
        stream.count(chunk.numel, chunk.checksum)
        stream.extend(chunk.first, chunk.numel, chunk.sinks)

    def records(self) -> Iterator[dict[str, Any]]:
        """Lines of a journal that say the same, and as few as can be."""
        for content, stream in self.streams.items():
            checksum = stream.checksum
            for first, end in stream.intervals:
                yield Chunk(content, first, end - first, checksum, stream.sinks).record()
                checksum = 0  # only their sum is known
        for key, checksum in self.results.items():
            yield {"result": key, "checksum": checksum}
        if self.publishing is not None:
            yield {"publishing": self.publishing, "replacing": self.replacing}


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
        self._dropped: dict[str, int] = {}  # results, and where the journal ended when it said so
        self._unsynced: set[str] = set()  # results that may not be on the disk
        self.finished = Finished()
        self.unsure: list[Chunk] = []
        if directory is None:
            return
        self.finished, rest = _trusted(directory)
        with _failing(directory / NAME):
            self._fd = self._rewritten(directory, identity or {}, rest)
            for record in rest:
                self._add_again(record)
            self._drop_damaged_results(directory)
            self._unsynced.update(self.finished.results)
            # Those that an earlier run had no time to remove.
            left = {path.name for path in (directory / RESULTS).glob("*")} - self.finished.results.keys()
            self._dropped = dict.fromkeys(left, self._position)

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

    def written(self, content: FileSink, sinks: Iterable[FileSink]) -> list[Interval]:
        """The elements of the stream known as `content` that earlier runs wrote to all of `sinks`.

        If they wrote to fewer places, because they could share extents and this run cannot, all of it is done again.
        """
        if content not in self.finished.streams:
            return []
        stream = self.finished.streams[content]
        if stream.sinks.issuperset(sinks):
            return stream.intervals
        with self._lock:
            self._forget(content)
        return []

    def _add_again(self, record: Mapping[str, Any]) -> None:
        """Take over a line that was never safe: but for chunks, which are unsure."""
        if "content" in record:
            self.unsure.append(Chunk.of(record))
            return
        self.finished.add(record)
        if "forgotten" in record:
            self.unsure = [chunk for chunk in self.unsure if chunk.content != FileSink(*record["forgotten"])]

    def forget(self) -> None:
        """Nothing that was finished is what it should be."""
        for key in list(self.finished.results):
            self.drop_result(key)
        self.forget_streams()

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
            self._append(Chunk(content, first, numel, checksum, frozenset(sinks)).record())

    def mark_safe(self, position: int) -> None:
        """What the journal says up to `position` is on the disk, but for saved results, which are put there now."""
        with self._lock:
            gone = {key for key, end in self._dropped.items() if end <= position}
            saved, self._unsynced = self._unsynced - gone, set()
        self._sync_results(saved)
        with self._lock:
            self._append({"safe": position})
        self._sync()
        with self._lock:  # since one of them may be saved again
            for key in [key for key, end in self._dropped.items() if end <= position]:
                del self._dropped[key]
                with suppress(OSError):
                    self._result(key).unlink()

    def distrust(self) -> None:
        """Syncing failed: nobody knows whether what was written since the last `mark_safe` is on the disk."""
        with self._lock:
            with suppress(RunError):
                self._append({"lost": True})
            self._is_lost = True  # nor does anybody know of what is under way

    # ------------------------------------------------------------------------------------------------ kernels' results

    def save_result(self, key: str, memory: memoryview) -> None:
        """Save a kernel's result, under a name that the plan gives it.

        It is put on the disk when it is to count after a restart: see `mark_safe`. Who waited for that here would wait
        for all that the disk has been given before.
        """
        if self._directory is None:
            return
        path = self._result(key)
        with self._lock:
            self._dropped.pop(key, None)  # what an earlier run left of it is not to be removed any more
        with _failing(path):
            path.parent.mkdir(exist_ok=True)
            write_file(path, memory, wait=False)
        with self._lock:
            self._unsynced.add(key)
            self.finished.results[key] = xxh3_64_intdigest(memory)
            self._append({"result": key, "checksum": self.finished.results[key]})

    def load_result(self, key: str, memory: memoryview) -> None:
        """Fill `memory` with a result that an earlier run saved."""
        path = self._result(key)
        with _failing(path), open(path, "rb") as file:
            file.readinto(memory)
        if xxh3_64_intdigest(memory) != self.finished.results[key]:
            raise RunError(f"{path}: is not what was saved there; start again with --restart")

    def drop_result(self, key: str) -> None:
        """Nothing needs this result any more.

        It is removed when what took its place is sure to count: after a restart of the machine this line might not.
        """
        if self._directory is None or self.finished.results.pop(key, None) is None:
            return
        with self._lock:
            self._append({"dropped": key})
            self._dropped[key] = self._position

    def _drop_damaged_results(self, directory: Path) -> None:
        for key, expected in list(self.finished.results.items()):
            try:
                intact = xxh3_64_intdigest((directory / RESULTS / key).read_bytes()) == expected
            except OSError:
                intact = False
            if not intact:
                del self.finished.results[key]

    def _sync_results(self, keys: Iterable[str]) -> None:
        """Wait until these results, and their names, are on the disk."""
        paths = [self._result(key) for key in keys]
        names = paths[0].parents[:2] if paths else ()
        for path in (*paths, *names):
            with _failing(path):
                sync(path)

    def _result(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / RESULTS / key

    # --------------------------------------------------------------------------------------------------- the finish

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

    # ----------------------------------------------------------------------------------------------------- the file

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._fd is None or self._directory is None or self._is_lost:
            return
        line = _line(record)
        with _failing(self._directory / NAME):
            write_all(self._fd, line, self._position)
        self._position += len(line)

    def _sync(self) -> None:
        if self._fd is not None and self._directory is not None:
            with _failing(self._directory / NAME):
                fsync(self._fd)

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


@contextmanager
def _failing(path: Path) -> Iterator[None]:
    """Turns an OSError within into a RunError that names `path`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error


def read_identity(directory: Path) -> dict[str, Any] | None:
    """The identity that the journal in `directory` was begun with; None where there is none that can be read."""
    for record, _ in _records(directory):
        identity = record.get("identity")
        return identity if isinstance(identity, dict) else None
    return None


def read_publishing(directory: Path) -> list[str]:
    """The names of the finished model that was being moved to its place when its run ended."""
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
            rest.clear()
        else:
            rest.append((record, end))
    if not machine or machine != _machine_start():
        rest.clear()
    return certain, [record for record, _ in rest]


def _records(directory: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line's record with the position where the line ends, up to the first line that is none."""
    end = 0
    with suppress(OSError), open(directory / NAME, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n") or not isinstance(record, dict):
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
