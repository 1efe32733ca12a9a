"""Kernels that go through their weights block by block: the same numbers, wherever the weights are."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
import torch
from plans import DTYPES, load, mean_of, source

from executor.engine import run
from executor.errors import RunError
from executor.reader import SourceReader
from executor.regions import block_nbytes
from executor.weights import Weights, WholeMatrix
from planner import schedule
from planner.expr import DType, Expr, Opaque, cast, mean
from planner.graph import TensorGraph
from planner.plan import FileRoot, KernelStep, MeanRoot, Plan, Pool
from planner.schedule import compile

SHAPE = (1000, 48)
ROWS = 64


def product(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
    """The sum of what each matrix makes of a vector."""
    output.zero_()
    for matrix in weights.matrices * params:

        def multiply(begin: int, block: torch.Tensor) -> None:
            output[begin : begin + len(block)] += block @ inputs[0].float()

        weights.for_each_block(matrix, ROWS, multiply)


@pytest.fixture(params=DTYPES, ids=str)
def tensors(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": SHAPE, "second": SHAPE, "vector": SHAPE[1:]}
    return {name: torch.randn(shape, generator=generator).to(request.param) for name, shape in shapes.items()}


def planned(path: Path, tensors: dict[str, torch.Tensor], budget: int, threads: int = 1) -> Plan:
    reads = source(path, tensors)
    graph = TensorGraph()
    graph.add("copy", reads["first"])
    matrices = (reads["first"], reads["second"])
    block = block_nbytes(ROWS, SHAPE[1], matrices[0].dtype)
    graph.add(
        "y",
        Opaque("product", "2", (reads["vector"],), DType.F32, SHAPE[:1], 0, matrices, block_nbytes=block, passes=2),
    )
    return compile(graph, budget_nbytes=budget, shard_nbytes=1 << 40, threads=threads)


def streamed(plan: Plan) -> bool:
    return any(step.streamed for step in plan.steps if isinstance(step, KernelStep))


def test_blocks_are_the_same_for_any_budget_and_number_of_threads(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    results, forms = [], []
    for budget, threads in ((2 << 20, 1), (2 << 20, 3), (64 << 20, 1), (64 << 20, 4)):
        plan = planned(tmp_path / "source.safetensors", tensors, budget, threads)
        out = tmp_path / f"{budget}-{threads}"
        out.mkdir()
        result = run(plan, out, {"product": product}, threads=threads)
        assert result.read_nbytes == plan.read_nbytes
        assert result.peak_buffer_nbytes <= plan.peak_nbytes <= budget
        assert result.peak_buffer_nbytes >= plan.pool.nbytes + max(step.blocks_nbytes for step in plan.kernels)
        results.append(load(plan, out)["y"])
        forms.append(streamed(plan))
    assert forms == [True, True, False, False]
    assert all(torch.equal(results[0], result) for result in results)
    expected = 2 * (tensors["first"].float() + tensors["second"].float()) @ tensors["vector"].float()
    torch.testing.assert_close(results[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_a_mean_has_the_same_rows_where_it_is_whole_and_where_its_parts_are_read(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {str(of): torch.randn(SHAPE, generator=generator).to(of) for of in DTYPES}
    reads = source(tmp_path / "source.safetensors", parts)
    averaged = cast(mean([*reads.values(), *reads.values()]), DTYPES[dtype])
    once = cast(reads["torch.float32"], DTYPES[dtype])  # a mean of one
    block = block_nbytes(ROWS, SHAPE[1], DType.F32)
    seen = Opaque("rows", "{}", (), DType.F32, (2, *SHAPE), 0, (averaged, once), block_nbytes=block)

    def fill(copy: torch.Tensor, begin: int, block: torch.Tensor) -> None:
        copy[begin : begin + len(block)] = block

    def rows(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
        for copy, matrix in zip(output, weights.matrices, strict=True):
            weights.for_each_block(matrix, ROWS, partial(fill, copy))

    results, forms = [], []
    for budget, threads in ((2 << 20, 1), (2 << 20, 4), (64 << 20, 2)):
        plan = compile(TensorGraph({"seen": seen}), budget_nbytes=budget, shard_nbytes=1 << 40, threads=threads)
        out = tmp_path / f"{budget}-{threads}"
        out.mkdir()
        result = run(plan, out, {"rows": rows}, threads=threads, check_sources=True)
        assert result.read_nbytes == plan.read_nbytes
        assert result.peak_buffer_nbytes <= plan.peak_nbytes <= budget
        results.append(load(plan, out)["seen"])
        forms.append([type(view.root) for step in plan.steps if isinstance(step, KernelStep) for view in step.streamed])
    assert forms[0] == forms[1] == [MeanRoot, MeanRoot if dtype is not torch.float32 else FileRoot]
    assert forms[2] == []
    expected = mean_of([tensor for tensor in parts.values() for _ in range(2)]).to(dtype).float()
    for result in results:
        assert torch.equal(result[0], expected)
        assert torch.equal(result[1], parts["torch.float32"].to(dtype).float())


@pytest.fixture
def blocks() -> Iterator[Weights]:
    """Forty blocks of a matrix, of which four are under way at a time and two are computed on."""
    with ThreadPoolExecutor(4) as workers:
        matrices = [WholeMatrix(torch.zeros(40, 4))]
        yield Weights(matrices, workers=workers, blocks=4, threads=2, block_nbytes=1 << 14, check=lambda: None)


def test_no_more_blocks_are_computed_on_at_a_time_than_there_are_threads(blocks: Weights) -> None:
    lock, working, most = Lock(), 0, 0

    def work(begin: int, block: torch.Tensor) -> None:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        time.sleep(0.01)
        with lock:
            working -= 1

    blocks.for_each_block(blocks.matrices[0], 1, work)
    assert (most, working) == (2, 0)


def test_when_the_work_on_a_block_failed_none_is_begun_and_none_goes_on(blocks: Weights) -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(begin: int, block: torch.Tensor) -> None:
        begun.append(begin)
        if begin == 0:
            raise ZeroDivisionError
        time.sleep(0.05)
        ended.append(begin)

    with pytest.raises(ZeroDivisionError):
        blocks.for_each_block(blocks.matrices[0], 1, work)
    assert sorted(begun) == [0, *sorted(ended)]
    assert len(begun) < 20


@pytest.mark.parametrize("budget", [2 << 20, 64 << 20])
def test_work_that_fails_ends_the_run_with_its_own_error(tmp_path: Path, budget: int) -> None:
    def broken(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
        weights.for_each_block(weights.matrices[0], ROWS, lambda begin, block: 1 // (begin - 3 * ROWS))

    tensors = {"first": torch.ones(SHAPE), "second": torch.zeros(SHAPE), "vector": torch.arange(48.0)}
    plan = planned(tmp_path / "source.safetensors", tensors, budget)
    with pytest.raises(ZeroDivisionError):
        run(plan, tmp_path, {"product": broken})


def test_a_copy_that_fails_beside_a_kernel_ends_the_run_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = source(tmp_path / "a.safetensors", {"weight": torch.ones(SHAPE)})
    others = source(tmp_path / "b.safetensors", {"copied": torch.arange(48.0)})
    outputs: dict[str, Expr] = {
        "copied": others["copied"],
        "y": Opaque("slow", "{}", (), DType.F32, (1,), 0, (reads["weight"],), block_nbytes=1 << 20),
    }
    plan = compile(TensorGraph(outputs), budget_nbytes=4 << 20, shard_nbytes=1 << 40)

    def endless(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
        while True:
            weights.for_each_block(weights.matrices[0], ROWS, lambda begin, block: None)

    def failing(self: Any, source: int, *_: Any) -> None:
        if plan.sources[source].path.endswith("b.safetensors"):
            raise RunError("the disk is broken")

    monkeypatch.setattr("executor.reader.SourceReader.read_into", failing)
    with pytest.raises(RunError, match="the disk is broken"):
        run(plan, tmp_path, {"slow": endless})


def test_a_kernel_that_fails_does_not_wait_for_what_is_read_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "BESIDE_BLOCKS", Pool(8, 1 << 20))
    large = torch.zeros(1 << 17, 48)  # 24 chunks
    reads = source(tmp_path / "source.safetensors", {"first": torch.ones(SHAPE), "second": large})
    state: tuple[Expr, ...] = ()
    for name, read in reads.items():
        state = (Opaque("layer", f'"{name}"', state, DType.F32, (1,), 0, (read,), block_nbytes=1 << 20),)
    plan = compile(TensorGraph({"y": state[0]}), budget_nbytes=64 << 20, shard_nbytes=1 << 40)
    assert any(step.beside for step in plan.kernels)
    failed, read_into = Event(), SourceReader.read_into
    read_after: list[int] = []

    def layer(*_: Any) -> None:
        failed.set()
        raise RunError("the kernel failed")

    def slowly(self: SourceReader, source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
        if nbytes > reads["first"].nbytes:
            assert failed.wait(timeout=30)
            time.sleep(0.1)
            read_after.append(nbytes)
        read_into(self, source, offset, slab, begin, nbytes)

    monkeypatch.setattr(SourceReader, "read_into", slowly)
    with pytest.raises(RunError, match="the kernel failed"):
        run(plan, tmp_path, {"layer": layer})
    assert sum(read_after) < reads["second"].nbytes


def test_a_kernel_runs_while_the_weights_of_the_next_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = source(tmp_path / "source.safetensors", {"first": torch.ones(SHAPE), "second": torch.zeros(SHAPE)})
    state: tuple[Expr, ...] = ()
    for name, read in reads.items():
        state = (Opaque("layer", f'"{name}"', state, DType.F32, (1,), 0, (read,), block_nbytes=1 << 20),)
    plan = compile(TensorGraph({"y": state[0]}), budget_nbytes=64 << 20, shard_nbytes=1 << 40)
    all_read, read_into = Event(), SourceReader.read_into
    still_to_read = {read.offset for read in reads.values()}

    def layer(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
        assert all_read.wait(timeout=30)
        output.fill_(1.0)

    def watching(self: SourceReader, source: int, offset: int, *place: Any) -> None:
        read_into(self, source, offset, *place)
        still_to_read.discard(offset)
        if not still_to_read:
            all_read.set()

    monkeypatch.setattr(SourceReader, "read_into", watching)
    run(plan, tmp_path, {"layer": layer})
    assert load(plan, tmp_path)["y"] == 1.0
