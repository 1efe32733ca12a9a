"""Plans in small: what is read by which step, what is in memory meanwhile, and which weights are streamed."""

import json
from dataclasses import replace

import pytest
from source_files import FACTORS, FILES

from planner.errors import BudgetError, UserError
from planner.expr import (
    Concat,
    DType,
    Expr,
    Opaque,
    Read,
    RemoteFile,
    add_low_rank,
    add_noise,
    cast,
    mean,
    rows,
    scale,
    stack,
)
from planner.graph import TensorGraph
from planner.plan import (
    FORMAT,
    BufferSink,
    BufferView,
    FileRoot,
    FileSink,
    FileView,
    KernelStep,
    MeanRoot,
    Plan,
    Pool,
    StreamStep,
)
from planner.schedule import BESIDE_BLOCKS, COPYING, MIN_SLAB_NBYTES, READ_AHEAD, compile


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


def test_rows_that_noise_is_added_to_are_not_taken_from_what_passes_by() -> None:
    """Noise is drawn by an element's place in the tensor that it is added to."""
    table = Read(FILES[0], 8, DType.F32, (100, 4))
    noisy = add_noise(rows(table, 3, 4), 0.1, seed=1)
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


@pytest.mark.parametrize("is_mean", [False, True])
def test_rows_that_a_kernel_needs_of_what_is_written_are_taken_as_it_passes_by(is_mean: bool) -> None:
    tables = [Read(file, 8 + 2 * n, (DType.F32, DType.BF16)[n], (100, 4)) for n, file in enumerate(FILES[:2])]
    table = cast(mean(tables), DType.BF16) if is_mean else tables[0]
    taken = Concat(tuple(rows(table, row, row + 1) for row in (97, 3, 0)), (3, 4))
    graph = TensorGraph()
    graph.add("embeddings", table)
    graph.add("gate", Opaque("gate", "{}", (taken,), DType.F32, (4,)))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    written, *_ = plan.steps
    assert isinstance(written, StreamStep)
    ((file, *buffers),) = [branch.sinks for branch in written.branches]
    assert isinstance(file, FileSink)
    row_nbytes = table.nbytes // 100
    assert buffers == [BufferSink(0, n * row_nbytes, row * 4, 4) for n, row in enumerate((97, 3, 0))]
    assert (plan.read_nbytes, plan.reread_nbytes) == (1600 + 800 * is_mean, 0)


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


def test_what_is_strung_together_cannot_be_adjusted_as_a_whole() -> None:
    x = Read(FILES[0], 8, DType.F32, (4, 4))
    with pytest.raises(TypeError, match="apply it to the parts"):
        compile(TensorGraph({"x": scale(stack([x, x]), 0.5)}), budget_nbytes=8 << 20, shard_nbytes=1 << 40)


def test_an_output_has_one_expression() -> None:
    graph = TensorGraph()
    graph.add("x", Read(FILES[0], 8, DType.F32, (4,)))
    with pytest.raises(ValueError, match="x is declared twice"):
        graph.add("x", Read(FILES[1], 8, DType.F32, (4,)))


def test_a_plan_of_another_version_is_to_be_planned_again() -> None:
    plan = compile(TensorGraph(), budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    with pytest.raises(UserError, match=f"of format {FORMAT - 1}, and this moeplan reads {FORMAT}; plan again"):
        Plan.from_json(replace(plan, format=FORMAT - 1).to_json())


def test_sources_are_in_the_order_of_their_names_which_is_the_same_in_every_process() -> None:
    there = RemoteFile("https://hub/weights", "e", 1 << 40)
    files = (there, *reversed(FILES), FACTORS)
    graph = TensorGraph({str(n): Read(file, 8, DType.F32, (4,)) for n, file in enumerate(files)})
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    assert plan.sources == (FACTORS, *FILES, there)


def test_overlapping_reads_are_counted_as_read_again() -> None:
    table = Read(FILES[0], 8, DType.F32, (100, 4))
    graph = TensorGraph()
    graph.add("embeddings", table)
    graph.add("rows", Concat(tuple(rows(table, row, row + 1) for row in (3, 97)), (2, 4)))
    plan = compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    assert (plan.read_nbytes, plan.reread_nbytes) == (1632, 32)


def test_what_is_copied_comes_before_what_is_computed_in_the_order_of_the_output_s_files() -> None:
    """A tensor of no whole page lies behind those of whole pages. What is copied and adjusted, too, is computed."""
    numels = {"halved": 1024, "small": 3, "mean": 3072, "large": 2048}
    reads = {
        name: Read(FILES[0], 8 + n * (1 << 20), DType.F32, (size,)) for n, (name, size) in enumerate(numels.items())
    }
    outputs: dict[str, Expr] = {
        **reads,
        "half of it": scale(reads["halved"], 0.5),
        "mean": mean([reads["mean"], replace(reads["mean"], file=FILES[1])]),
    }
    plan = compile(TensorGraph(outputs), budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    steps = [step.numel for step in plan.steps if isinstance(step, StreamStep)]
    assert steps == [numels[name] for name in ("large", "small", "halved", "mean")]


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


def test_what_a_product_is_added_to_and_a_kernel_needs_is_read_once() -> None:
    weight = Read(FILES[0], 8, DType.F32, (64, 32))
    b, a = Read(FACTORS, 8, DType.F32, (64, 4)), Read(FACTORS, 4096, DType.F32, (4, 32))
    graph = TensorGraph({"adapted": add_low_rank(weight, b, a, 1.0)})
    graph.add("gate", Opaque("gate", "{}", (weight,), DType.F32, (4,)))
    assert compile(graph, budget_nbytes=8 << 20, shard_nbytes=1 << 40).reread_nbytes == 0


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


def test_a_factor_that_a_kernel_takes_is_there_before_it_is_added_to_for_another() -> None:
    square = Read(FILES[0], 8, DType.F32, (64, 64))
    first = Opaque("first", "", (square,), DType.F32, (4,))
    second = Opaque("second", "", (add_low_rank(square, square, square, 1.0),), DType.F32, (4,))
    plan = compile(TensorGraph({"1": first, "2": second}), budget_nbytes=8 << 20, shard_nbytes=1 << 40)
    fill, add = [step for step in plan.steps if isinstance(step, StreamStep) and isinstance(step.root, FileRoot)]
    assert fill.factors() == set()
    assert add.factors() == {sink.buffer for branch in fill.branches for sink in branch.sinks}


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
    assert {type(weight.root) for step in streamed.kernels for weight in step.streamed} == {FileRoot}
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
    first = Opaque("first", "", (rows(table, 7, 8),), DType.F32, (16,), 20 << 20)  # whose row the table's stream fills
    second = Opaque("second", "", (first,), DType.F32, (16,), 0, (table,), block_nbytes=1 << 20)
    wide, narrow = (
        compile(TensorGraph({"y": second}), budget_nbytes=budget << 20, shard_nbytes=1 << 40) for budget in (40, 30)
    )
    assert [bool(step.streamed) for step in wide.kernels] == [False, False]
    assert [bool(step.streamed) for step in narrow.kernels] == [False, True]
    assert narrow.peak_nbytes <= 30 << 20


def test_weights_are_not_streamed_where_another_kernel_takes_more_than_they_do_and_no_budget_helps() -> None:
    weight = Read(FILES[0], 8, DType.F32, (1 << 16, 16))
    layer = Opaque("layer", "", (), DType.F32, (16,), 0, (weight,), block_nbytes=1 << 20)
    graph = TensorGraph({"y": Opaque("fit", "", (layer,), DType.F32, (16,), 20 << 20)})
    with pytest.raises(BudgetError) as refused:
        compile(graph, budget_nbytes=0, shard_nbytes=1 << 40)
    plan = compile(graph, budget_nbytes=refused.value.needed_nbytes, shard_nbytes=1 << 40)
    assert plan.pool == Pool(1, MIN_SLAB_NBYTES)
    assert plan.reread_nbytes == 0
    assert [bool(step.streamed) for step in plan.kernels] == [False, False]


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
