"""Memory that is cut into regions, which begin at pages, and what such memory must hold.

What lies in its page as it does in a file can be read, or written, directly.
"""

from __future__ import annotations

from planner.expr import DType
from planner.layout import PAGE


def cut(memory: memoryview, nbytes: int, at: int = 0) -> tuple[memoryview, memoryview]:
    """`nbytes` of `memory`, from byte `at` of its first page on, and what is left from the next page on."""
    assert at + nbytes <= len(memory), "a region would be cut short"
    return memory[at : at + nbytes], memory[_whole_pages(at + nbytes) :]


def block_nbytes(num_rows: int, num_columns: int, dtype: DType) -> int:
    """What a block of a matrix takes while it is read and turned into float32: see `executor.weights`."""
    numel = num_rows * num_columns
    # A page to move what is read within, so that it can be read directly.
    return _whole_pages(numel * DType.F32.itemsize) + _whole_pages(numel * dtype.itemsize + PAGE)


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
