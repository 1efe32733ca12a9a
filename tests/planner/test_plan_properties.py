"""What holds for every plan, whatever is merged and however little memory there is."""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import BudgetError
from planner.expr import (
    BLOCK,
    LOW_RANK_TILE,
    AddNoise,
    Concat,
    DType,
    Expr,
    Opaque,
    Read,
    RemoteFile,
    Shape,
    SourceFile,
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
from planner.plan import (
    BufferRoot,
    BufferSink,
    BufferView,
    FileRoot,
    FileSink,
    FileView,
    KernelStep,
    MeanRoot,
    Plan,
    Step,
    StreamStep,
)
from planner.schedule import BESIDE_BLOCKS, COPYING, MIN_SLAB_NBYTES, READ_AHEAD, compile

FILES = [SourceFile(1, inode, 1 << 40, 0, f"/models/{inode}") for inode in range(3)]
FACTORS = SourceFile(1, 3, 1 << 40, 0, "/adapters/3")


@st.composite
def graphs(draw: st.DrawFn) -> TensorGraph:
    """A merge in small: a few source tensors, used again and again, as they are, adjusted, stacked, and by kernels.

    Low-rank factors are used again, too, and may be written, or be what another product is added to. So may what goes
    into means, which are written, and taken by kernels, whole, as weights, or some rows of them.
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
    state: Expr | None = None
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
                table = Concat(tuple(row_of(x, row) for row in taken), (len(taken), x.shape[1]))
                x = Opaque("sum", json.dumps(number), (table,), DType.F32, (8, 16))
            case "mean" if isinstance(x, Read):
                averaged = mean([x, *(factor(x.shape) for _ in range(draw(st.integers(1, 3))))])
                adjusted = scale(averaged, draw(st.sampled_from([0.5, 1.0, 1.0])))
                x = cast(adjusted, draw(st.sampled_from(DType)))
                graph.add(f"mean {number}", x)
                x = kernel_of(draw, cast(averaged, draw(st.sampled_from(DType))), number)
            case "chain":
                state = Opaque("chain", "{}", (x,) if state is None else (state, x), DType.F32, (64,))
                x = state
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


def row_of(x: Read, row: int) -> Read:
    """`x[row : row + 1]`."""
    width = x.shape[1]
    return Read(x.file, x.offset + row * width * x.dtype.itemsize, x.dtype, (1, width))


budgets = st.integers(24 << 20, 64 << 20)
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


@given(graphs(), st.integers(0, 64 << 20))
def test_the_forecast_keeps_the_budget_or_the_smallest_that_works_is_named(graph: TensorGraph, budget: int) -> None:
    def plan_within(nbytes: int) -> Plan:
        return compile(graph, budget_nbytes=nbytes, shard_nbytes=1 << 40)

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


@given(graphs(), budgets)
def test_the_memory_forecast_counts_the_pool_every_live_buffer_and_the_workspace(
    graph: TensorGraph, budget: int
) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40)

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


@given(graphs(), budgets)
def test_what_tensors_may_take_leaves_every_kernel_its_workspace_and_blocks(graph: TensorGraph, budget: int) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40)
    for step in plan.kernels:
        assert plan.tensors_nbytes + plan.pool.nbytes + step.workspace_nbytes + step.blocks_nbytes <= plan.peak_nbytes


@given(graphs(), budgets)
def test_a_chunk_and_what_is_computed_from_it_fit_a_slab(graph: TensorGraph, budget: int) -> None:
    plan = compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40)
    for step in plan.steps:
        if isinstance(step, StreamStep):
            assert step.chunk_numel > 0
            widest = max(branch.dtype.itemsize if branch.ops else 0 for branch in step.branches)
            tile = math.prod(LOW_RANK_TILE) * 4 if step.factors() else 0
            if isinstance(step.root, MeanRoot):
                widest = max(widest, *(part.dtype.itemsize for part in step.root.parts))
            assert step.chunk_numel * (step.root.dtype.itemsize + widest) + tile <= plan.pool.slab_nbytes


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


def test_a_shard_s_large_tensors_lie_modulo_a_page_where_they_lie_in_their_source() -> None:
    graph = TensorGraph()
    graph.add("small", Read(FILES[0], 100, DType.F32, (3,)))
    graph.add("large", Read(FILES[0], 3 * PAGE + 1232, DType.F32, (PAGE,)))
    (shard,) = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40).shards
    assert [tensor.name for tensor in shard.tensors] == ["large", "small"]
    assert shard.tensors[0].offset % PAGE == 1232


def test_a_tensor_that_is_copied_scaled_and_needed_by_a_kernel_is_read_by_one_step() -> None:
    down = Read(FILES[0], 8, DType.BF16, (64, 64))
    graph = TensorGraph()
    graph.add("expert 0", down)
    graph.add("expert 1", down)
    graph.add("expert 2", cast(scale(down, 0.5), DType.BF16))
    graph.add("gate", Opaque("gate", "{}", (down,), DType.F32, (4,)))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    assert plan.read_nbytes == down.nbytes
    (step,) = [s for s in plan.steps if isinstance(s, StreamStep) and isinstance(s.root, FileRoot)]
    assert sum(len(branch.sinks) for branch in step.branches) == 4


def test_rows_that_a_kernel_needs_of_a_tensor_that_is_copied_are_taken_as_it_passes_by() -> None:
    table = Read(FILES[0], 8, DType.F32, (100, 4))
    rows = Concat(tuple(row_of(table, row) for row in (97, 3)), (2, 4))
    graph = TensorGraph()
    graph.add("embeddings", table)
    graph.add("gate", Opaque("gate", "{}", (rows,), DType.F32, (4,)))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    copy, *_ = plan.steps
    assert isinstance(copy, StreamStep)
    ((file, *buffers),) = [branch.sinks for branch in copy.branches]
    assert isinstance(file, FileSink)
    assert buffers == [BufferSink(0, 0, 97 * 4, 4), BufferSink(0, 16, 3 * 4, 4)]
    assert (plan.read_nbytes, plan.reread_nbytes) == (1600, 0)


def test_rows_that_noise_is_added_to_are_not_taken_from_what_passes_by() -> None:
    """Noise is drawn by an element's place in the tensor that it is added to."""
    table = Read(FILES[0], 8, DType.F32, (100, 4))
    noisy = add_noise(row_of(table, 3), 0.1, seed=1)
    graph = TensorGraph({"table": table, "gate": Opaque("gate", "{}", (noisy,), DType.F32, (4,))})
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    assert [step.numel for step in plan.steps if isinstance(step, StreamStep)] == [400, 4, 4]


def test_a_mean_is_one_step_that_reads_each_part_once_in_chunks_that_do_not_depend_on_their_number() -> None:
    sizes = set()
    for count in (2, 64):
        parts = [Read(FILES[n % 3], 8 + n * (1 << 23), DType.BF16, (1 << 11, 1 << 11)) for n in range(count)]
        averaged = mean([*parts, parts[0]])
        graph = TensorGraph()
        graph.add("float32", averaged)
        graph.add("bfloat16", cast(averaged, DType.BF16))
        plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
        (step,) = plan.steps
        assert isinstance(step, StreamStep)
        assert isinstance(step.root, MeanRoot)
        assert [part.offset for part in step.root.parts[:3]] == [8, 8, 8 + (1 << 23)]  # the first counts twice
        assert (plan.read_nbytes, plan.reread_nbytes) == (count * parts[0].nbytes, 0)
        sizes.add((step.chunk_numel, plan.peak_nbytes))
    assert len(sizes) == 1


def test_the_mean_of_one_tensor_is_that_tensor() -> None:
    x = Read(FILES[0], 8, DType.F16, (4, 4))
    assert mean([x, x, x]) is x


def test_rows_that_a_kernel_needs_of_a_mean_that_is_written_are_taken_as_it_passes_by() -> None:
    tables = [Read(file, 8 + 2 * n, (DType.F32, DType.BF16)[n], (100, 4)) for n, file in enumerate(FILES[:2])]
    averaged = cast(mean(tables), DType.BF16)
    taken = Concat(tuple(rows(averaged, row, row + 1) for row in (97, 3)), (2, 4))
    graph = TensorGraph()
    graph.add("embeddings", averaged)
    graph.add("gate", Opaque("gate", "{}", (taken,), DType.F32, (4,)))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    written, *_ = plan.steps
    assert isinstance(written, StreamStep)
    ((file, *buffers),) = [branch.sinks for branch in written.branches]
    assert isinstance(file, FileSink)
    assert buffers == [BufferSink(0, 0, 97 * 4, 4), BufferSink(0, 8, 3 * 4, 4)]
    assert (plan.read_nbytes, plan.reread_nbytes) == (1600 + 800, 0)


def test_a_mean_that_a_kernel_takes_as_a_weight_is_filled_by_the_step_that_writes_it_or_read_as_it_is_used() -> None:
    parts = [Read(FILES[n], 8, DType.F32, (1 << 20, 4)) for n in range(3)]
    averaged = cast(mean(parts), DType.BF16)
    graph = TensorGraph()
    graph.add("weight", averaged)
    graph.add("y", Opaque("layer", "", (), DType.F32, (16,), 0, (averaged,), block_nbytes=1 << 20, passes=2))
    resident = compile(graph, budget_nbytes=64 << 20, shard_nbytes=1 << 40)
    streamed = compile(graph, budget_nbytes=4 << 20, shard_nbytes=1 << 40)
    for plan, is_resident, times in ((resident, True, 1), (streamed, False, 3)):
        (kernel,) = [step for step in plan.steps if isinstance(step, KernelStep)]
        (weight,) = kernel.weights
        assert isinstance(weight, BufferView) if is_resident else isinstance(weight.root, MeanRoot)
        assert weight.dtype is DType.BF16
        assert plan.read_nbytes == times * 3 * parts[0].nbytes
        assert plan.reread_nbytes == (times - 1) * 3 * parts[0].nbytes
        assert Plan.from_json(plan.to_json()) == plan
    assert resident.fingerprint == streamed.fingerprint


def test_what_is_no_mean_of_ranges_of_one_shape_is_refused() -> None:
    x = Read(FILES[0], 8, DType.F32, (4, 4))
    with pytest.raises(ValueError, match="of one shape"):
        mean([x, Read(FILES[1], 8, DType.F32, (2, 8))])
    with pytest.raises(ValueError, match="no more than averaged and cast"):
        Opaque("layer", "", (), DType.F32, (4,), weights=(scale(x, 0.5),))


def test_what_is_strung_together_cannot_be_adjusted_as_a_whole() -> None:
    x = Read(FILES[0], 8, DType.F32, (4, 4))
    with pytest.raises(TypeError, match="apply it to the parts"):
        compile(TensorGraph({"x": scale(stack([x, x]), 0.5)}), budget_nbytes=8 << 20, shard_nbytes=1 << 40)


def test_overlapping_reads_are_counted_as_read_again() -> None:
    table = Read(FILES[0], 8, DType.F32, (100, 4))
    graph = TensorGraph()
    graph.add("embeddings", table)
    graph.add("rows", Concat(tuple(row_of(table, row) for row in (3, 97)), (2, 4)))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    assert (plan.read_nbytes, plan.reread_nbytes) == (1632, 32)


def test_kernels_hold_their_inputs_only_while_they_run() -> None:
    """state 0 → state 1 → state 2, each from a layer's tensor: one layer in memory at a time, not three."""
    layers = [Read(FILES[0], 8 + i * (1 << 22), DType.F32, (1 << 20,)) for i in range(3)]
    graph = TensorGraph()
    state: tuple[Expr, ...] = ()
    for number, layer in enumerate(layers):
        state = (Opaque("layer", json.dumps(number), (*state, layer), DType.F32, (16,)),)
        graph.add(f"gate {number}", state[0])
    plan = compile(graph, budget_nbytes=64 << 20, shard_nbytes=1 << 40)
    assert plan.peak_nbytes - plan.pool.nbytes <= layers[0].nbytes + 2 * 64


def test_equal_expressions_are_one_node() -> None:
    same_file = SourceFile(1, 0, 1 << 40, 0, "/models/0")
    first = scale(Read(FILES[0], 8, DType.F16, (2, 2)), 0.5)
    assert first is scale(Read(same_file, 8, DType.F16, (2, 2)), 0.5)
    assert first is not scale(Read(FILES[0], 8, DType.F16, (2, 2)), 0.25)
    assert math.prod(first.shape) == first.numel == 4


def test_equal_expressions_of_several_threads_are_one_node() -> None:
    """Or plans that are made beside each other would read things twice, and not be those of another time."""
    together = Barrier(2)

    def nodes() -> list[Expr]:
        together.wait()
        return [scale(Read(FILES[0], 8 * number, DType.F16, (4,)), 0.5) for number in range(20_000)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            first, second = (made.result() for made in [threads.submit(nodes) for _ in range(2)])
    finally:
        sys.setswitchinterval(before)
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_factors_are_in_memory_only_while_their_product_is_added() -> None:
    """Eight adapters on one matrix, layer after layer: a layer's factors at a time."""
    graph = TensorGraph()
    factors = [Read(FACTORS, 8 + i * 4096, DType.BF16, (64, 4) if i % 2 else (4, 64)) for i in range(4 * 8 * 2)]
    for layer in range(4):
        weight = Read(FILES[0], 8 + layer * 8192, DType.BF16, (64, 64))
        graph.add(f"layer {layer} base", weight)
        for a, b in zip(factors[layer * 16 : layer * 16 + 16 : 2], factors[layer * 16 + 1 :: 2], strict=False):
            graph.add(f"layer {layer} {a.offset}", cast(add_low_rank(weight, b, a, 2.0), DType.BF16))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    assert plan.peak_nbytes - plan.pool.nbytes == 8 * 2 * 4 * 64 * 4
    assert plan.reread_nbytes == 0


def test_what_is_added_to_and_is_a_factor_of_what_is_added_is_read_twice() -> None:
    square = Read(FILES[0], 8, DType.F32, (64, 64))
    graph = TensorGraph()
    graph.add("square", add_low_rank(square, square, square, 1.0))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    fill, add = plan.steps
    assert isinstance(add, StreamStep)
    assert isinstance(fill, StreamStep)
    assert add.factors() == {sink.buffer for branch in fill.branches for sink in branch.sinks}
    assert plan.reread_nbytes == square.nbytes


@pytest.mark.parametrize(
    ("b", "a"), [((7, 2), (2, 5)), ((8, 2), (3, 4)), ((8, 0), (0, 4)), ((4, 2), (2, 8)), ((8, 2), (2, 2, 2))]
)
def test_factors_that_do_not_make_a_matrix_of_the_shape_are_refused(b: Shape, a: Shape) -> None:
    x = Read(FILES[0], 8, DType.F32, (8, 4))
    with pytest.raises(ValueError, match=r"is not|cannot be multiplied"):
        add_low_rank(x, Read(FACTORS, 8, DType.F32, b), Read(FACTORS, 8, DType.F32, a), 1.0)


def layer_graph(num_layers: int, nbytes: int) -> TensorGraph:
    """A chain of kernels, each with a weight of so many bytes that is copied, too."""
    graph = TensorGraph()
    state: tuple[Expr, ...] = ()
    for number in range(num_layers):
        weight = Read(FILES[0], 8 + number * nbytes, DType.F32, (nbytes // 64, 16))
        layer = Opaque("layer", str(number), state, DType.F32, (16,), 0, (weight,), block_nbytes=1 << 20, passes=3)
        state = (layer,)
        graph.add(f"weight {number}", weight)
        graph.add(f"gate {number}", layer)
    return graph


def test_weights_that_fit_the_budget_are_held_and_read_once_and_others_are_read_as_they_are_used() -> None:
    nbytes = 20 << 20
    graph = layer_graph(3, nbytes)
    resident = compile(graph, budget_nbytes=64 << 20, shard_nbytes=1 << 40)
    streamed = compile(graph, budget_nbytes=nbytes, shard_nbytes=1 << 40)
    for plan, form in ((resident, BufferView), (streamed, FileView)):
        kernels = [step for step in plan.steps if isinstance(step, KernelStep)]
        assert [type(weight) for step in kernels for weight in step.weights] == [form] * 3
    assert (resident.read_nbytes, resident.reread_nbytes) == (3 * nbytes, 0)
    assert (streamed.read_nbytes, streamed.reread_nbytes) == (3 * nbytes * (1 + 3), 3 * nbytes * 3)
    assert streamed.peak_nbytes <= nbytes
    assert resident.fingerprint == streamed.fingerprint


def test_the_next_weights_are_read_beside_a_kernel_where_two_layers_fit() -> None:
    nbytes = 20 << 20
    wide, narrow = (
        compile(layer_graph(3, nbytes), budget_nbytes=budget << 20, shard_nbytes=1 << 40) for budget in (72, 62)
    )
    for plan, beside in ((wide, [1, 1, 0]), (narrow, [0, 0, 0])):
        assert [step.beside for step in plan.steps if isinstance(step, KernelStep)] == beside
        assert plan.reread_nbytes == 0
    assert wide.peak_nbytes - wide.pool.nbytes > 2 * nbytes > narrow.peak_nbytes - narrow.pool.nbytes > nbytes


def test_a_kernel_without_weights_keeps_none_from_being_read_beside_the_layer_before_it() -> None:
    graph = TensorGraph()
    state: tuple[Expr, ...] = ()
    for number in range(3):
        weight = Read(FILES[0], 8 + (number << 22), DType.F32, (1 << 16, 16))
        state = (Opaque("layer", str(number), state, DType.F32, (16,), 0, (weight,), block_nbytes=1 << 20),)
        graph.add(f"router {number}", Opaque("router", str(number), state, DType.F32, (4,)))
    plan = compile(graph, budget_nbytes=64 << 20, shard_nbytes=1 << 40)
    assert [(step.kernel, step.beside) for step in plan.kernels[:4]] == [
        ("layer", 1),
        ("router", 0),
        ("layer", 1),
        ("router", 0),
    ]


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_only_the_kernels_whose_weights_do_not_fit_are_streamed(order: tuple[str, str]) -> None:
    weights = {
        "small": Read(FILES[0], 8, DType.F32, (1 << 16, 16)),
        "large": Read(FILES[1], 8, DType.F32, (1 << 20, 16)),
    }
    graph = TensorGraph()
    for name in order:
        graph.add(name, Opaque(name, "", (), DType.F32, (16,), 0, (weights[name],), block_nbytes=1 << 20))
    plan = compile(graph, budget_nbytes=16 << 20, shard_nbytes=1 << 40)
    assert {step.kernel: len(step.streamed) for step in plan.kernels} == {"small": 0, "large": 1}


def test_weights_that_are_in_the_way_of_an_earlier_kernel_are_streamed_though_their_own_has_room_for_them() -> None:
    table = Read(FILES[0], 8, DType.F32, (1 << 20, 4))
    first = Opaque("first", "", (row_of(table, 7),), DType.F32, (16,), 20 << 20)  # whose row the table's stream fills
    second = Opaque("second", "", (first,), DType.F32, (16,), 0, (table,), block_nbytes=1 << 20)
    wide, narrow = (
        compile(TensorGraph({"y": second}), budget_nbytes=budget << 20, shard_nbytes=1 << 40) for budget in (40, 30)
    )
    assert [bool(step.streamed) for step in wide.kernels] == [False, False]
    assert [bool(step.streamed) for step in narrow.kernels] == [False, True]
    assert narrow.peak_nbytes <= 30 << 20


def test_as_many_blocks_are_under_way_as_threads_and_budget_allow() -> None:
    def workers(budget: int, threads: int) -> int:
        plan = compile(layer_graph(1, 64 << 20), budget_nbytes=budget, shard_nbytes=1 << 40, threads=threads)
        (step,) = (step for step in plan.steps if isinstance(step, KernelStep))
        return step.workers

    assert workers(200 << 20, 8) == 8
    assert workers(50 << 20, 8) == 8 + READ_AHEAD  # streamed: some blocks are being read
    assert workers(28 << 20, 8) < 8
    assert workers(3 << 20, 8) == 1


def test_chunks_are_fewer_and_larger_beside_kernels_that_work_on_blocks_but_not_where_a_network_is_waited_for() -> None:
    graph = layer_graph(1, 20 << 20)
    there = RemoteFile("https://hub/weights", "e", 1 << 40)
    copied, remote = TensorGraph(), TensorGraph(dict(graph.outputs))
    copied.add("copied", Read(FILES[1], 8, DType.F32, (16,)))
    remote.add("remote", Read(there, 8, DType.F32, (16,)))
    pools = [compile(g, budget_nbytes=100 << 20, shard_nbytes=1 << 40).pool for g in (graph, copied, remote)]
    assert pools == [BESIDE_BLOCKS, COPYING, COPYING]
    assert BESIDE_BLOCKS.workers < COPYING.workers
    assert BESIDE_BLOCKS.slab_nbytes > COPYING.slab_nbytes


def test_a_fingerprint_tells_what_is_computed_of_what() -> None:
    def fingerprint(**changes: object) -> str:
        fields = {"file": FILES[0], "offset": 8, "dtype": DType.BF16, "shape": (64, 64), "factor": 0.5, "name": "x"}
        fields |= changes
        graph = TensorGraph()
        read = Read(fields["file"], fields["offset"], fields["dtype"], fields["shape"])
        graph.add(fields["name"], cast(scale(read, fields["factor"]), DType.F32))
        return compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40).fingerprint

    changes = {"file": FILES[1], "offset": 16, "dtype": DType.F16, "shape": (32, 128), "factor": 0.25, "name": "y"}
    fingerprints = {fingerprint(), *(fingerprint(**{name: value}) for name, value in changes.items())}
    assert len(fingerprints) == 1 + len(changes)
    assert fingerprint() == fingerprint()
    mounted_anew = replace(FILES[0], device=7, inode=8)
    assert fingerprint() == fingerprint(file=mounted_anew)
