"""What of a run is finished, as data: of each stream, of kernels' results, of the finished model's files.

It is added up from the records that are the lines of a journal (see `executor.journal`), and can be said in as few of
them as there can be.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from executor.checksums import MODULUS
from planner.plan import FileSink, Plan, StreamStep

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

    def checksums(self, plan: Plan) -> dict[FileSink, int]:
        """Those of whole streams. Of one that an earlier run began, and a later one shared, there is a part."""
        numel: dict[FileSink, int] = {}
        for step in plan.steps:
            if isinstance(step, StreamStep):
                for branch in step.branches:
                    numel |= {sink: step.numel for sink in branch.sinks if isinstance(sink, FileSink)}
        streams = self.streams.items()
        return {content: stream.checksum for content, stream in streams if stream.numel == numel.get(content)}

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
