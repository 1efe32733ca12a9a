"""Running plans on real files: how far a run is, how much it takes, what happens when files and threads misbehave."""

import errno
import itertools
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from plans import column_sums, digest, load, planned, source

from executor import engine, writer
from executor.buffers import SlabPool
from executor.chunk_runner import ChunkRunner
from executor.engine import Progress, run
from executor.errors import RunError
from executor.reader import SourceReader
from executor.ways import Piece, physical_nbytes
from executor.weights import Weights
from planner.expr import DType, Expr, Opaque, Read
from planner.plan import KernelStep, StreamStep


def test_progress_ends_at_all_bytes_read_and_written(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    seen: list[Progress] = []
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", {"column_sums": column_sums}, seen.append)
    assert "column_sums" in {state.doing for state in seen}
    assert [state.doing for state in seen[-2:]] == ["", "syncing"]  # when the last results are copied
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


def test_a_kernel_whose_weights_are_in_memory_is_shown_to_go_on_with_each_block(tmp_path: Path) -> None:
    reads = source(tmp_path / "source.safetensors", {"a": torch.randn(600, 1000)})
    kernel = Opaque("slow", "0", (), DType.F32, (10,), weights=(reads["a"],), block_nbytes=1 << 20)
    plan = planned({"copy": reads["a"], "sums": kernel}, budget=64 << 20)
    seen: list[str] = []
    within = []

    def slow(params: object, inputs: object, output: torch.Tensor, weights: Weights) -> None:
        output.zero_()
        before = len(seen)
        weights.for_each_block(weights.matrices[0], 100, lambda begin, block: None)
        within.extend(seen[before:])

    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out", {"slow": slow}, lambda state: seen.append(state.doing))
    assert plan.reread_nbytes == 0
    assert within[-5:] == ["slow"] * 5  # of six


def test_a_kernel_computes_in_as_many_threads_as_there_may_be_and_each_of_its_blocks_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = source(tmp_path / "source.safetensors", {"a": torch.ones(20, 1000)})["a"]
    kernel = Opaque("kernel", "0", (), DType.F32, (10,), weights=(weights,), block_nbytes=1 << 20)
    asked_for: dict[int, int] = {}
    seen: list[int | None] = []

    def compute(params: object, inputs: object, output: torch.Tensor, weights: Weights) -> None:
        seen.append(asked_for.get(threading.get_ident()))
        weights.for_each_block(
            weights.matrices[0], 10, lambda begin, block: seen.append(asked_for.get(threading.get_ident()))
        )
        output.zero_()

    monkeypatch.setattr(torch, "set_num_threads", lambda count: asked_for.update({threading.get_ident(): count}))
    run(planned({"sums": kernel}), tmp_path, {"kernel": compute}, threads=4)
    assert seen == [4, 1, 1]


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


def test_a_chunk_that_no_thread_could_be_started_for_shares_its_slab_with_no_other(
    tmp_path: Path, reads: dict[str, Read], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may run all the same, in a thread that there is already."""
    sums = Opaque("column_sums", "1", (reads["other"],), DType.F32, (1000,))
    plan = planned({"copy": reads["large"], "sums": sums}, budget=9_600_000)
    assert plan.pool.workers == 3
    run_chunk, take, give_back, start = ChunkRunner.run, SlabPool.take, SlabPool.give_back, threading.Thread.start
    two_run, go_on, taken = Event(), Event(), itertools.count()
    workers: set[int] = set()
    running: list[memoryview] = []
    shared: list[memoryview] = []

    def taking(self: SlabPool) -> memoryview:
        slab = take(self)
        assert next(taken) < 2 or two_run.wait(30)
        return slab

    def noting(self: ChunkRunner, slab: memoryview, step: StreamStep, piece: Piece) -> tuple[int, int]:
        shared.extend(other for other in running if other is slab)
        workers.add(threading.get_ident())
        running.append(slab)
        if len(workers) == 2:
            two_run.set()
        assert go_on.wait(30)
        time.sleep(0.1)
        try:
            return run_chunk(self, slab, step, piece)
        finally:
            running.remove(slab)

    def giving_back(self: SlabPool, slab: memoryview) -> None:
        give_back(self, slab)
        if threading.get_ident() not in workers:
            time.sleep(0.2)  # in which the other part may take it
            go_on.set()
            time.sleep(0.5)  # in which both chunks may run, before what waits is dropped

    def limited(self: threading.Thread) -> None:
        if two_run.is_set():
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(ChunkRunner, "run", noting)
    monkeypatch.setattr(SlabPool, "take", taking)
    monkeypatch.setattr(SlabPool, "give_back", giving_back)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RunError, match="start no more threads"):
        run(plan, tmp_path, {"column_sums": column_sums})
    assert shared == []


def test_buffers_that_take_more_than_the_plan_forecast_end_the_run(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    kernel = next(index for index, step in enumerate(plan.steps) if isinstance(step, KernelStep))
    memory = [nbytes - (index == kernel) for index, nbytes in enumerate(plan.memory_nbytes)]
    with pytest.raises(AssertionError, match=rf"where the plan forecast {memory[kernel]}$"):
        run(replace(plan, memory_nbytes=tuple(memory)), tmp_path, {"column_sums": column_sums})
