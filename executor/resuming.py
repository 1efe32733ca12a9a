"""What is left to do of a plan, when a journal says what is finished.

A place that is written needs nothing more. A kernel runs only where something that is left needs its result, and no
earlier run saved that. So an interrupted run goes on with the chunk that it was at, and a chain of kernels with the
link that it was at. What was not synced before that is read again first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from executor.errors import naming
from executor.finished import Interval
from executor.journal import Journal
from executor.verifying import Range, wrong
from executor.ways import Part, Piece, Ways
from planner.plan import BufferRoot, BufferSink, BufferView, FileSink, KernelStep, Plan, StreamStep


@dataclass
class Work:
    """What is left: pieces by the index of their step, and the indices of the kernels to run and to restore.

    `result_keys` are the names that kernels' results are saved under, by the buffer of each that a later kernel needs.
    """

    result_keys: dict[int, str]
    pieces: dict[int, list[Piece]] = field(default_factory=dict)
    kernels: set[int] = field(default_factory=set)
    restored: set[int] = field(default_factory=set)
    finished_nbytes: int = 0
    """Bytes of the output that are there already."""


def confirm(plan: Plan, directory: Path, journal: Journal) -> None:
    """See whether the shards in `directory` are what the journal says of them, before they are opened to be written.

    Where one is not there any more, nothing counts. What earlier runs wrote when they synced no more is read again: as
    much as is written in some seconds.
    """
    if not all(_has_size(directory / shard.filename, shard.nbytes) for shard in plan.shards):
        journal.forget_streams()
    if not journal.unsure:
        return
    streams = {
        sink: (branch.dtype.itemsize, step.head_numel)
        for step in plan.steps
        if isinstance(step, StreamStep)
        for branch in step.branches
        for sink in branch.sinks
        if isinstance(sink, FileSink)
    }
    ranges, chunk_of = [], []
    for chunk in journal.unsure:
        itemsize, head_numel = streams[chunk.content]
        for sink in chunk.sinks:
            file, offset = directory / plan.shards[sink.shard].filename, sink.offset + chunk.first * itemsize
            ranges.append(Range(file, offset, chunk.numel, itemsize, head_numel, chunk.checksum, first=chunk.first))
            chunk_of.append(chunk)
    # Each worker takes two chunks, which are as large as its slab, that is not there yet.
    differing = wrong(ranges, num_workers=plan.pool.workers, chunk_nbytes=plan.pool.slab_nbytes // 2)
    journal.confirm({chunk_of[index] for index in differing})


def _has_size(path: Path, nbytes: int) -> bool:
    with naming(path):
        return path.is_file() and path.stat().st_size == nbytes


def remaining(plan: Plan, ways: Ways, journal: Journal) -> Work:
    """What is left of `ways`, going backwards from what is to be written to what that needs."""
    _forget_what_is_in_fewer_places(ways, journal)
    work = Work(_result_keys(plan))
    needed: set[int] = set()
    for index, step in reversed(list(enumerate(plan.steps))):
        if isinstance(step, KernelStep):
            if step.output.buffer not in needed:
                continue
            if work.result_keys.get(step.output.buffer) in journal.finished.results:
                work.restored.add(index)
            else:
                work.kernels.add(index)
                views = (*step.inputs, *step.weights)
                needed |= {view.buffer for view in views if isinstance(view, BufferView)}
            continue
        streamed = ways.pieces.get(index, [])
        pieces = [wanted for piece in streamed for left in _left(piece, needed, journal) for wanted in _wanted(left)]
        work.finished_nbytes += _file_nbytes(streamed) - _file_nbytes(pieces)
        if pieces:
            work.pieces[index] = pieces
            needed |= {buffer for piece in pieces for part in piece.parts for buffer in part.branch.factors()}
            if isinstance(step.root, BufferRoot):
                needed.add(step.root.buffer)
    return work


def _forget_what_is_in_fewer_places(ways: Ways, journal: Journal) -> None:
    """What earlier runs wrote to fewer places than this one has to, since they could share extents, is done again."""
    streams = journal.finished.streams
    for part in (part for pieces in ways.pieces.values() for piece in pieces for part in piece.parts):
        if part.content in streams and not streams[part.content].sinks.issuperset(_files(part)):
            journal.forget_stream(part.content)


def _files(part: Part) -> list[FileSink]:
    return [sink for sink in part.branch.sinks if isinstance(sink, FileSink)]


def _result_keys(plan: Plan) -> dict[int, str]:
    kernels = plan.kernels
    used = {view.buffer for step in kernels for view in step.inputs}
    return {
        step.output.buffer: f"{number}-{hashlib.sha256(f'{step.kernel} {step.params}'.encode()).hexdigest()[:16]}"
        for number, step in enumerate(kernels)
        if step.output.buffer in used
    }


def _left(piece: Piece, needed: set[int], journal: Journal) -> Iterator[Piece]:
    """The pieces of `piece` that are left, each with the parts that are left of it there."""
    parts = [(part, _done(part, journal)) for part in piece.parts]
    begin, end = piece.first, piece.first + piece.numel
    cuts = {begin, end} | {at for _, done in parts for interval in done for at in interval if begin < at < end}
    before: Piece | None = None
    for first, stop in pairwise(sorted(cuts)):
        left = tuple(kept for part, done in parts if (kept := _kept(part, _within(first, done), needed)) is not None)
        if before is not None and (not left or left != before.parts):
            yield before
            before = None
        if left:
            before = Piece(first if before is None else before.first, 0, left)
            before = replace(before, numel=stop - before.first)
    if before is not None:
        yield before


def _wanted(piece: Piece) -> Iterator[Piece]:
    """`piece`; where nothing of it goes to a file, only those elements that buffers take."""
    if any(isinstance(sink, FileSink) for part in piece.parts for sink in part.branch.sinks):
        yield piece
        return
    end = piece.first + piece.numel
    taken = [
        (max(sink.first, piece.first), min(sink.first + sink.numel, end), part, sink)
        for part in piece.parts
        for sink in part.branch.sinks
        if isinstance(sink, BufferSink)
    ]
    runs: list[list[tuple[int, int, Part, BufferSink]]] = []
    reached = -1
    for place in sorted(taken, key=lambda place: place[0]):
        if place[0] >= place[1]:
            continue
        if place[0] > reached:
            runs.append([])
        runs[-1].append(place)
        reached = max(reached, place[1])
    for run in runs:
        first, stop = run[0][0], max(place[1] for place in run)
        parts = tuple(
            Part(replace(part.branch, sinks=tuple(sink for *_, of, sink in run if of is part)), None)
            for part in piece.parts
        )
        yield Piece(first, stop - first, parts)


def _done(part: Part, journal: Journal) -> list[Interval]:
    """The elements that are written to every file that `part` goes to."""
    return [] if part.content is None else journal.written(part.content)


def _within(first: int, intervals: Sequence[Interval]) -> bool:
    return any(begin <= first < end for begin, end in intervals)


def _kept(part: Part, is_done: bool, needed: set[int]) -> Part | None:
    """`part` without the places that are written and the buffers that nothing needs; None where nothing is left."""
    sinks = tuple(
        sink for sink in part.branch.sinks if (sink.buffer in needed if isinstance(sink, BufferSink) else not is_done)
    )
    if not sinks:
        return None
    return Part(replace(part.branch, sinks=sinks), None if is_done else part.content)


def _file_nbytes(pieces: Sequence[Piece]) -> int:
    return sum(
        piece.numel * part.branch.dtype.itemsize
        for piece in pieces
        for part in piece.parts
        for sink in part.branch.sinks
        if isinstance(sink, FileSink)
    )
