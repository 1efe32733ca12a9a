"""Streams and kernel runs as steps of a plan: files and buffers by their index, and chunks that fit a slab."""

from __future__ import annotations

import math
from collections.abc import Mapping

from planner.expr import (
    BLOCK,
    LOW_RANK_TILE,
    AddNoise,
    Cast,
    DType,
    Expr,
    Mean,
    Opaque,
    Read,
    Slice,
    Source,
    Zeros,
    reads_of,
)
from planner.layout import PAGE
from planner.plan import (
    Branch,
    BufferRoot,
    BufferView,
    FileRoot,
    FileSink,
    FileView,
    KernelStep,
    LowRank,
    MeanRoot,
    Root,
    StreamStep,
    ZeroRoot,
)
from planner.streams import Leaf, Stream


def stream_step(
    stream: Stream,
    sources: dict[Source, int],
    buffers: Mapping[Expr, int],
    slab_nbytes: int,
    frees: tuple[int, ...],
) -> StreamStep:
    """The step of `stream`, in chunks that fit slabs of `slab_nbytes`."""
    root = stream.root
    return StreamStep(
        root=_root(root, sources, buffers),
        numel=root.numel,
        head_numel=_head_numel(stream),
        chunk_numel=_chunk_numel(stream, slab_nbytes),
        branches=tuple(Branch(ops, dtype, tuple(sinks)) for (ops, dtype), sinks in stream.sinks.items()),
        frees=frees,
    )


def kernel_step(
    kernel: Opaque,
    sources: dict[Source, int],
    buffers: Mapping[Expr, int],
    workers: int,
    beside: int,
    frees: tuple[int, ...],
) -> KernelStep:
    """The step of a run of `kernel`, whose weights are resident where `buffers` has them. See `KernelStep`."""

    def view(expr: Expr) -> BufferView:
        return BufferView(buffers[expr], expr.dtype, expr.shape)

    def weight(expr: Expr) -> BufferView | FileView:
        if expr in buffers:
            return view(expr)
        parts = tuple(_file_root(read, sources) for read in reads_of(expr))
        return FileView(parts[0] if isinstance(expr, Read) else MeanRoot(parts), expr.dtype, expr.shape)

    return KernelStep(
        kernel=kernel.kernel,
        params=kernel.params,
        inputs=tuple(view(arg) for arg in kernel.args),
        weights=tuple(weight(expr) for expr in kernel.weights),
        output=view(kernel),
        workspace_nbytes=kernel.workspace_nbytes,
        block_nbytes=kernel.block_nbytes,
        workers=workers,
        passes=kernel.passes,
        beside=beside,
        frees=frees,
    )


def _root(leaf: Leaf, sources: dict[Source, int], buffers: Mapping[Expr, int]) -> Root:
    match leaf:
        case Read():
            return _file_root(leaf, sources)
        case Mean():
            return MeanRoot(tuple(_file_root(part, sources) for part in leaf.parts))
        case Zeros():
            return ZeroRoot(leaf.dtype)
        case Opaque():
            return BufferRoot(buffers[leaf], 0, leaf.dtype)
        case Slice():
            return BufferRoot(buffers[leaf.input], leaf.begin * leaf.dtype.itemsize, leaf.dtype)


def _file_root(read: Read, sources: dict[Source, int]) -> FileRoot:
    return FileRoot(sources[read.file], read.offset, read.dtype)


def _chunk_numel(stream: Stream, slab_nbytes: int) -> int:
    """How many elements, with all that is computed from them at a time, fit a slab: see `executor.chunk_ops`."""
    root, ops = stream.root, [op for chain, _ in stream.sinks for op in chain]
    scratch = max((dtype.itemsize for chain, dtype in stream.sinks if chain), default=0)
    if any(not isinstance(op, Cast) for op in ops):
        scratch += DType.F32.itemsize
    if any(isinstance(op, AddNoise) for op in ops):
        scratch += DType.F32.itemsize
    if isinstance(root, Mean):  # its parts are read there, one by one, before anything is done to their mean
        scratch = max(scratch, *(part.dtype.itemsize for part in root.parts))
    itemsize = root.dtype.itemsize + scratch
    # A page to move the chunk within, so that it can be read directly, and one for the result.
    fixed = 2 * PAGE
    if any(isinstance(op, LowRank) for op in ops):
        fixed += math.prod(LOW_RANK_TILE) * DType.F32.itemsize
    numel = (slab_nbytes - fixed) // itemsize
    return numel - numel % BLOCK


def _head_numel(stream: Stream) -> int:
    """How many elements the first block has: so many that the next one begins at a page of the first file written to.

    A whole block where noise is drawn, whose blocks are counted from the tensor's first element.
    """
    if any(isinstance(op, AddNoise) for ops, _ in stream.sinks for op in ops):
        return BLOCK
    for (_, dtype), sinks in stream.sinks.items():
        for sink in sinks:
            if isinstance(sink, FileSink):
                return BLOCK - sink.offset % PAGE // dtype.itemsize
    return BLOCK
