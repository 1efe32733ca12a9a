"""Checksums of what is written, taken while it is at hand, whatever the order in which its chunks come.

The checksum of a stream's elements is the sum, modulo 2^64, of the XXH3-64 of each block, seeded with the block's
number::

    elements   ├─ head_numel ─┼─ BLOCK ─┼─ BLOCK ─┼─ rest ─┤
    seeds             0            1         2         3

So chunks, which are whole blocks, can be summed in any order, by any number of threads, in this run or the next. A
changed, lost or exchanged block changes the sum. XXH3: https://github.com/Cyan4973/xxHash
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from executor.blocks import block_number
from planner.expr import BLOCK

MODULUS = 1 << 64


def checksum(data: memoryview, itemsize: int, first: int, head_numel: int) -> int:
    """The part of a stream's checksum that comes from `data`: elements of `itemsize` bytes, from element `first` on.

    `data` begins where a block does, and ends where one does or at the stream's end.
    """
    block = block_number(first, head_numel)
    total = begin = 0
    end = head_numel * itemsize if block == 0 else BLOCK * itemsize
    while begin < len(data):
        total += xxh3_64_intdigest(data[begin:end], block)
        begin, end, block = end, end + BLOCK * itemsize, block + 1
    return total % MODULUS
