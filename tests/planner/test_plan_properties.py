"""What holds for every plan, whatever is merged and however little memory there is."""

import json
import math
from collections import Counter
from collections.abc import Iterator

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import FACTORS, FILES

from planner.errors import BudgetError
from planner.expr import (
    BLOCK,
    LOW_RANK_TILE,
    AddNoise,
    Cast,
    Concat,
    DType,
    Expr,
    Opaque,
    Read,
    Shape,
    add_low_rank,
    add_noise,
    cast,
    mean,
    rows,
    scale,
    stack,
)
from planner.graph import TensorGraph, walk
from planner.layout import PAGE
from planner.plan import BufferRoot, BufferSink, BufferView, FileSink, KernelStep, MeanRoot, Plan, Step, StreamStep
from planner.schedule import MIN_SLAB_NBYTES, compile


@st.composite
def graphs(draw: st.DrawFn) -> TensorGraph:
    """A merge in small: a few source tensors, used again and again, as they are, adjusted, stacked, and by kernels.

    Low-rank factors are used again, too, and may be written, or be what another product is added to. So may what goes
    into means, which are written, and taken by kernels, whole, as weights, or some rows of them. Kernels form a chain,
    in which one takes all of what another gives, or a part, or makes something of it first.
    """
    shapes = st.sampled_from([(1,), (7, 3), (64, 32), (2048,), (512, 256), (0, 4)])
    reads: list[Read] = []
    for file in FILES:
        offset = draw(st.integers(8, 5000))
        for _ in range(draw(st.integers(1, 3))):
            reads.append(Read(file, offset, draw(st.sampled_from(DType)), draw(shapes)))
            offset += reads[-1].nbytes

    def factor(shape: Shape) -> Read:
        """A tensor of `shape`: one that is there, or a new one."""
        known = [read for read in reads if read.shape == shape]
        if not known or draw(st.booleans()):
            reads.append(Read(FACTORS, sum(read.nbytes for read in reads), draw(st.sampled_from(DType)), shape))
            return reads[-1]
        return draw(st.sampled_from(known))

    graph = TensorGraph()
    state: Opaque | None = None
    for number in range(draw(st.integers(1, 12))):
        x: Expr = draw(st.sampled_from(reads))
        kinds = ["copy", "adjust", "stack", "kernel", "chain", "low rank", "layer", "rows", "mean"]
        match draw(st.sampled_from(kinds)):
            case "adjust":
                x = scale(add_noise(x, draw(st.sampled_from([0.0, 0.5])), number), draw(st.sampled_from([0.5, 1.0])))
                x = cast(x, draw(st.sampled_from(DType)))
            case "stack":
                x = stack([x] * draw(st.integers(1, 3)))
            case "kernel":
                x = cast(Opaque("sum", json.dumps(number), (x, stack([x, x])), DType.F32, (8, 16), 1000), DType.BF16)
            case "low rank" if len(x.shape) == 2:
                b, a = (factor(shape) for shape in ((x.shape[0], 4), (4, x.shape[1])))
                x = add_low_rank(x, b, a, draw(st.sampled_from([0.5, 1.0])))
                x = cast(add_noise(x, draw(st.sampled_from([0.0, 0.5])), number), draw(st.sampled_from(DType)))
                if draw(st.booleans()):
                    x = Opaque("sum", json.dumps(number), (x,), DType.F32, (8, 16))
            case "layer":
                weights = tuple(draw(st.lists(st.sampled_from(reads), max_size=2)))
                blocks = {"weights": weights, "block_nbytes": 1 << 20, "passes": 2}
                x = Opaque("layer", json.dumps(number), (x,), DType.F32, (64,), 1000, **blocks)
            case "rows" if isinstance(x, Read) and len(x.shape) == 2 and x.numel:
                taken = draw(st.lists(st.integers(0, x.shape[0] - 1), min_size=1, max_size=5, unique=True))
                table = Concat(tuple(rows(x, row, row + 1) for row in taken), (len(taken), x.shape[1]))
                x = Opaque("sum", json.dumps(number), (table,), DType.F32, (8, 16))
            case "mean" if isinstance(x, Read):
                averaged = mean([x, *(factor(x.shape) for _ in range(draw(st.integers(1, 3))))])
                adjusted = scale(averaged, draw(st.sampled_from([0.5, 1.0, 1.0])))
                x = cast(adjusted, draw(st.sampled_from(DType)))
                graph.add(f"mean {number}", x)
                x = kernel_of(draw, cast(averaged, draw(st.sampled_from(DType))), number)
            case "chain":
                taken = [] if state is None else [state, rows(state, 3, 60), scale(state, 0.5)]
                before = [draw(st.sampled_from(taken))] if taken else []
                state = Opaque("chain", json.dumps(number), (*before, x), DType.F32, (64,))
                x = state if draw(st.booleans()) else rows(state, 3, 60)
        graph.add(f"tensor {number}", x)
    return graph


def kernel_of(draw: st.DrawFn, x: Expr, number: int) -> Expr:
    """A kernel that takes `x` whole, as a weight, or some rows of it."""
    if draw(st.booleans()):
        return Opaque("layer", json.dumps(number), (), DType.F32, (64,), 1000, (x,), block_nbytes=1 << 20, passes=2)
    taken = [x]
    if len(x.shape) == 2 and x.numel and draw(st.booleans()):
        taken = [rows(x, row, row + 1) for row in draw(st.sets(st.integers(0, x.shape[0] - 1), min_size=1, max_size=5))]
    return Opaque("sum", json.dumps(number), tuple(taken), DType.F32, (8, 16))


budgets = st.integers(24 << 20, 64 << 20)


threads = st.integers(1, 8)


shard_sizes = st.sampled_from([1, 10_000, 3_000_000, 1 << 40])


def written(plan: Plan) -> Iterator[tuple[int, int, int]]:
    """(shard, begin, end) of everything that steps write to files."""
    for step in plan.steps:
        if isinstance(step, StreamStep):
            for branch in step.branches:
                for sink in branch.sinks:
                    if isinstance(sink, FileSink):
                        yield sink.shard, sink.offset, sink.offset + step.numel * branch.dtype.itemsize


@given(graphs(), budgets, shard_sizes)
def test_header_and_writes_tile_every_shard_exactly(graph: TensorGraph, budget: int, shard_size: int) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=shard_size)
    ranges = list(written(plan)) + [(i, 0, shard.data_start) for i, shard in enumerate(plan.shards)]
    for number, shard in enumerate(plan.shards):
        assert len(shard.header()) == shard.data_start
        end = 0
        for _, begin, stop in sorted(r for r in ranges if r[0] == number and r[1] < r[2]):
            assert begin == end
            end = stop
        assert end == shard.nbytes


@given(graphs())
def test_expressions_are_walked_once_each_after_what_they_are_made_of_as_networkx_sees_the_graph(
    graph: TensorGraph,
) -> None:
    drawing, order = graph.to_networkx(), list(walk(graph.outputs))
    assert nx.is_directed_acyclic_graph(drawing)
    assert {*order, *graph.outputs} == set(drawing)
    assert len(order) == len(set(order))
    place = {expr: number for number, expr in enumerate(order)}
    assert all(place[part] < place[whole] for part, whole in drawing.edges if isinstance(whole, Expr))


@given(graphs(), budgets, shard_sizes)
def test_each_source_range_and_each_kernel_is_there_once(graph: TensorGraph, budget: int, shard_size: int) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=shard_size)
    streams = [step for step in plan.steps if isinstance(step, StreamStep) and step.numel]
    roots = Counter((step.root, step.numel) for step in streams)
    # Only what is itself a factor that others, or it, must wait for is read for that before.
    fed = {step.root for step in streams if step.factors()}
    assert all(count <= 1 + (root in fed) for (root, _), count in roots.items())
    kernels = Counter((step.kernel, step.params, step.inputs) for step in plan.steps if isinstance(step, KernelStep))
    assert set(kernels.values()) <= {1}


@given(graphs(), budgets, shard_sizes)
def test_no_byte_is_read_twice_where_the_weights_of_kernels_are_resident(
    graph: TensorGraph, budget: int, shard_size: int
) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=shard_size)
    assert not any(step.streamed for step in plan.steps if isinstance(step, KernelStep))
    streams = [step for step in plan.steps if isinstance(step, StreamStep)]
    fed = {step.root for step in streams if step.factors()}
    # What goes into several means, or into one and elsewhere, is read for each.
    averaged = sum(nbytes for step in streams if isinstance(step.root, MeanRoot) for _, nbytes in step.reads())
    assert plan.reread_nbytes <= averaged + sum(nbytes for root, nbytes in {*plan.reads()} if root in fed)


@given(graphs(), budgets, budgets, shard_sizes)
def test_what_is_written_where_does_not_depend_on_the_budget(
    graph: TensorGraph, budget: int, other: int, shard_size: int
) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=shard_size)
    again = compile(graph, budget_nbytes=other, shard_nbytes=shard_size)
    assert plan.shards == again.shards
    assert plan.fingerprint == again.fingerprint
    assert plan == again or budget != other


@given(graphs(), st.integers(0, 64 << 20), threads)
def test_the_forecast_keeps_the_budget_or_the_smallest_that_works_is_named(
    graph: TensorGraph, budget: int, threads: int
) -> None:
    def plan_within(nbytes: int) -> Plan:
        return compile(graph, budget_nbytes=nbytes, shard_nbytes=1 << 40, threads=threads)

    try:
        plan = plan_within(budget)
    except BudgetError as error:
        smallest = error.needed_nbytes
        plan = plan_within(smallest)
        with pytest.raises(BudgetError):
            plan_within(max(smallest - 1, budget))
        budget = smallest
    assert plan.peak_nbytes <= budget
    assert plan.pool.slab_nbytes >= MIN_SLAB_NBYTES


@given(graphs(), budgets)
def test_buffers_are_filled_before_they_are_used_and_freed_after_the_last_use(graph: TensorGraph, budget: int) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40)
    filled: Counter[int] = Counter()
    freed: set[int] = set()
    together: set[int] = set()
    kernel_buffers: set[int] = set()
    last = -1
    for index, step in enumerate(plan.steps):
        if isinstance(step, KernelStep):
            assert index > last
            last = index + step.beside
            views = (*step.inputs, *step.weights)
            needed, made = {v.buffer for v in views if isinstance(v, BufferView)}, step.output.buffer
            filled[made] = plan.buffer_nbytes[made]
            used = together = needed | {made}
        else:
            needed = step.factors() | ({step.root.buffer} if isinstance(step.root, BufferRoot) else set())
            used = set(needed)
            for branch in step.branches:
                for sink in branch.sinks:
                    if isinstance(sink, BufferSink):
                        assert 0 <= sink.first <= step.numel - sink.numel
                        filled[sink.buffer] += sink.numel * branch.dtype.itemsize
                        used.add(sink.buffer)
            if index <= last:  # beside a kernel, with which it has nothing to do
                assert not needed
                assert not used & kernel_buffers
            together = used | (together if index <= last else set())
        kernel_buffers = used if isinstance(step, KernelStep) else kernel_buffers
        assert all(filled[buffer] == plan.buffer_nbytes[buffer] for buffer in needed)
        assert not used & freed
        assert set(step.frees) <= together
        assert not step.frees or index >= last
        freed |= set(step.frees)
    assert freed == set(range(len(plan.buffer_nbytes)))


@given(graphs(), budgets, threads)
def test_the_memory_forecast_counts_the_pool_every_live_buffer_and_the_workspace(
    graph: TensorGraph, budget: int, threads: int
) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40, threads=threads)

    def buffers(step: Step) -> set[int]:
        if isinstance(step, KernelStep):
            views = (*step.inputs, *step.weights, step.output)
            return {view.buffer for view in views if isinstance(view, BufferView)}
        sinks = [sink for branch in step.branches for sink in branch.sinks]
        return step.factors() | {sink.buffer for sink in sinks if isinstance(sink, BufferSink)}

    alive: set[int] = set()
    workspace, last = 0, -1
    for index, (step, forecast) in enumerate(zip(plan.steps, plan.memory_nbytes, strict=True)):
        if isinstance(step, KernelStep):
            workspace, last = step.workspace_nbytes + step.workers * step.block_nbytes, index + step.beside
        for beside in plan.steps[index : max(last, index) + 1]:
            alive |= buffers(beside)
        workspace = workspace if index <= last else 0
        assert forecast == plan.pool.nbytes + sum(plan.buffer_nbytes[b] for b in alive) + workspace
        alive -= set(step.frees)


@given(graphs(), budgets, threads)
def test_what_tensors_may_take_leaves_every_kernel_its_workspace_and_blocks(
    graph: TensorGraph, budget: int, threads: int
) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40, threads=threads)
    for step in plan.kernels:
        assert plan.tensors_nbytes + plan.pool.nbytes + step.workspace_nbytes + step.blocks_nbytes <= plan.peak_nbytes


@given(graphs(), budgets)
def test_a_chunk_and_what_is_computed_from_it_fit_a_slab(graph: TensorGraph, budget: int) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40)
    tile = math.prod(LOW_RANK_TILE) * 4
    for step in plan.steps:
        if isinstance(step, StreamStep):
            assert step.chunk_numel > 0
            scratch = [part.dtype.itemsize * step.chunk_numel for part in getattr(step.root, "parts", ())]
            for branch in (branch for branch in step.branches if branch.ops):
                float32 = any(not isinstance(op, Cast) for op in branch.ops) + any(
                    isinstance(op, AddNoise) for op in branch.ops
                )
                result = branch.dtype.itemsize if isinstance(branch.ops[-1], Cast) else 0
                scratch.append((4 * float32 + result) * step.chunk_numel + (tile if branch.factors() else 0))
            pages = 2 * PAGE  # within which the chunk, and its result, lie where they do in their files
            chunk = step.chunk_numel * step.root.dtype.itemsize
            assert chunk + max(scratch, default=0) + pages <= plan.pool.slab_nbytes


@given(graphs(), budgets, shard_sizes)
def test_the_second_block_of_a_stream_begins_at_a_page_of_the_first_file_that_it_goes_to(
    graph: TensorGraph, budget: int, shard_size: int
) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=shard_size)
    for step in plan.steps:
        if isinstance(step, StreamStep):
            assert 0 < step.head_numel <= BLOCK
            if any(isinstance(op, AddNoise) for branch in step.branches for op in branch.ops):
                assert step.head_numel == BLOCK  # which noise is drawn by
                continue
            places = [(sink, branch.dtype.itemsize) for branch in step.branches for sink in branch.sinks]
            for sink, itemsize in [place for place in places if isinstance(place[0], FileSink)][:1]:
                assert (sink.offset + step.head_numel * itemsize) % PAGE < itemsize


@given(graphs(), budgets, shard_sizes)
def test_a_plan_survives_json(graph: TensorGraph, budget: int, shard_size: int) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=shard_size)
    assert Plan.from_json(plan.to_json()) == plan


@given(graphs(), shard_sizes)
def test_whole_page_tensors_come_first_and_shards_hold_no_more_than_asked(graph: TensorGraph, shard_size: int) -> None:
    plan = compile(graph, budget_nbytes=64 << 20, shard_nbytes=shard_size)
    names = [tensor.name for shard in plan.shards for tensor in shard.tensors]
    assert sorted(names) == sorted(graph.outputs)
    for shard in plan.shards:
        odd = [tensor.nbytes % PAGE != 0 for tensor in shard.tensors]
        assert odd == sorted(odd)
        assert sum(t.nbytes for t in shard.tensors) <= shard_size or len(shard.tensors) == 1
