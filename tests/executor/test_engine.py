"""Running plans on real files: what is written, how much memory that takes, what happens when files misbehave."""

import errno
import hashlib
import itertools
import os
import re
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from executor import engine, writer
from executor.buffers import SlabPool
from executor.engine import Progress, run
from executor.errors import OutOfRangeError, RunError
from executor.reader import SourceReader
from executor.ways import physical_nbytes
from executor.weights import Weights
from moeplan.safetensors_header import LENGTH_NBYTES
from planner.expr import (
    DType,
    Expr,
    Opaque,
    Read,
    SourceFile,
    Zeros,
    add_low_rank,
    add_noise,
    cast,
    mean,
    rows,
    scale,
    stack,
)
from planner.graph import TensorGraph
from planner.plan import KernelStep, Plan
from planner.schedule import compile

DTYPES = {torch.float32: DType.F32, torch.float16: DType.F16, torch.bfloat16: DType.BF16}


def source(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Read]:
    """Save `tensors` at `path`; where each of them lies."""
    save_file(tensors, path)
    stat = path.stat()
    file = SourceFile(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, str(path))
    raw = path.read_bytes()
    start = LENGTH_NBYTES + int.from_bytes(raw[:LENGTH_NBYTES], "little")
    reads = {}
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        reads[name] = Read(file, raw.index(data, start), DTYPES[tensor.dtype], tuple(tensor.shape))
    return reads


def planned(outputs: dict[str, Expr], budget: int = 64 << 20, shard: int = 1 << 40) -> Plan:
    graph = TensorGraph()
    for name, expr in outputs.items():
        graph.add(name, expr)
    return compile(graph, budget_nbytes=budget, shard_nbytes=shard)


def load(plan: Plan, directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in plan.shards for name, t in load_file(directory / shard.filename).items()}


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def column_sums(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    output.copy_(inputs[0].float().sum(dim=0) * params)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(3000, 1000, generator=generator).bfloat16(),
        "small": torch.randn(5, 7, generator=generator).half(),
        "column": torch.randn(5, 1, generator=generator),
        "row": torch.randn(1, 7, generator=generator),
        "b": torch.randn(3000, 6, generator=generator),
        "a": torch.randn(6, 1000, generator=generator).bfloat16(),
        "float32": torch.randn(700, 1001, generator=generator),
        "float16": torch.randn(700, 1001, generator=generator).half(),
        "bfloat16": torch.randn(700, 1001, generator=generator).bfloat16(),
    }


def mean_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their float32 mean, in the order of `tensors`."""
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return total / len(tensors)


@pytest.fixture
def outputs(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Expr]:
    """One of everything that a graph can hold."""
    reads = source(tmp_path / "source.safetensors", tensors)
    large, small = reads["large"], reads["small"]
    sums = Opaque("column_sums", "2", (large,), DType.F32, (1000,))
    adapted = add_low_rank(large, reads["b"], reads["a"], 0.25)
    adapted_small = add_low_rank(small, reads["column"], reads["row"], 1.0)
    averaged = mean([reads[name] for name in ("float32", "float16", "bfloat16", "float32")])
    weights = (cast(averaged, DType.BF16),)
    return {
        "copy": large,
        "copy again": large,
        "halved": cast(scale(large, 0.5), DType.BF16),
        "noisy": cast(scale(add_noise(large, 0.1, seed=3), 2.0), DType.F16),
        "noise in full": add_noise(large, 0.1, seed=3),
        "wide": cast(small, DType.F32),
        "stacked": stack([small, small, small]),
        "sums": cast(sums, DType.BF16),
        "sums in full": sums,
        "adapted": cast(adapted, DType.BF16),
        "adapted in full": adapted,
        "adapted and noisy": add_noise(adapted, 0.1, seed=3),
        "adapted sums": Opaque("column_sums", "1", (adapted_small,), DType.F32, (7,)),
        "factor": reads["a"],
        "mean": cast(averaged, DType.BF16),
        "mean again": cast(averaged, DType.BF16),
        "mean in full": averaged,
        "half the mean and noise": cast(scale(add_noise(averaged, 0.1, seed=3), 0.5), DType.F16),
        "sums of a mean": Opaque("column_sums", "3", weights, DType.F32, (1001,)),
        "sums of some rows": Opaque("column_sums", "1", (rows(weights[0], 600, 603),), DType.F32, (1001,)),
        "some of the sums": rows(sums, 300, 700),
        "zeros": Zeros(DType.BF16, (5, 3)),
    }


def test_every_kind_of_expression_comes_out_as_torch_computes_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor], outputs: dict[str, Expr]
) -> None:
    plan = planned(outputs)
    out = tmp_path / "out"
    out.mkdir()
    result = run(plan, out, {"column_sums": column_sums})
    loaded = load(plan, out)
    large, small = tensors["large"], tensors["small"]
    assert torch.equal(loaded["copy"], large)
    assert torch.equal(loaded["copy again"], large)
    assert torch.equal(loaded["halved"], (large.float() * 0.5).bfloat16())
    assert torch.equal(loaded["wide"], small.float())
    assert torch.equal(loaded["stacked"], torch.stack([small] * 3))
    assert torch.equal(loaded["sums in full"], large.float().sum(dim=0) * 2)
    assert torch.equal(loaded["sums"], loaded["sums in full"].bfloat16())
    noise = loaded["noise in full"] - large.float()
    assert abs(noise.mean()) < 1e-3
    assert abs(noise.std() - 0.1) < 1e-3
    assert torch.equal(loaded["noisy"], (loaded["noise in full"] * 2).half())
    adapted = (large.double() + 0.25 * (tensors["b"].double() @ tensors["a"].double())).float()
    torch.testing.assert_close(loaded["adapted in full"], adapted, rtol=1e-6, atol=1e-6)
    assert torch.equal(loaded["adapted"], loaded["adapted in full"].bfloat16())
    torch.testing.assert_close(loaded["adapted and noisy"] - loaded["adapted in full"], noise, rtol=0, atol=1e-5)
    adapted_small = small.float() + tensors["column"] * tensors["row"]
    torch.testing.assert_close(loaded["adapted sums"], adapted_small.sum(dim=0), rtol=1e-6, atol=1e-6)
    assert torch.equal(loaded["factor"], tensors["a"])
    averaged = mean_of([tensors[name] for name in ("float32", "float32", "float16", "bfloat16")])
    assert torch.equal(loaded["mean in full"], averaged)
    assert torch.equal(loaded["mean"], averaged.bfloat16())
    assert torch.equal(loaded["mean again"], loaded["mean"])
    rough = loaded["half the mean and noise"].float() - averaged / 2
    assert abs(rough.std() - 0.05) < 0.001
    assert torch.equal(loaded["sums of a mean"], loaded["mean"].float().sum(dim=0) * 3)
    assert torch.equal(loaded["sums of some rows"], loaded["mean"][600:603].float().sum(dim=0))
    assert torch.equal(loaded["some of the sums"], loaded["sums in full"][300:700])
    assert torch.equal(loaded["zeros"], torch.zeros(5, 3, dtype=torch.bfloat16))
    assert result.read_nbytes == plan.read_nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert result.written_nbytes == plan.written_nbytes
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {n: e.shape for n, e in outputs.items()}


def test_bytes_are_the_same_for_any_budget_and_shards_open_with_safetensors(
    tmp_path: Path, outputs: dict[str, Expr]
) -> None:
    digests = []
    for budget in (8 << 20, 11 << 20, 200 << 20):
        plan = planned(outputs, budget, shard=10 << 20)
        out = tmp_path / str(budget)
        out.mkdir()
        result = run(plan, out, {"column_sums": column_sums})
        assert result.peak_buffer_nbytes <= plan.peak_nbytes <= budget
        digests.append(digest(out))
    assert len(digests[0]) > 1
    assert digests[0] == digests[1] == digests[2]
    for shard in plan.shards:
        with safe_open(out / shard.filename, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_a_plan_from_json_runs_to_the_same_bytes(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(plan, tmp_path / "a", {"column_sums": column_sums})
    run(Plan.from_json(plan.to_json()), tmp_path / "b", {"column_sums": column_sums})
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_noise_is_drawn_by_position_so_it_is_the_same_however_a_tensor_is_cut(tmp_path: Path) -> None:
    reads = source(tmp_path / "source.safetensors", {"zeros": torch.zeros(1 << 20)})
    results = []
    for budget in (1 << 20, 64 << 20):
        plan = planned({"noise": add_noise(reads["zeros"], 1.0, seed=11)}, budget)
        out = tmp_path / str(budget)
        out.mkdir()
        run(plan, out)
        results.append(load(plan, out)["noise"])
    assert torch.equal(*results)
    halves = results[0].view(2, -1)
    assert not torch.equal(halves[0], halves[1])
    assert abs(torch.corrcoef(halves)[0, 1]) < 0.01


@pytest.mark.parametrize("shape", [(100, 5000), (3, 70_000), (5000, 90), (40_000, 1)])
def test_a_low_rank_product_is_the_same_to_the_bit_however_a_tensor_is_cut(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "b": (rows, 7), "a": (7, columns)}
    tensors = {name: torch.randn(*size, generator=generator) for name, size in shapes.items()}
    reads = source(tmp_path / "source.safetensors", tensors)
    adapted = add_low_rank(reads["x"], reads["b"], reads["a"], 0.5)
    outputs = {
        "adapted": adapted,
        "noisy": scale(add_noise(adapted, 0.1, seed=3), 0.5),
        "twice": add_low_rank(adapted, reads["b"], reads["a"], -0.25),
        "cast": cast(adapted, DType.BF16),
    }
    results = []
    for budget in (1, 2, 5, 64):
        plan = planned(outputs, (budget << 20) + 12 * (rows + columns) * 7)
        out = tmp_path / str(budget)
        out.mkdir()
        run(plan, out)
        results.append(load(plan, out))
    assert len({plan.pool.slab_nbytes for plan in [planned(outputs, b << 20) for b in (8, 64)]}) == 2
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in outputs)
    x, b, a = (tensors[name].double() for name in "xba")
    torch.testing.assert_close(results[0]["adapted"], (x + 0.5 * b @ a).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0]["twice"], (x + 0.25 * b @ a).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [65_536.0, -1e5])
def test_a_weight_that_float16_has_no_place_for_ends_the_run(tmp_path: Path, dtype: torch.dtype, weight: float) -> None:
    x = torch.zeros(3 << 20, dtype=dtype)
    x[-5] = weight
    reads = source(tmp_path / "source.safetensors", {"x": x})
    plan = planned({"zeros": Zeros(DType.F16, (5,)), "the weights": cast(reads["x"], DType.F16)})
    with pytest.raises(OutOfRangeError, match=r"the weights: has weights beyond 65,504"):
        run(plan, tmp_path)


def test_what_is_infinite_or_no_number_in_a_source_stays_so_in_float16(tmp_path: Path) -> None:
    x = torch.tensor([1.0, float("inf"), 65_504.0, float("-inf"), float("nan"), 1e5])
    reads = source(tmp_path / "source.safetensors", {"x": x})
    plan = planned({"x": cast(reads["x"], DType.F16)})
    run(plan, tmp_path)
    torch.testing.assert_close(load(plan, tmp_path)["x"], x.half(), rtol=0, atol=0, equal_nan=True)


def test_a_mean_is_the_float32_mean_to_the_bit_whatever_lies_where_and_however_it_is_cut(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]):
        of = {"odd": torch.zeros(number), "x": torch.randn(333, 1001, generator=generator).to(dtype)}
        parts.append((of["x"], source(tmp_path / f"{number}.safetensors", of)["x"]))
    expected = mean_of([tensor for tensor, _ in parts])
    # torch's own mean adds up five or more in another order; numpy's goes through them one by one.
    assert np.array_equal(expected.numpy(), np.stack([tensor.float().numpy() for tensor, _ in parts]).mean(axis=0))
    averaged = mean([read for _, read in parts])
    outputs: dict[str, Expr] = {
        "odd": Zeros(DType.BF16, (3,)),
        "float32": averaged,
        "bfloat16": cast(averaged, DType.BF16),
        "float16": cast(averaged, DType.F16),
    }
    for budget in (1 << 20, 3 << 20, 64 << 20):
        plan = planned(outputs, budget)
        out = tmp_path / str(budget)
        out.mkdir()
        result = run(plan, out, check_sources=True)
        assert result.peak_buffer_nbytes <= plan.peak_nbytes <= budget
        assert result.read_nbytes == plan.read_nbytes == sum(tensor.nbytes for tensor, _ in parts)
        loaded = load(plan, out)
        assert torch.equal(loaded["float32"], expected)
        assert torch.equal(loaded["bfloat16"], expected.bfloat16())
        assert torch.equal(loaded["float16"], expected.half())


def test_a_mean_that_nothing_else_is_computed_beside_is_computed(tmp_path: Path) -> None:
    reads = source(tmp_path / "source.safetensors", {"a": torch.full((3,), 0.1), "b": torch.full((3,), 0.2)})
    plan = planned({"mean": mean([reads["a"], reads["b"]])})
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out")
    assert torch.equal(load(plan, tmp_path / "out")["mean"], (torch.full((3,), 0.1) + torch.full((3,), 0.2)) / 2)


def test_progress_ends_at_all_bytes_read_and_written(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    seen: list[Progress] = []
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", {"column_sums": column_sums}, seen.append)
    assert "column_sums" in {state.doing for state in seen}
    assert (seen[-1].read_nbytes, seen[-1].written_nbytes) == (plan.read_nbytes, plan.written_nbytes)
    assert [s.written_nbytes for s in seen] == sorted(s.written_nbytes for s in seen)


def test_a_kernel_is_what_a_run_does_when_nothing_is_copied_any_more(tmp_path: Path) -> None:
    reads = source(tmp_path / "source.safetensors", {"a": torch.randn(600, 1000), "b": torch.randn(600, 1000)})
    kernel = Opaque("slow", "0", (), DType.F32, (10,), weights=(reads["b"],), block_nbytes=1 << 20)
    plan = planned({"copy": reads["a"], "sums": kernel}, budget=3 << 20)  # so that it reads its weights itself
    seen: list[Progress] = []
    copied = Event()

    def slow(params: object, inputs: object, output: torch.Tensor, weights: Weights) -> None:
        assert copied.wait(30)
        output.zero_()
        weights.for_each_block(weights.matrices[0], 100, lambda begin, block: None)

    def watch(state: Progress) -> None:
        seen.append(state)
        if state.written_nbytes >= reads["a"].nbytes and state.doing:
            copied.set()

    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", {"slow": slow}, watch)
    reading = [state.doing for state in seen if state.read_nbytes > reads["a"].nbytes]
    assert reading[:6] == ["slow"] * 6


def test_a_source_that_changed_since_planning_is_refused(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    path = tmp_path / "source.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(RunError, match=r"source\.safetensors: the file was changed since"):
        run(plan, tmp_path, {"column_sums": column_sums})


def test_a_source_that_is_gone_is_named(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    (tmp_path / "source.safetensors").unlink()
    with pytest.raises(RunError, match=r"source\.safetensors: cannot be opened any more: No such file"):
        run(plan, tmp_path, {"column_sums": column_sums})


def test_a_source_that_shrinks_or_changes_during_the_run_is_noticed(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs, budget=8 << 20)
    path = tmp_path / "source.safetensors"

    def shrink(state: Progress) -> None:
        os.truncate(path, 1000)

    with pytest.raises(RunError, match=r"source\.safetensors: the file (ends at byte|was changed)"):
        run(plan, tmp_path, {"column_sums": column_sums}, shrink)


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "the disk is full; free some space"), (errno.EIO, "Input/output error")],
)
def test_a_disk_that_fails_in_the_middle_ends_the_run_with_a_message(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    plan = planned(outputs, budget=8 << 20)
    written = 0
    pwrite = os.pwrite

    def failing(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 5_000_000:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(RunError, match=rf"\.safetensors: {message}$"):
        run(plan, tmp_path, {"column_sums": column_sums})


def test_short_reads_and_writes_are_continued(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(outputs)
    (tmp_path / "whole").mkdir()
    (tmp_path / "short").mkdir()
    run(plan, tmp_path / "whole", {"column_sums": column_sums})
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, *place: preadv(fd, [views[0][:100_001]], *place))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:70_003], offset))
    run(plan, tmp_path / "short", {"column_sums": column_sums})
    assert digest(tmp_path / "whole") == digest(tmp_path / "short")


def test_a_kernel_that_fails_ends_the_run_with_its_own_error(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    def broken(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(planned(outputs), tmp_path, {"column_sums": broken})


def test_a_run_that_needs_no_more_space_goes_through_on_a_full_disk(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where extents cannot be tried to be shared, they are not shared."""

    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("executor.shortcuts.TemporaryFile", full)
    plan = planned(outputs, budget=40 << 20)
    assert physical_nbytes(plan, tmp_path) == plan.written_nbytes
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", {"column_sums": column_sums})


def test_runs_that_overlap_leave_the_interval_of_switching_threads_as_it_was(
    tmp_path: Path, outputs: dict[str, Expr]
) -> None:
    plan = planned({"copy": outputs["copy"]})
    before = sys.getswitchinterval()
    first_is_within, second_is_within, first_is_done = Event(), Event(), Event()

    def first_until_second_is_within(_: Progress) -> None:
        first_is_within.set()
        assert second_is_within.wait(30)

    def second_until_first_is_done(_: Progress) -> None:
        second_is_within.set()
        assert first_is_done.wait(30)
        assert sys.getswitchinterval() < before

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(run, plan, tmp_path / "first", on_progress=first_until_second_is_within)
        assert first_is_within.wait(30)
        second = threads.submit(run, plan, tmp_path / "second", on_progress=second_until_first_is_done)
        first.result()
        first_is_done.set()
        second.result()
    assert sys.getswitchinterval() == before


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_read(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(outputs)
    free = plan.written_nbytes - sum(shard.data_start for shard in plan.shards) - 1

    def reserve(fd: int, offset: int, nbytes: int) -> None:
        nonlocal free
        free -= nbytes
        if free < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read_nothing(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(writer, "reserve", reserve)
    monkeypatch.setattr(SourceReader, "read_into", read_nothing)
    with pytest.raises(RunError, match="the disk is full"):
        run(plan, tmp_path, {"column_sums": column_sums})


def test_more_sources_are_read_than_files_may_be_open(tmp_path: Path, few_open_files: None) -> None:
    names = [str(number) for number in range(150)]
    reads = {name: source(tmp_path / name, {name: torch.ones(4)})[name] for name in names}
    plan = planned(dict(reads))
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out")
    assert len(load(plan, tmp_path / "out")) == 150


@pytest.mark.parametrize(("sources", "shards"), [(150, 1), (1, 300)])
def test_where_the_system_allows_no_more_open_files_it_is_said_how_it_does(
    tmp_path: Path, few_open_files: None, monkeypatch: pytest.MonkeyPatch, sources: int, shards: int
) -> None:
    monkeypatch.setattr(engine, "allow_open_files", lambda count: None)
    names = [f"{number:03}" for number in range(max(sources, shards))]
    files = {of: {name: torch.ones(4) for name in names[of::sources]} for of in range(sources)}
    reads = {name: read for of, held in files.items() for name, read in source(tmp_path / str(of), held).items()}
    plan = planned(dict(reads), shard=16 if shards > 1 else 1 << 40)
    assert (len(plan.sources), len(plan.shards)) == (sources, shards)
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match=r"/\S+: .*more files would be open than .*; raise the limit \(`ulimit -n`\)$"):
        run(plan, tmp_path / "out")


def test_where_the_system_lets_no_more_threads_be_started_it_is_said_what_limits_them(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, start, left = planned(outputs), threading.Thread.start, -1
    said: list[str] = []

    def limited(self: threading.Thread) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise RuntimeError("can't start new thread")
        start(self)

    run(plan, tmp_path, {"column_sums": column_sums})
    monkeypatch.setattr(threading.Thread, "start", limited)
    for allowed in itertools.count():
        left = allowed
        try:
            run(plan, tmp_path, {"column_sums": column_sums})
        except RunError as error:
            said.append(str(error))
        else:
            break
    assert len(said) > 3
    assert all(re.search(r"start no more threads; raise .*\(`ulimit -u`\) .*\(`ulimit -v`\)$", text) for text in said)


def test_a_part_that_no_thread_could_be_started_for_does_not_keep_the_other_waiting_for_its_slab(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned({"copy": outputs["copy"], "sums": outputs["adapted sums"]}, budget=1 << 21)
    assert plan.pool.workers == 1
    is_taken, is_waited_for, start = Event(), Event(), threading.Thread.start
    taken: list[memoryview] = []

    def take(self: SlabPool) -> memoryview:
        (is_waited_for if is_taken.is_set() else is_taken).set()
        taken.append(self._free.get(timeout=10))
        return taken[-1]

    def limited(self: threading.Thread) -> None:
        if is_taken.is_set():
            assert is_waited_for.wait(30)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(SlabPool, "take", take)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RunError, match="start no more threads"):
        run(plan, tmp_path, {"column_sums": column_sums})
    assert len(taken) == 2


def test_buffers_that_take_more_than_the_plan_forecast_end_the_run(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    kernel = next(index for index, step in enumerate(plan.steps) if isinstance(step, KernelStep))
    memory = [nbytes - (index == kernel) for index, nbytes in enumerate(plan.memory_nbytes)]
    with pytest.raises(AssertionError, match=rf"where the plan forecast {memory[kernel]}$"):
        run(replace(plan, memory_nbytes=tuple(memory)), tmp_path, {"column_sums": column_sums})
