"""Streams in blocks of elements: where they may be cut. See `planner.plan.StreamStep`."""

from __future__ import annotations

from collections.abc import Iterator

from planner.expr import BLOCK


def block_number(first: int, head_numel: int) -> int:
    """Which block element `first` begins, where the first block has `head_numel` elements."""
    return (first - head_numel) // BLOCK + 1


def chunks(first: int, numel: int, head_numel: int, chunk_numel: int) -> Iterator[tuple[int, int]]:
    """`numel` elements from `first` on in chunks of whole blocks, at most `chunk_numel` elements each.

    Gives each chunk's first element and number of elements. A short first block makes the first chunk shorter.
    """
    end = first + numel
    while first < end:
        stop = min(end, first + chunk_numel - (first - head_numel) % BLOCK)
        yield first, stop - first
        first = stop
