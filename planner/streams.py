"""Streams: what is made of each root's elements, on their way to all the places that need them.

Every output tensor, and every tensor that is needed whole, is a *place*. A place is filled by streams: the leaves of
its expression, each at its own byte offset (that is all that a `Concat` means). Leaves of all places that come from
one root, a source range, the mean of several or a kernel's result, make ONE stream, which reads the root once::

    Read(down_proj) ──┬─ (copy) ─────────────▶ expert 0 · expert 1 · a kernel's buffer
                      └─ scale 0.5 ─ cast ───▶ expert 2

What a kernel needs of a tensor that is read anyway, such as some rows of an embedding, is taken from that stream as it
passes by. The factors of a low-rank product are whole tensors, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from planner.expr import AddLowRank, Cast, Concat, DType, Elementwise, Expr, Mean, Opaque, Read, Slice, Zeros, reads_of
from planner.graph import TensorGraph
from planner.layout import Shard
from planner.plan import BufferSink, ChunkOp, FileSink, LowRank

Leaf = Read | Mean | Zeros | Opaque | Slice
"""What a stream may start from."""

Sink = FileSink | BufferSink
Chain = tuple[tuple[ChunkOp, ...], DType]


@dataclass(eq=False)
class Stream:
    """What is made of one root's elements: sinks by what is done on the way."""

    root: Leaf
    sinks: dict[Chain, list[Sink]] = field(default_factory=lambda: defaultdict(list))

    def buffers(self) -> set[int]:
        """The buffers that it fills."""
        return {sink.buffer for sinks in self.sinks.values() for sink in sinks if isinstance(sink, BufferSink)}

    def factors(self) -> list[int]:
        """The buffers that must be full before it runs, since their products are added on the way."""
        products = [op for ops, _ in self.sinks for op in ops if isinstance(op, LowRank)]
        return [buffer for op in products for buffer in (op.b, op.a)]

    def computes(self) -> bool:
        """Whether its elements are anything else than copied."""
        return isinstance(self.root, Mean) or any(ops for ops, _ in self.sinks)


def whole_tensors(kernels: Sequence[Opaque], streamed: Collection[Opaque], factors: Iterable[Expr]) -> dict[Expr, int]:
    """What must be whole in memory at some time, with its buffer's index: all that kernels take and give, factors."""
    of_kernels = [
        expr for kernel in kernels for expr in (*kernel.args, *(() if kernel in streamed else kernel.weights), kernel)
    ]
    return {expr: index for index, expr in enumerate(dict.fromkeys((*of_kernels, *factors)))}


def streams_of(
    graph: TensorGraph, shards: Sequence[Shard], buffers: Mapping[Expr, int], factors: Collection[Expr]
) -> list[Stream]:
    """The streams that fill the output, in its order, and, but for what kernels fill, the `buffers`, some of which hold
    `factors`."""
    streams: dict[Leaf, Stream] = {}
    feeders: dict[Leaf, Stream] = {}

    for number, shard in enumerate(shards):
        for tensor in shard.tensors:
            for root, chain, offset in _leaves(graph.outputs[tensor.name], tensor.offset, buffers):
                streams.setdefault(root, Stream(root)).sinks[chain].append(FileSink(number, offset))
    filled = [
        (expr in factors, root, chain, BufferSink(buffer, offset, 0, root.numel))
        for expr, buffer in buffers.items()
        if not isinstance(expr, Opaque)
        for root, chain, offset in _leaves(expr, 0, buffers)
    ]
    widest = _widest([root for _, root, _, _ in filled], streams)
    for is_factor, root, chain, sink in sorted(filled, key=lambda item: item[0]):
        if isinstance(root, Read | Mean) and not is_factor and all(isinstance(op, Cast) for op in chain[0]):
            root, first = widest[root]
            sink = replace(sink, first=first)
        stream = streams.setdefault(root, Stream(root))
        if is_factor and stream.factors():
            # What a stream waits for, it cannot fill itself: that takes a step of its own, which reads first.
            stream = feeders.setdefault(root, Stream(root))
        stream.sinks[chain].append(sink)
    return [*streams.values(), *feeders.values()]


def _widest(leaves: Collection[Leaf], others: Iterable[Leaf]) -> dict[Read | Mean, tuple[Read | Mean, int]]:
    """For each of `leaves` that is in files, the one, of them and `others`, that it is a part of, and from which
    element on: the widest, or itself."""
    if not leaves:
        return {}
    widest: dict[Read | Mean, tuple[Read | Mean, int]] = {}
    last: dict[Hashable, tuple[Read | Mean, int]] = {}
    placed = [(*_position_in_root(leaf), leaf) for leaf in (*leaves, *others) if isinstance(leaf, Read | Mean)]
    for kind, begin, leaf in sorted(placed, key=lambda item: (item[1], -item[2].numel)):
        whole, start = last.setdefault(kind, (leaf, begin))
        if begin + leaf.numel > start + whole.numel:
            whole, start = last[kind] = leaf, begin
        widest[leaf] = whole, begin - start
    return widest


def _position_in_root(leaf: Read | Mean) -> tuple[Hashable, int]:
    """What a leaf's elements are counted in, the same for all that it may be a part of, and the number of its first."""
    first, *_ = parts = reads_of(leaf)
    begin = first.offset // first.dtype.itemsize
    starts = tuple((part.file, part.dtype, part.offset - begin * part.dtype.itemsize) for part in parts)
    return (type(leaf), starts), begin


def _leaves(expr: Expr, offset: int, buffers: Mapping[Expr, int]) -> Iterator[tuple[Leaf, Chain, int]]:
    """The streams that fill the place of `expr` at byte `offset`: root, what is done on the way, byte offset."""
    if isinstance(expr, Concat):
        for part in expr.parts:
            yield from _leaves(part, offset, buffers)
            offset += part.nbytes
        return
    ops: list[ChunkOp] = []
    root = expr
    while isinstance(root, Elementwise | AddLowRank):
        if isinstance(root, Elementwise):
            ops.append(root.op)
        else:
            ops.append(LowRank(buffers[root.b], buffers[root.a], *root.a.shape))
        root = root.input
    if not isinstance(root, Leaf):
        raise TypeError(f"{type(root).__name__} cannot stand below an elementwise operation: apply it to the parts")
    yield root, (tuple(reversed(ops)), expr.dtype), offset


def result_of(root: Leaf) -> Opaque | None:
    """The kernel whose result a stream starts from."""
    return root.input if isinstance(root, Slice) else root if isinstance(root, Opaque) else None
