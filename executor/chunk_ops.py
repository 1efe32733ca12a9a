"""Operations on chunks: take the mean of several, cast, scale, add noise, add a low-rank product.

A chunk is worked on in place of a slab that the caller cuts up, so nothing here allocates::

    slab   ├─ chunk as read ─┤├─ float32 work ─┤├─ noise ─┤├─ tile ─┤├─ result ─┤

Regions begin at pages, but for the first, which lies in its page as in the file it was read from, and the last, which
lies as in the file that it goes to: so both can be moved directly. Those that a stream's operations do not need are not
there (`planner.steps` sizes chunks by the same rule). Of a mean, the chunk is where its parts are added up, and each
part is read into what lies behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from executor.regions import cut
from planner.expr import BLOCK, LOW_RANK_TILE, AddNoise, Cast, DType, Scale
from planner.layout import PAGE
from planner.plan import ChunkOp, FileRoot, LowRank, read_once

if TYPE_CHECKING:
    import torch

Rectangle = tuple[int, int, int, int]
"""The first row, the row after the last, the first column and the column after the last of a part of a matrix."""

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""An array of one of the dtypes of tensors."""

ReadInto = Callable[[int, int, memoryview, int, int], None]
"""`read_into(source, offset, slab, begin, nbytes)` fills `slab[begin : begin + nbytes]` from a source, and may
overwrite up to a page before and after that. `slab` begins at a page."""

_NUMPY_DTYPES = {
    DType.F32: np.dtype(np.float32),
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def as_array(memory: memoryview, dtype: DType, numel: int) -> Array:
    """`numel` elements at the start of `memory`, as a flat array that shares it."""
    if numel == 0:
        return np.empty(0, _NUMPY_DTYPES[dtype])
    return np.frombuffer(memory, _NUMPY_DTYPES[dtype], numel)


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of the same name."""
    import torch

    return {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}[dtype]


def as_tensor(memory: memoryview, dtype: DType, numel: int) -> torch.Tensor:
    """`numel` elements at the start of `memory`, as a flat tensor that shares it."""
    import torch

    if numel == 0:
        return torch.empty(0, dtype=torch_dtype(dtype))
    return torch.frombuffer(memory, dtype=torch_dtype(dtype), count=numel)


@np.errstate(all="ignore")
def average(
    parts: Sequence[FileRoot],
    first: int,
    total: Array,
    scratch: memoryview,
    read_into: ReadInto,
) -> None:
    """Fill flat float32 `total` with the mean of `parts`, each from its element `first` on, reading one at a time.

    What it reads into is `scratch`, which begins at a page.
    """
    numel, added = len(total), 0
    for part, times in read_once(parts):
        offset, nbytes = part.offset + first * part.dtype.itemsize, numel * part.dtype.itemsize
        read_into(part.source, offset, scratch, offset % PAGE, nbytes)
        read, _ = cut(scratch, nbytes, offset % PAGE)
        x = as_array(read, part.dtype, numel)
        for _ in range(times):
            if added == 0:
                np.copyto(total, x)
            else:
                np.add(total, x, out=total)
            added += 1
    np.divide(total, np.float32(added), out=total)


def copy(data: memoryview, to: memoryview) -> None:
    """Fill `to` with `data`, while other threads have the interpreter."""
    np.copyto(np.frombuffer(to, np.uint8), np.frombuffer(data, np.uint8))


def clear(memory: memoryview) -> None:
    """Fill `memory` with zeros."""
    np.frombuffer(memory, np.uint8).fill(0)


@np.errstate(all="ignore")
def apply(
    ops: Sequence[ChunkOp],
    chunk: memoryview,
    dtype: DType,
    first: int,
    numel: int,
    scratch: memoryview,
    whole: Callable[[int], memoryview],
    at: int,
) -> memoryview:
    """Run `ops` on a chunk of `numel` elements of `dtype`, the first of which is the tensor's element `first`.

    `whole` gives the memory of a buffer. The chunk stays as it is: other operations may be run on it. The result lies
    in `scratch` until the next call, at byte `at` of a page.
    """
    arithmetic = any(not isinstance(op, Cast) for op in ops)
    noisy = any(isinstance(op, AddNoise) for op in ops)
    adding = any(isinstance(op, LowRank) for op in ops)
    rounded = isinstance(ops[-1], Cast)
    work, scratch = cut(scratch, numel * 4 if arithmetic else 0, 0 if rounded else at)
    noise, scratch = cut(scratch, numel * 4 if noisy else 0)
    tile, scratch = cut(scratch, math.prod(LOW_RANK_TILE) * 4 if adding else 0)

    result, x = work, as_array(chunk, dtype, numel)
    if arithmetic:
        x = _converted(x, as_array(work, DType.F32, numel))
    for op in ops:
        match op:
            case Scale(factor):
                np.multiply(x, np.float32(factor), out=x)
            case AddNoise(scale, seed):
                drawn = as_array(noise, DType.F32, numel)
                fill_normal(drawn, seed, first)
                np.multiply(drawn, np.float32(scale), out=drawn)
                np.add(x, drawn, out=x)
            case LowRank():
                b, a = (as_tensor(memory, DType.F32, len(memory) // 4) for memory in (whole(op.b), whole(op.a)))
                product = as_tensor(tile, DType.F32, math.prod(LOW_RANK_TILE))
                sums = as_tensor(work, DType.F32, numel)
                add_product(sums, b.view(-1, op.rank), a.view(op.rank, op.columns), first, product)
            case Cast(to):
                result, _ = cut(scratch, numel * to.itemsize, at)
                x = _converted(x, as_array(result, to, numel))
    return result


def _converted(x: Array, to: Array) -> Array:
    """`to`, with the elements of `x` rounded to its dtype; those that are too large for it become infinite."""
    np.copyto(to, x, casting="unsafe")
    return to


def is_finite(memory: memoryview) -> bool:
    """Whether no float16 in `memory` is infinite or no number, by their bits: that takes no memory, and little time."""
    unsigned = np.frombuffer(memory, np.uint16)
    signed, infinity = unsigned.view(np.int16), 0x7C00
    return len(signed) == 0 or bool(signed.max() < infinity and unsigned.max() < 0x8000 + infinity)


def overflows(before: Array, after: Array) -> bool:
    """Whether a number of `before` is none in `after`; seen a block at a time, which takes little memory."""
    blocks = ((before[begin : begin + BLOCK], after[begin : begin + BLOCK]) for begin in range(0, len(before), BLOCK))
    return any(bool(np.any(np.isfinite(x) & ~np.isfinite(y))) for x, y in blocks)


def add_product(x: torch.Tensor, b: torch.Tensor, a: torch.Tensor, first: int, tile: torch.Tensor) -> None:
    """Add to flat float32 `x` the elements from `first` on of `b` `[rows, rank]` · `a` `[rank, columns]`.

    The product is computed in `LOW_RANK_TILE`s, each whole, in `tile`, which begins at a page: matrix products may be
    rounded otherwise for another shape or alignment, and no bit may depend on where `x` was cut.
    """
    import torch

    rows, columns = b.shape[0], a.shape[1]
    height, width = LOW_RANK_TILE
    wanted = list(_rectangles(first, first + len(x), columns))
    for top in range(wanted[0][0] // height * height, wanted[-1][1], height):
        bottom = min(top + height, rows)
        for left in range(0, columns, width):
            right = min(left + width, columns)
            parts = [part for w in wanted if (part := _intersection(w, (top, bottom, left, right))) is not None]
            if not parts:
                continue
            product = tile[: (bottom - top) * (right - left)].view(bottom - top, right - left)
            torch.mm(b[top:bottom], a[:, left:right], out=product)
            for row, end_row, column, end_column in parts:
                shape, begin = (end_row - row, end_column - column), row * columns + column - first
                target = x.as_strided(shape, (columns, 1), x.storage_offset() + begin)
                target.add_(product[row - top : end_row - top, column - left : end_column - left])


def _rectangles(first: int, end: int, columns: int) -> Iterator[Rectangle]:
    """The elements `first` to `end` of a matrix, row after row: the end of a row, whole rows, the start of a row."""
    row, column = divmod(first, columns)
    end_row, end_column = divmod(end, columns)
    if row == end_row:
        yield row, row + 1, column, end_column
        return
    if column:
        yield row, row + 1, column, columns
        row += 1
    if row < end_row:
        yield row, end_row, 0, columns
    if end_column:
        yield end_row, end_row + 1, 0, end_column


def _intersection(x: Rectangle, y: Rectangle) -> Rectangle | None:
    part = max(x[0], y[0]), min(x[1], y[1]), max(x[2], y[2]), min(x[3], y[3])
    return part if part[0] < part[1] and part[2] < part[3] else None


def fill_normal(out: np.ndarray, seed: int, first: int) -> None:
    """Fill flat float32 `out` with standard normal noise, of a tensor's elements from `first` on, where a block begins.

    Each block of `BLOCK` elements has a Philox stream of its own, keyed by `(seed, block)`, so that any chunk can
    be filled without those before it. Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    for begin in range(0, len(out), BLOCK):
        key = np.array([seed, (first + begin) // BLOCK], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        block = out[begin : begin + BLOCK]
        generator.standard_normal(dtype=np.float32, out=block)
