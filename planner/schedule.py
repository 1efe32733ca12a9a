"""From a graph and a budget to a plan: which kernels have their weights in memory, and how much memory all that takes.

A kernel's weights have two physical forms. *Resident*: whole in buffers, filled by the same step that copies them into
the output, so each byte is read once. *Streamed*: they stay in their file, and the kernel reads them again, a block of
rows at a time, so that a matrix of any size takes a block of memory. A kernel is streamed where the budget is too small
for its weights; where it has room for two layers, one's are filled beside the kernel of the other. What is computed is
the same.

Memory is the pool of chunk buffers, plus the buffers alive, plus the workspace and the blocks of the running kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from planner.errors import BudgetError
from planner.expr import AddLowRank, Expr, Opaque, Read, RemoteFile, Source, SourceFile, reads_of
from planner.graph import TensorGraph, digest, opaque_in_order, walk
from planner.layout import Shard, lay_out
from planner.order import Node, held_nbytes, in_order, last_uses, uses_of
from planner.plan import FORMAT, Plan, Pool, Step
from planner.steps import kernel_step, stream_step
from planner.streams import streams_of, whole_tensors

COPYING = Pool(workers=8, slab_nbytes=4 << 20)
"""The chunk buffers that help where all that a run does is to copy, or wait for a network."""

BESIDE_BLOCKS = Pool(workers=3, slab_nbytes=8 << 20)
"""Those beside kernels that work on blocks, which are what takes long there. Each chunk costs these time, whatever its
size: so there are fewer, and larger ones."""

MIN_SLAB_NBYTES = 1 << 20

READ_AHEAD = 2
"""How many more blocks of a streamed weight are under way than are computed on."""


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
            steps.append(kernel_step(node, index, draft.buffers, 1 + more, runs[node] - 1, freed))
        else:
            steps.append(stream_step(node, index, draft.buffers, pool.slab_nbytes, freed))
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

    order: list[Node]
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
    else the one that streams the weights of as few kernels as keep it within the budget."""
    products = (expr for expr in walk(graph.outputs) if isinstance(expr, AddLowRank))
    factors = dict.fromkeys(factor for product in products for factor in (product.b, product.a))  # in order

    def draft(streamed: Collection[Opaque], *, beside: bool) -> _Draft:
        buffers = whole_tensors(kernels, streamed, factors)
        streams = streams_of(graph, shards, buffers, factors)
        steps = list(in_order(streams, kernels, buffers, beside))
        order, running = [node for node, _ in steps], [kernel for _, kernel in steps]
        uses = list(uses_of(order, running, buffers))
        frees = last_uses(uses)
        held = list(held_nbytes(running, uses, frees, [expr.nbytes for expr in buffers]))
        return _Draft(order, running, buffers, frees, held)

    ahead = draft((), beside=True)
    if max(ahead.held, default=0) <= budget_nbytes - most.nbytes:
        return ahead
    # What leaves the pool its smallest slabs, or what is held in any case: streaming more gives the pool no more.
    least = draft(kernels, beside=False)
    limit_nbytes = max(budget_nbytes - most.workers * MIN_SLAB_NBYTES, *least.held, 0)
    streamed: set[Opaque] = set()
    while True:
        one_by_one = draft(streamed, beside=False)
        if max(one_by_one.held, default=0) <= limit_nbytes:
            return one_by_one
        resident = {kernel for kernel in kernels if kernel.weights} - streamed
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


def _pool(available_nbytes: int, budget_nbytes: int, most: Pool) -> Pool:
    """The `most` that helps, if it fits; else chunk buffers get smaller first, then fewer."""
    if available_nbytes < MIN_SLAB_NBYTES:
        needed = budget_nbytes - available_nbytes + MIN_SLAB_NBYTES
        raise BudgetError(f"buffers need {needed} bytes, and may use {budget_nbytes}", needed)
    workers = min(most.workers, available_nbytes // MIN_SLAB_NBYTES)
    slab = min(most.slab_nbytes, available_nbytes // workers)
    return Pool(workers, slab - slab % MIN_SLAB_NBYTES)


def _reads(draft: _Draft) -> Iterator[Read]:
    for node in draft.order:
        for expr in node.weights if isinstance(node, Opaque) else (node.root,):
            yield from reads_of(expr)


def _by_name(file: Source) -> tuple[str, int, int]:
    return (file.path, file.device, file.inode) if isinstance(file, SourceFile) else (file.url, 0, 0)
