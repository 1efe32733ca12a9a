"""From a graph and a budget to a plan: what is read when, where it goes, and how much memory that takes.

Every output tensor, and every tensor that is needed whole, is a *place*. A place is filled by streams: the leaves of
its expression, each at its own byte offset (that is all that a `Concat` means). Leaves of all places that come from
one root, a source range, the mean of several or a kernel's result, make ONE step, which reads the root once::

    Read(down_proj) ──┬─ (copy) ─────────────▶ expert 0 · expert 1 · a kernel's buffer
                      └─ scale 0.5 ─ cast ───▶ expert 2

What a kernel needs of a tensor that is read anyway, such as some rows of an embedding, is taken from that stream as it
passes by. The factors of a low-rank product are whole tensors, too, each filled right before the stream that it is
added to.

Order: first every stream that has nothing to do with kernels, copies before what is computed, in the order of the
output files, so that bytes move from the first moment on, while the libraries that compute are still being loaded; then
the kernels, each right after the streams that fill its inputs, so that whole tensors live for the shortest time. Where
the budget allows it, the streams that fill the weights of the next kernel run beside one, not after it::

    streams  ├ layer 0 ┤├ layer 1 ┤├ layer 2 ┤
    kernels             ├ layer 0 ┤├ layer 1 ┤├ layer 2 ┤

A kernel's weights have two physical forms. *Resident*: whole in buffers, filled by the same step that copies them into
the output, so each byte is read once. *Streamed*: they stay in their file, and the kernel reads them again, a block of
rows at a time, so that a matrix of any size takes a block of memory. A kernel is streamed where the budget is too small
for its weights. What is computed is the same.

Memory is the pool of chunk buffers, plus the buffers alive, plus the workspace and the blocks of the running kernel.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

from planner.errors import BudgetError
from planner.expr import (
    BLOCK,
    LOW_RANK_TILE,
    AddLowRank,
    AddNoise,
    Cast,
    Concat,
    DType,
    Elementwise,
    Expr,
    Mean,
    Opaque,
    Read,
    RemoteFile,
    Slice,
    Source,
    SourceFile,
    Zeros,
    reads_of,
)
from planner.graph import TensorGraph, digest, opaque_in_order, walk
from planner.layout import PAGE, Shard, lay_out
from planner.plan import (
    FORMAT,
    Branch,
    BufferRoot,
    BufferSink,
    BufferView,
    ChunkOp,
    FileRoot,
    FileSink,
    FileView,
    KernelStep,
    LowRank,
    MeanRoot,
    Plan,
    Pool,
    Root,
    Step,
    StreamStep,
    ZeroRoot,
)

COPYING = Pool(workers=8, slab_nbytes=4 << 20)
"""The chunk buffers that help where all that a run does is to copy, or wait for a network."""

BESIDE_BLOCKS = Pool(workers=3, slab_nbytes=8 << 20)
"""Those beside kernels that work on blocks, which are what takes long there. Each chunk costs these time, whatever its
size: so there are fewer, and larger ones."""

MIN_SLAB_NBYTES = 1 << 20

READ_AHEAD = 2
"""How many more blocks of a streamed weight are under way than are computed on."""

Leaf = Read | Mean | Zeros | Opaque | Slice
"""What a stream may start from."""

Sink = FileSink | BufferSink
Chain = tuple[tuple[ChunkOp, ...], DType]


@dataclass(eq=False)
class _Stream:
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

    def position(self) -> tuple[int, int]:
        """Where in the output it first writes."""
        files = (s for sinks in self.sinks.values() for s in sinks if isinstance(s, FileSink))
        return min((sink.shard, sink.offset) for sink in files)


def compile(graph: TensorGraph, *, budget_nbytes: int, shard_nbytes: int, threads: int = 1) -> Plan:
    """Plan `graph` so that all buffers together stay within `budget_nbytes`.

    Kernels compute in up to `threads` threads. Raises BudgetError, with the smallest budget that works, where that
    cannot be.
    """
    shards = lay_out(graph.outputs, shard_nbytes)
    kernels = opaque_in_order(graph.outputs)
    most = _most_that_helps(graph, kernels)
    draft = _draft(graph, shards, kernels, budget_nbytes, most)
    pool = _pool(budget_nbytes - max(draft.held, default=0), budget_nbytes, most)
    sources = sorted({read.file for read in _reads(draft)}, key=_by_name)
    index = {file: i for i, file in enumerate(sources)}
    steps: list[Step] = []
    memory: list[int] = []
    blocks = 0
    runs = Counter(draft.running)
    for node, running, held, freed in zip(draft.order, draft.running, draft.held, draft.frees, strict=True):
        if isinstance(node, Opaque):
            more = _more_workers(
                node, threads + READ_AHEAD * draft.is_streamed(node), budget_nbytes - pool.nbytes - held
            )
            blocks = more * node.block_nbytes
            steps.append(_kernel_step(node, index, draft.buffers, 1 + more, runs[node] - 1, freed))
        else:
            steps.append(_stream_step(node, index, draft.buffers, pool.slab_nbytes, freed))
        memory.append(pool.nbytes + held + (blocks if running else 0))
    return Plan(
        format=FORMAT,
        sources=tuple(sources),
        shards=shards,
        steps=tuple(steps),
        buffer_nbytes=tuple(expr.nbytes for expr in draft.buffers),
        pool=pool,
        memory_nbytes=tuple(memory),
        graph_digest=digest(graph.outputs),
    )


@dataclass(frozen=True)
class _Draft:
    """An order of streams and kernel runs, with the whole tensors that it needs and what they take during each step.

    `running` has, for each step, the kernel that runs during it: its own, or one that it runs beside.
    """

    order: list[_Stream | Opaque]
    running: list[Opaque | None]
    buffers: Mapping[Expr, int]
    frees: list[tuple[int, ...]]
    held: list[int]

    def is_streamed(self, kernel: Opaque) -> bool:
        return any(weight not in self.buffers for weight in kernel.weights)


def _most_that_helps(graph: TensorGraph, kernels: Sequence[Opaque]) -> Pool:
    """The chunk buffers that help, if there is memory for them."""
    if not any(kernel.block_nbytes for kernel in kernels):
        return COPYING
    files = (read.file for expr in walk(graph.outputs) for read in reads_of(expr))
    return COPYING if any(isinstance(file, RemoteFile) for file in files) else BESIDE_BLOCKS


def _draft(
    graph: TensorGraph, shards: Sequence[Shard], kernels: Sequence[Opaque], budget_nbytes: int, most: Pool
) -> _Draft:
    """The draft that fills weights beside kernels, if it and a pool of the `most` that helps keep within the budget;
    else the one that streams the weights of as few kernels as keep it within the budget, or of all."""
    products = [expr for expr in walk(graph.outputs) if isinstance(expr, AddLowRank)]
    factors = {factor for product in products for factor in (product.b, product.a)}

    def draft(streamed: Collection[Opaque], *, beside: bool) -> _Draft:
        buffers = _whole_tensors(kernels, streamed, products)
        streams = _streams(graph, shards, buffers, factors)
        steps = list(_in_order(streams, kernels, buffers, beside))
        order, running = [node for node, _ in steps], [kernel for _, kernel in steps]
        uses = list(_uses(order, running, buffers))
        frees = _last_uses(uses)
        held = list(_held(running, uses, frees, [expr.nbytes for expr in buffers]))
        return _Draft(order, running, buffers, frees, held)

    ahead = draft((), beside=True)
    if max(ahead.held, default=0) <= budget_nbytes - most.nbytes:
        return ahead
    limit_nbytes = budget_nbytes - most.workers * MIN_SLAB_NBYTES
    streamed: set[Opaque] = set()
    while True:
        one_by_one = draft(streamed, beside=False)
        resident = {kernel for kernel in kernels if kernel.weights} - streamed
        if max(one_by_one.held, default=0) <= limit_nbytes or not resident:
            return one_by_one
        streamed |= set(_too_large(one_by_one, limit_nbytes)) & resident or resident


def _too_large(draft: _Draft, limit_nbytes: int) -> Iterator[Opaque]:
    """The kernels that too much is held for: what is streamed into buffers is for the next one."""
    exceeded = False
    for node, nbytes in zip(draft.order, draft.held, strict=True):
        exceeded = exceeded or nbytes > limit_nbytes
        if isinstance(node, Opaque):
            if exceeded:
                yield node
            exceeded = False


def _more_workers(kernel: Opaque, wanted: int, free_nbytes: int) -> int:
    """How many blocks the kernel may work on beside the first, which is counted already."""
    return min(wanted - 1, free_nbytes // kernel.block_nbytes) if kernel.block_nbytes else 0


def _reads(draft: _Draft) -> Iterator[Read]:
    for node in draft.order:
        for expr in node.weights if isinstance(node, Opaque) else (node.root,):
            yield from reads_of(expr)


def _by_name(file: Source) -> tuple[str, int, int]:
    return (file.path, file.device, file.inode) if isinstance(file, SourceFile) else (file.url, 0, 0)


def _whole_tensors(
    kernels: Sequence[Opaque], streamed: Collection[Opaque], products: Sequence[AddLowRank]
) -> dict[Expr, int]:
    """What must be whole in memory at some time, with its buffer's index: all that kernels take and give, factors."""
    buffers: dict[Expr, int] = {}
    for kernel in kernels:
        for expr in (*kernel.args, *(() if kernel in streamed else kernel.weights), kernel):
            buffers.setdefault(expr, len(buffers))
    for product in products:
        for factor in (product.b, product.a):
            buffers.setdefault(factor, len(buffers))
    return buffers


def _streams(
    graph: TensorGraph, shards: Sequence[Shard], buffers: Mapping[Expr, int], factors: set[Expr]
) -> list[_Stream]:
    streams: dict[Leaf, _Stream] = {}
    feeders: dict[Leaf, _Stream] = {}

    for number, shard in enumerate(shards):
        for tensor in shard.tensors:
            for root, chain, offset in _leaves(graph.outputs[tensor.name], tensor.offset, buffers):
                streams.setdefault(root, _Stream(root)).sinks[chain].append(FileSink(number, offset))
    filled = [
        (expr in factors, root, chain, BufferSink(buffer, offset, 0, root.numel))
        for expr, buffer in buffers.items()
        if not isinstance(expr, Opaque)
        for root, chain, offset in _leaves(expr, 0, buffers)
    ]
    widest = _widest([root for _, root, _, _ in filled if isinstance(root, Read | Mean)], streams)
    for is_factor, root, chain, sink in sorted(filled, key=lambda item: item[0]):
        if isinstance(root, Read | Mean) and not is_factor and all(isinstance(op, Cast) for op in chain[0]):
            root, first = widest[root]
            sink = replace(sink, first=first)
        stream = streams.setdefault(root, _Stream(root))
        if is_factor and stream.factors():
            # What a stream waits for, it cannot fill itself: that takes a step of its own, which reads first.
            stream = feeders.setdefault(root, _Stream(root))
        stream.sinks[chain].append(sink)
    return [*streams.values(), *feeders.values()]


def _widest(leaves: Collection[Read | Mean], others: Iterable[Leaf]) -> dict[Read | Mean, tuple[Read | Mean, int]]:
    """For each of `leaves`, the one, of them and `others`, that it is a part of, and from which element on: the
    widest, or itself."""
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


def _in_order(
    streams: Sequence[_Stream], kernels: Sequence[Opaque], buffers: Mapping[Expr, int], beside: bool
) -> Iterator[tuple[_Stream | Opaque, Opaque | None]]:
    """Streams and kernel runs, each after what it depends on, and with the kernel that runs during it.

    `beside`: kernels run beside streams that fill the weights of the next one.
    """
    of_result: dict[Opaque, list[_Stream]] = defaultdict(list)
    for stream in streams:
        if (result := _result(stream.root)) is not None:
            of_result[result].append(stream)
    feeding: dict[int, list[_Stream]] = defaultdict(list)
    for stream in streams:
        for buffer in stream.buffers():
            feeding[buffer].append(stream)
    done: set[_Stream] = set()

    def with_factors(stream: _Stream) -> Iterator[_Stream]:
        for needed in (*(feeder for buffer in stream.factors() for feeder in feeding[buffer]), stream):
            if needed not in done:
                done.add(needed)
                yield needed

    independent = [s for s in streams if not s.buffers() and _result(s.root) is None]

    def after(*streams: _Stream) -> Iterator[tuple[_Stream, None]]:
        for stream in streams:
            for each in with_factors(stream):
                yield each, None

    yield from after(*sorted(independent, key=lambda stream: (stream.computes(), stream.position())))
    following = _next_with_weights(kernels) if beside else {}
    for kernel in kernels:
        for whole in kernel.inputs:
            yield from after(*(feeding[buffers[whole]] if whole in buffers else ()))
        yield kernel, kernel
        for weight in following[kernel].weights if kernel in following else ():
            for stream in feeding[buffers[weight]]:
                if not stream.factors():
                    yield from ((each, kernel) for each in with_factors(stream))
        yield from after(*of_result[kernel])


def _next_with_weights(kernels: Sequence[Opaque]) -> dict[Opaque, Opaque]:
    """For each kernel, the first one after it that has weights, if there is one."""
    following: dict[Opaque, Opaque] = {}
    for kernel, after in reversed(list(pairwise(kernels))):
        if after.weights or after in following:
            following[kernel] = after if after.weights else following[after]
    return following


def _uses(
    order: Sequence[_Stream | Opaque], running: Sequence[Opaque | None], buffers: Mapping[Expr, int]
) -> Iterator[set[int]]:
    """The buffers that must be there during each step. What runs beside each other counts as one."""
    for kernel, nodes in groupby(zip(order, running, strict=True), key=lambda pair: pair[1]):
        used = [_used(node, buffers) for node, _ in nodes]
        yield from used if kernel is None else [set().union(*used)] * len(used)


def _used(node: _Stream | Opaque, buffers: Mapping[Expr, int]) -> set[int]:
    if isinstance(node, Opaque):
        return {buffers[expr] for expr in (*node.inputs, node) if expr in buffers}
    result = _result(node.root)
    return node.buffers() | set(node.factors()) | (set() if result is None else {buffers[result]})


def _result(root: Leaf) -> Opaque | None:
    """The kernel whose result a stream starts from."""
    return root.input if isinstance(root, Slice) else root if isinstance(root, Opaque) else None


def _last_uses(uses: Sequence[set[int]]) -> list[tuple[int, ...]]:
    """For each step, the buffers that no later step uses."""
    seen: set[int] = set()
    frees: list[tuple[int, ...]] = []
    for used in reversed(uses):
        frees.append(tuple(sorted(used - seen)))
        seen |= used
    return frees[::-1]


def _held(
    running: Sequence[Opaque | None],
    uses: Sequence[set[int]],
    frees: Sequence[tuple[int, ...]],
    buffer_nbytes: Sequence[int],
) -> Iterator[int]:
    """Bytes of whole tensors, workspace and one block during each step."""
    alive: set[int] = set()
    nbytes = 0
    for kernel, used, freed in zip(running, uses, frees, strict=True):
        nbytes += sum(buffer_nbytes[buffer] for buffer in used - alive)
        alive |= used
        yield nbytes + (0 if kernel is None else kernel.workspace_nbytes + kernel.block_nbytes)
        alive -= set(freed)
        nbytes -= sum(buffer_nbytes[buffer] for buffer in freed)


def _pool(available_nbytes: int, budget_nbytes: int, most: Pool) -> Pool:
    """The `most` that helps, if it fits; else chunk buffers get smaller first, then fewer."""
    if available_nbytes < MIN_SLAB_NBYTES:
        needed = budget_nbytes - available_nbytes + MIN_SLAB_NBYTES
        raise BudgetError(f"buffers need {needed} bytes, and may use {budget_nbytes}", needed)
    workers = min(most.workers, available_nbytes // MIN_SLAB_NBYTES)
    slab = min(most.slab_nbytes, available_nbytes // workers)
    return Pool(workers, slab - slab % MIN_SLAB_NBYTES)


def _stream_step(
    stream: _Stream,
    sources: dict[Source, int],
    buffers: Mapping[Expr, int],
    slab_nbytes: int,
    frees: tuple[int, ...],
) -> StreamStep:
    root = stream.root
    return StreamStep(
        root=_root(root, sources, buffers),
        numel=root.numel,
        head_numel=_head_numel(list(stream.sinks.items())),
        chunk_numel=_chunk_numel(root, list(stream.sinks), slab_nbytes),
        branches=tuple(Branch(ops, dtype, tuple(sinks)) for (ops, dtype), sinks in stream.sinks.items()),
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


def _chunk_numel(root: Leaf, chains: Sequence[Chain], slab_nbytes: int) -> int:
    """How many elements, with all that is computed from them at a time, fit a slab: see `executor.chunk_ops`."""
    ops = [op for chain, _ in chains for op in chain]
    scratch = max((dtype.itemsize for ops, dtype in chains if ops), default=0)
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


def _head_numel(branches: Sequence[tuple[Chain, list[Sink]]]) -> int:
    """How many elements the first block has: so many that the next one begins at a page of the first file written to.

    A whole block where noise is drawn, whose blocks are counted from the tensor's first element.
    """
    if any(isinstance(op, AddNoise) for (ops, _), _ in branches for op in ops):
        return BLOCK
    for (_, dtype), sinks in branches:
        for sink in sinks:
            if isinstance(sink, FileSink):
                return BLOCK - sink.offset % PAGE // dtype.itemsize
    return BLOCK


def _kernel_step(
    kernel: Opaque,
    sources: dict[Source, int],
    buffers: Mapping[Expr, int],
    workers: int,
    beside: int,
    frees: tuple[int, ...],
) -> KernelStep:
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
