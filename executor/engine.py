"""Running a plan.

Streams are cut into chunks, and chunks are independent of each other: each says where it is read, what is done to it
and where it goes. So a few workers take them in the plan's order, one slab of memory each, and reading, computing and
writing overlap without any queue between them. Taking a slab waits until one is free, which bounds the memory of a run
whatever the size of a tensor. A kernel waits for the chunks before it, since it needs whole tensors.

The steps before the first that has to do with whole tensors need none of the others, and none of the others needs them.
So these two parts of a plan run beside each other, each in its own order: bytes move while kernels compute.

A journal is told of each chunk, when it is written to all its places, and of kernels' results, so that a run that was
interrupted can be gone on with; now and then everything written so far is put on the disk, in the background.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, RLock
from typing import Any

from executor.blocks import chunks
from executor.buffers import SlabPool, WholeTensors
from executor.chunk_runner import ChunkRunner
from executor.durability import Durability
from executor.errors import RunError, starting_threads
from executor.journal import Journal
from executor.kernel_runner import Kernel, KernelRunner
from executor.local import allow_open_files
from executor.memory import give_back_what_is_freed, peak_resident_nbytes
from executor.reader import SourceReader
from executor.resuming import Work, confirm, remaining
from executor.settings import Shared
from executor.torch_threads import TorchThreads
from executor.ways import Alias, Piece, take_shortcuts
from executor.writer import ShardWriter
from planner.plan import BufferRoot, BufferSink, FileSink, KernelStep, Plan, Step, StreamStep

SWITCH_SECONDS = 0.0002
"""How long an import in the background may keep the interpreter from a worker whose chunk the disk waits for. Python's
own 5 ms are longer than what it takes to write a chunk."""

_Chunks = deque[Future[tuple[int, int]]]
"""Chunks under way, in order. Each comes to the bytes read from and written to files."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `doing` says what it takes time for now, where that is not copying: the name of a kernel, for
    one, when everything is copied that waits for none."""

    read_nbytes: int
    written_nbytes: int
    doing: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did. `nbytes_by_path` says how the output's bytes got there: "direct", "buffered", "reflinked" …

    `checksums` has those of the streams that went through memory, by the first place that each goes to; nobody has seen
    the bytes of the others, which were shared with their sources.
    """

    read_nbytes: int
    written_nbytes: int
    nbytes_by_path: dict[str, int]
    checksums: dict[FileSink, int] = field(repr=False)
    seconds: float
    peak_buffer_nbytes: int
    peak_resident_nbytes: int


@starting_threads()
def run(
    plan: Plan,
    directory: Path,
    kernels: Mapping[str, Kernel] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    journal: Journal | None = None,
    share_extents: bool = True,
    check_sources: bool = False,
    headers: Mapping[str, str] | None = None,
    on_wait: Callable[[str, float], None] | None = None,
    threads: int = 1,
    imports: Sequence[str] = ("torch",),
) -> RunResult:
    """Write the plan's shards into `directory`, which exists, and wait until they are on the disk.

    `kernels` are the functions for the plan's kernel steps, by name, which compute in up to `threads` threads and use
    the modules `imports`: torch and others, or none. (Low-rank products take torch, too.) What `journal` says is
    finished is not done again. Without `share_extents` every output tensor gets physical extents of its own, also where
    the file system could share them. With `check_sources` everything is read a second time, and must be the same.
    `headers` are sent to the hosts of remote sources, so credentials are no part of a plan; `on_wait` is told which
    server is waited for long, and how many seconds.

    Raises RunError when a source changed or cannot be read, when the disk is full or fails, or when the system allows
    too few threads; what was written until then stays where it is.
    """
    started = time.monotonic()
    journal = journal or Journal()
    allow_open_files(2 * len(plan.sources) + 2 * len(plan.shards))
    if any(step.workspace_nbytes for step in plan.kernels):
        give_back_what_is_freed()
    torch_threads = TorchThreads(plan, threads, imports)
    confirm(plan, directory, journal)
    tensors = WholeTensors(plan.buffer_nbytes, plan.tensors_nbytes)
    with (
        _switching_often,
        closing(SourceReader(plan.sources, headers, on_wait)) as reader,
        closing(ShardWriter(directory, plan.shards)) as writer,
        ThreadPoolExecutor(1) as syncer,
        ThreadPoolExecutor(plan.pool.workers) as workers,
        ThreadPoolExecutor(
            max((step.workers for step in plan.kernels), default=1), initializer=torch_threads.use_one
        ) as kernel_workers,
    ):
        ways = take_shortcuts(plan, reader, writer, directory if share_extents else None)
        work = remaining(plan, ways, journal)
        chunk_runner = ChunkRunner(reader, writer, tensors, journal, torch_threads, check_sources)
        kernel_runner = KernelRunner(kernels or {}, work.result_keys, tensors, journal, torch_threads, kernel_workers)
        durability = Durability(writer, journal, syncer)
        engine = _Run(plan, work, tensors, chunk_runner, kernel_runner, durability, workers, on_progress)
        engine.written_nbytes += ways.shortcut_nbytes + work.finished_nbytes
        try:
            engine.run_steps(ways.aliases)
            engine.report("syncing")
            durability.finish()
        except BaseException:
            workers.shutdown(wait=True, cancel_futures=True)
            with suppress(RunError):  # it is the first error that tells what happened
                _check_unchanged(reader, journal)
            raise
        _check_unchanged(reader, journal)
        return RunResult(
            read_nbytes=engine.read_nbytes,
            written_nbytes=engine.written_nbytes,
            nbytes_by_path=dict(writer.nbytes) | ({"resumed": n} if (n := work.finished_nbytes) else {}),
            checksums=journal.finished.checksums(plan),
            seconds=time.monotonic() - started,
            peak_buffer_nbytes=engine.peak_buffer_nbytes,
            peak_resident_nbytes=peak_resident_nbytes(),
        )


def _check_unchanged(reader: SourceReader, journal: Journal) -> None:
    """Raises RunError where a source was changed. Nobody knows what was read of it, so nothing that was made counts:
    put back as it was, the source would be that of the journal again."""
    try:
        reader.check_unchanged()
    except RunError:
        journal.forget()
        raise


@Shared
@contextmanager
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def finished(plan: Plan) -> RunResult:
    """The result of a run that finds everything done."""
    return RunResult(
        read_nbytes=0,
        written_nbytes=plan.written_nbytes,
        nbytes_by_path={"resumed": plan.written_nbytes},
        checksums={},
        seconds=0.0,
        peak_buffer_nbytes=0,
        peak_resident_nbytes=peak_resident_nbytes(),
    )


class _StoppedError(Exception):
    """Another part of the run failed."""


class _Run:
    """A run under way."""

    def __init__(
        self,
        plan: Plan,
        work: Work,
        tensors: WholeTensors,
        chunks: ChunkRunner,
        kernels: KernelRunner,
        durability: Durability,
        workers: Executor,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._plan = plan
        self._work = work
        self._tensors = tensors
        self._chunks = chunks
        self._kernels = kernels
        self._durability = durability
        self._workers = workers
        self._on_progress = on_progress
        self._slabs = SlabPool(plan.pool.workers, plan.pool.slab_nbytes)
        self._lock = RLock()
        self._stopping = Event()
        self._error: BaseException | None = None
        self._is_copying = True
        self._kernel = ""
        self.read_nbytes = 0
        self.written_nbytes = sum(shard.data_start for shard in plan.shards)
        self.peak_buffer_nbytes = 0

    def run_steps(self, aliases: Sequence[Alias]) -> None:
        steps = self._plan.steps
        first = next((i for i, step in enumerate(steps) if _needs_whole_tensors(step)), len(steps))
        with ThreadPoolExecutor(1) as beside:
            others = beside.submit(self._run_part, range(first, len(steps)))
            try:
                self._run_part(range(first))
                self._is_copying = False
                self.report()
                others.result()
            except BaseException as error:
                first_error = self._stop(error)
                if first_error is not error:
                    raise first_error from first_error.__cause__
                raise
        under_way = _Chunks()
        for alias in aliases:
            self._make_alias(under_way, alias)
        self._finish(under_way)

    def _run_part(self, indices: range) -> None:
        """Run these steps in order, kernels beside the streams that may. When they fail, the other part is stopped."""
        under_way = _Chunks()
        unneeded: list[int] = []
        kernel, last = None, -1
        with ThreadPoolExecutor(1) as kernels:
            try:
                for index in indices:
                    step = self._plan.steps[index]
                    forecast = self._plan.memory_nbytes[index] if _needs_whole_tensors(step) else self._plan.peak_nbytes
                    if isinstance(step, KernelStep):
                        self._finish(under_way)
                        self._kernels.drop_results(unneeded)
                        unneeded.clear()
                        kernel, last = kernels.submit(self._run_kernel, index, step, forecast), index + step.beside
                    else:
                        self._run_stream(under_way, step, self._work.pieces.get(index, ()), forecast)
                    if kernel is not None and index == last:
                        kernel.result()
                    if step.frees:
                        self._finish(under_way)
                        self._tensors.free(step.frees)
                        unneeded += step.frees  # and saved no more when what was made of it is written, if need be
                self._finish(under_way)
                self._kernels.drop_results(unneeded)
            except BaseException as error:
                self._stop(error)
                raise

    def _stop(self, error: BaseException) -> BaseException:
        """End both parts, wherever they wait; returns the first error that there was, which the run ends with."""
        with self._lock:
            self._error = self._error or error
        self._stopping.set()
        self._chunks.reader.interrupt()
        return self._error

    def report(self, doing: str = "") -> None:
        """Say how far the run is, one thread at a time."""
        if self._on_progress is not None:
            with self._lock:
                doing = doing or ("" if self._is_copying else self._kernel)
                self._on_progress(Progress(self.read_nbytes, self.written_nbytes, doing))

    def _run_stream(self, under_way: _Chunks, step: StreamStep, pieces: Sequence[Piece], forecast: int) -> None:
        for piece in pieces:
            for part in piece.parts:
                for sink in part.branch.sinks:
                    if isinstance(sink, BufferSink):
                        self._tensors.get(sink.buffer)
        self._check_forecast(forecast)
        if step.factors():
            self._finish(under_way)
        for piece in pieces:
            for first, numel in chunks(piece.first, piece.numel, step.head_numel, step.chunk_numel):
                self._submit(under_way, self._chunks.run, step, Piece(first, numel, piece.parts))

    def _submit(self, under_way: _Chunks, work: Callable[..., tuple[int, int]], *args: Any) -> None:
        """Have a worker do `work(slab, *args)` as soon as there is a slab for it."""
        slab = self._slabs.take()
        try:
            self._check_stopping()
            under_way.append(self._workers.submit(self._with_slab, slab, work, *args))
        except BaseException as error:
            # The other part may wait for this slab, and is not to use it: where no thread could be started for this
            # work, one that there is may do it all the same.
            self._stop(error)
            self._slabs.give_back(slab)
            raise
        while under_way and under_way[0].done():
            self._count(*under_way.popleft().result())

    def _with_slab(self, slab: memoryview, work: Callable[..., tuple[int, int]], *args: Any) -> tuple[int, int]:
        try:
            return work(slab, *args)
        finally:
            self._slabs.give_back(slab)

    def _make_alias(self, under_way: _Chunks, alias: Alias) -> None:
        """Share what can be shared, copy the rest."""
        begin, end = self._chunks.writer.share(alias.origin, alias.target, alias.nbytes)
        self.written_nbytes += end - begin
        step = self._plan.pool.slab_nbytes
        for start, stop in ((0, begin), (end, alias.nbytes)):
            for at in range(start, stop, step):
                self._submit(under_way, self._chunks.copy, alias, at, min(step, stop - at))

    def _run_kernel(self, index: int, step: KernelStep, forecast: int) -> None:
        try:
            if index in self._work.restored:
                self._kernels.restore(step)
                self._check_forecast(forecast)
            if index in self._work.kernels:
                self._kernel = step.kernel
                self.report()
                run = self._kernels.prepare(step, self._read_block, self._check_kernel)
                self._check_forecast(forecast, step.blocks_nbytes)
                run()
                self._kernel = ""
        except BaseException as error:
            self._stop(error)  # so that the streams beside it are not waited for
            raise

    def _read_block(self, source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
        self._chunks.read_into(source, offset, slab, begin, nbytes)
        self._count(nbytes, 0)

    def _finish(self, under_way: _Chunks) -> None:
        while under_way:
            self._count(*under_way.popleft().result())

    def _count(self, read_nbytes: int, written_nbytes: int) -> None:
        with self._lock:
            self.read_nbytes += read_nbytes
            self.written_nbytes += written_nbytes
            self._durability.now_and_then()
            self.report()

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise _StoppedError

    def _check_kernel(self) -> None:
        """Called before each block of a kernel, which may be all that happens for a long time."""
        self._check_stopping()
        with self._lock:
            self._durability.now_and_then()
            self.report()

    def _check_forecast(self, forecast: int, blocks_nbytes: int = 0) -> None:
        tensors, kept = self._tensors.nbytes
        used = self._slabs.nbytes + tensors + blocks_nbytes
        with self._lock:
            self.peak_buffer_nbytes = max(self.peak_buffer_nbytes, used + kept)
        if used > forecast:
            raise AssertionError(f"buffers take {used} bytes where the plan forecast {forecast}")


def _needs_whole_tensors(step: Step) -> bool:
    """Whether a step runs a kernel, or fills or uses whole tensors."""
    if isinstance(step, KernelStep) or isinstance(step.root, BufferRoot) or step.factors():
        return True
    return any(isinstance(sink, BufferSink) for branch in step.branches for sink in branch.sinks)
