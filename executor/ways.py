"""Which way each range goes: by a shortcut, or streamed.

Shortcuts are taken at once, before anything is streamed, so what is left tells how much space the output really takes.
Reflinks cost no time; a file server's copies do, and are done again after a run that was stopped. A tensor that lies in
the output several times is streamed to the first place; where the file system can share extents, and there are whole
pages of it to share, the others become *aliases*, made of the first when all is streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from executor.reader import SourceReader
from executor.shortcuts import SHORTCUTS, Reflink, can_reflink, whole_pages
from executor.writer import ShardWriter
from planner.expr import SourceFile
from planner.plan import Branch, BufferSink, FileRoot, FileSink, Plan, StreamStep


@dataclass(frozen=True, slots=True)
class Part:
    """A branch of a stream, with the sinks that are to be streamed to.

    `content` is the first place in the output that the plan's branch goes to, which a journal and checksums know its
    elements by; None where they take no notice: of buffers, and of what a shortcut left over.
    """

    branch: Branch
    content: FileSink | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `first` to `first + numel` of a stream, and the parts that they still must run through."""

    first: int
    numel: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Alias:
    """`nbytes` bytes at `target` that are the same as those at `origin`, with pages that can be shared among them."""

    origin: FileSink
    target: FileSink
    nbytes: int


@dataclass
class Ways:
    """What goes which way: `pieces`, by the index of their step, are to be streamed, and `aliases` to be made of them
    then. `shortcut_nbytes` are there already."""

    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    aliases: list[Alias] = field(default_factory=list)
    shortcut_nbytes: int = 0


def take_shortcuts(plan: Plan, reader: SourceReader, writer: ShardWriter, shared_in: Path | None) -> Ways:
    """Take every shortcut that works, and reserve space for the rest.

    `shared_in` is the directory of the output; None: no extents may be shared.
    """
    if shared_in is None:
        ways = _ways(plan, lambda *_: (0, 0), aliasing=False)
    else:
        ways = _ways(plan, _Taker(reader, writer).take, aliasing=can_reflink(shared_in))
    _reserve(plan, ways, writer)
    return ways


def physical_nbytes(plan: Plan, directory: Path, *, downloaded_beside: bool = False) -> int:
    """The space that the plan's shards will take in `directory`, which exists, with every extent shared that can be.

    `downloaded_beside`: remote sources will be on the same file system by then. Tried with a page of a source of each
    device; leaves nothing behind.
    """
    aliasing = can_reflink(directory)
    by_device: dict[int, bool] = {}
    for source in plan.sources:
        if isinstance(source, SourceFile) and source.device not in by_device:
            by_device[source.device] = can_reflink(directory, Path(source.path))
    sharing = [
        by_device[source.device] if isinstance(source, SourceFile) else downloaded_beside and aliasing
        for source in plan.sources
    ]

    def would_take(root: FileRoot, sink: FileSink, nbytes: int) -> tuple[int, int]:
        return Reflink().reach(root.offset, sink.offset, nbytes) if sharing[root.source] else (0, 0)

    ways = _ways(plan, would_take, aliasing=aliasing)
    return plan.written_nbytes - ways.shortcut_nbytes - sum(alias.nbytes for alias in ways.aliases)


def _ways(plan: Plan, shortcut: Callable[[FileRoot, FileSink, int], tuple[int, int]], *, aliasing: bool) -> Ways:
    """`shortcut` takes as much of a range as it can, and returns where that begins and ends."""
    ways = Ways()
    for index, step in enumerate(plan.steps):
        if not isinstance(step, StreamStep):
            continue
        streamed: list[Part] = []
        edges: list[Piece] = []
        for branch in step.branches:
            left: list[FileSink | BufferSink] = []
            origin: FileSink | None = None
            nbytes = step.numel * branch.dtype.itemsize
            for sink in branch.sinks:
                if isinstance(sink, BufferSink):
                    left.append(sink)
                    continue
                begin = end = 0
                if not branch.ops and isinstance(step.root, FileRoot):
                    begin, end = shortcut(step.root, sink, nbytes)
                if begin < end:
                    ways.shortcut_nbytes += end - begin
                    edges += _edges(replace(branch, sinks=(sink,)), begin, end, nbytes)
                elif aliasing and origin is not None and any(whole_pages(origin.offset, sink.offset, nbytes)):
                    ways.aliases.append(Alias(origin, sink, nbytes))
                else:
                    origin = origin or sink
                    left.append(sink)
            if left:
                content = None if origin is None else next(s for s in branch.sinks if isinstance(s, FileSink))
                streamed.append(Part(replace(branch, sinks=tuple(left)), content))
        whole = [Piece(0, step.numel, tuple(streamed))] if streamed else []
        ways.pieces[index] = whole + edges
    return ways


class _Taker:
    """Takes shortcuts. One that does not work for a source is not tried there again."""

    def __init__(self, reader: SourceReader, writer: ShardWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._refusing: set[tuple[str, int]] = set()

    def take(self, root: FileRoot, sink: FileSink, nbytes: int) -> tuple[int, int]:
        source, target = self._reader.fd(root.source), self._writer.fd(sink.shard)
        if source is None:
            return 0, 0
        for shortcut in SHORTCUTS:
            begin, end = shortcut.reach(root.offset, sink.offset, nbytes)
            if begin == end or (shortcut.name, root.source) in self._refusing:
                continue
            moved = shortcut.move(source, root.offset + begin, target, sink.offset + begin, end - begin)
            if moved:
                self._writer.nbytes[shortcut.name] += moved
                return begin, begin + moved
            self._refusing.add((shortcut.name, root.source))
        return 0, 0


def _edges(branch: Branch, begin: int, end: int, nbytes: int) -> Iterator[Piece]:
    """What of a range lies before byte `begin` and from byte `end` on."""
    itemsize = branch.dtype.itemsize
    for first, stop in ((0, begin), (end, nbytes)):
        if first < stop:
            yield Piece(first // itemsize, (stop - first) // itemsize, (Part(branch, None),))


def _reserve(plan: Plan, ways: Ways, writer: ShardWriter) -> None:
    ranges: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(plan.shards))}
    for pieces in ways.pieces.values():
        for piece in pieces:
            for part in piece.parts:
                itemsize = part.branch.dtype.itemsize
                for sink in part.branch.sinks:
                    if isinstance(sink, FileSink):
                        begin = sink.offset + piece.first * itemsize
                        ranges[sink.shard].append((begin, begin + piece.numel * itemsize))
    for shard, wanted in ranges.items():
        writer.reserve(shard, wanted)
