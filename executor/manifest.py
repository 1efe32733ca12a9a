"""What each output tensor's bytes can be checked by: checksums, or the range of a source that they were shared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from planner.layout import TensorEntry
from planner.plan import FileRoot, FileSink, Plan, StreamStep


@dataclass(frozen=True, slots=True)
class Segment:
    """`numel` elements of a tensor that came from one stream, in the tensor's order.

    `checksum` is that of `executor.checksums`, with a first block of `head_numel` elements. It is None where the
    bytes were shared with a source and never seen: then they equal those at byte `source_offset` of the plan's source
    `source`.
    """

    numel: int
    head_numel: int
    checksum: int | None
    source: int | None = None
    source_offset: int | None = None


def manifest(plan: Plan, checksums: Mapping[FileSink, int]) -> dict[str, list[Segment]]:
    """Each output tensor's segments. `checksums` are a run's."""
    placed = dict(_segments(plan, checksums))
    return {
        tensor.name: list(_along(placed, number, tensor))
        for number, shard in enumerate(plan.shards)
        for tensor in shard.tensors
    }


def _segments(plan: Plan, checksums: Mapping[FileSink, int]) -> Iterator[tuple[FileSink, Segment]]:
    """What lies at each place of the output."""
    for step in plan.steps:
        if not isinstance(step, StreamStep) or step.numel == 0:
            continue
        for branch in step.branches:
            sinks = [sink for sink in branch.sinks if isinstance(sink, FileSink)]
            if not sinks:
                continue
            if sinks[0] in checksums:
                segment = Segment(step.numel, step.head_numel, checksums[sinks[0]])
            else:
                assert isinstance(step.root, FileRoot)  # only what a source holds can be shared with it
                segment = Segment(step.numel, step.head_numel, None, step.root.source, step.root.offset)
            for sink in sinks:
                yield sink, segment


def _along(placed: Mapping[FileSink, Segment], shard: int, tensor: TensorEntry) -> Iterator[Segment]:
    """The segments of a tensor, one after the other."""
    offset = tensor.offset
    while offset < tensor.offset + tensor.nbytes:
        segment = placed[FileSink(shard, offset)]
        yield segment
        offset += segment.numel * tensor.dtype.itemsize
