"""A kernel's weights: matrices that it takes a block of rows at a time, whether they are whole in memory or in files.

Blocks are independent of each other. A few workers, which serve all kernels of a run, take them in order, with memory
of their own each, and read them, turn them into float32 and compute; so reading and computing overlap without a queue.
Each computes in one thread, and always from the same place in a page, so what comes out of a block depends on its
contents alone: not on the number of workers, nor on where the weights are.

    memory   ├─ rows in float32 ─┤├─ rows as read ─┤

As for any chunk, rows that are read lie in their page as in the file, so that they can be read directly. Of a mean of
several matrices, their rows are read there one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from threading import Semaphore
from typing import TYPE_CHECKING, Protocol

from executor.buffers import SlabPool
from executor.chunk_ops import ReadInto, as_array, as_tensor, average
from executor.regions import cut
from planner.expr import DType, Shape
from planner.layout import PAGE
from planner.plan import FileRoot

if TYPE_CHECKING:
    import torch


class Matrix(Protocol):
    """Something that rows in float32 can be had of."""

    @property
    def shape(self) -> Shape:
        """`[rows, columns]`."""

    def read(self, begin: int, end: int, memory: memoryview) -> None:
        """Wait for what `rows` needs. Computes no more than the means of what it reads."""

    def rows(self, begin: int, end: int, memory: memoryview) -> torch.Tensor:
        """Rows `begin` to `end` in float32, after `read` with the same arguments. They may lie in `memory`."""


@dataclass(frozen=True)
class WholeMatrix:
    """A matrix that is in memory."""

    tensor: torch.Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    def read(self, begin: int, end: int, memory: memoryview) -> None:
        pass

    def rows(self, begin: int, end: int, memory: memoryview) -> torch.Tensor:
        part = self.tensor[begin:end]
        return as_tensor(memory, DType.F32, part.numel()).view(part.shape).copy_(part)


@dataclass(frozen=True)
class FileMatrix:
    """A matrix from byte `offset` of a file on.

    `read_into(offset, slab, begin, nbytes)` fills `slab[begin : begin + nbytes]` from the file, and may overwrite up to
    a page before and after that.
    """

    shape: Shape
    dtype: DType
    offset: int
    read_into: Callable[[int, memoryview, int, int], None]

    def read(self, begin: int, end: int, memory: memoryview) -> None:
        offset, nbytes, rest = self._regions(begin, end, memory)
        self.read_into(offset, rest, offset % PAGE, nbytes)

    def rows(self, begin: int, end: int, memory: memoryview) -> torch.Tensor:
        offset, nbytes, rest = self._regions(begin, end, memory)
        raw, _ = cut(rest, nbytes, offset % PAGE)
        numel = nbytes // self.dtype.itemsize
        block = as_tensor(memory, DType.F32, numel).copy_(as_tensor(raw, self.dtype, numel))
        return block.view(end - begin, self.shape[1])

    def _regions(self, begin: int, end: int, memory: memoryview) -> tuple[int, int, memoryview]:
        """Where rows are in the file, how many bytes they have, and what is left of `memory` behind the result."""
        row_nbytes = self.shape[1] * self.dtype.itemsize
        _, rest = cut(memory, (end - begin) * self.shape[1] * DType.F32.itemsize)
        return self.offset + begin * row_nbytes, (end - begin) * row_nbytes, rest


@dataclass(frozen=True)
class MeanMatrix:
    """The mean of matrices that lie in files, rounded to `dtype`."""

    shape: Shape
    dtype: DType
    parts: Sequence[FileRoot]
    read_into: ReadInto

    def read(self, begin: int, end: int, memory: memoryview) -> None:
        numel, block, rest = self._regions(begin, end, memory)
        average(self.parts, begin * self.shape[1], as_array(block, DType.F32, numel), rest, self.read_into)

    def rows(self, begin: int, end: int, memory: memoryview) -> torch.Tensor:
        numel, block, rest = self._regions(begin, end, memory)
        result = as_tensor(block, DType.F32, numel)
        if self.dtype is not DType.F32:
            result.copy_(as_tensor(rest, self.dtype, numel).copy_(result))
        return result.view(end - begin, self.shape[1])

    def _regions(self, begin: int, end: int, memory: memoryview) -> tuple[int, memoryview, memoryview]:
        """How many elements rows have, where they are in float32, and what is left of `memory` behind them."""
        numel = (end - begin) * self.shape[1]
        return numel, *cut(memory, numel * DType.F32.itemsize)


class Weights:
    """The weights of a kernel while it runs, and the workers that go through them block by block."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        *,
        workers: Executor,
        blocks: int,
        threads: int,
        block_nbytes: int,
        check: Callable[[], None],
    ) -> None:
        """Up to `blocks` are under way at a time. `check` is called before each; what it raises ends the work."""
        self.matrices = matrices
        self._workers = workers
        self._memory = SlabPool(blocks, block_nbytes)
        self._computing = Semaphore(threads)
        self._check = check

    def for_each_block(self, matrix: Matrix, block_rows: int, work: Callable[[int, torch.Tensor], None]) -> None:
        """Call `work(begin, block)` for all rows of `matrix`, `[block_rows, columns]` at a time in float32.

        It is called from several threads at once, in any order; `block` is gone when it returns.
        """
        end = matrix.shape[0]
        blocks = [(begin, min(begin + block_rows, end)) for begin in range(0, end, block_rows)]
        under_way = [self._workers.submit(self._run, matrix, *block, work) for block in blocks]
        try:
            for block in under_way:
                block.result()
        finally:
            for block in under_way:
                block.cancel()
            wait(under_way)

    def _run(self, matrix: Matrix, begin: int, end: int, work: Callable[[int, torch.Tensor], None]) -> None:
        self._check()
        memory = self._memory.take()
        try:
            matrix.read(begin, end, memory)
            with self._computing:
                work(begin, matrix.rows(begin, end, memory))
        finally:
            self._memory.give_back(memory)

    def gather(self, matrix: Matrix, rows: Sequence[int]) -> torch.Tensor:
        """These rows of `matrix`, `[len(rows), columns]` in float32."""
        import torch

        gathered = torch.empty(len(rows), matrix.shape[1])
        memory = self._memory.take()
        try:
            for to, row in zip(gathered, rows, strict=True):
                self._check()
                matrix.read(row, row + 1, memory)
                to.copy_(matrix.rows(row, row + 1, memory)[0])
        finally:
            self._memory.give_back(memory)
        return gathered
