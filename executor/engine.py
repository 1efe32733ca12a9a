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

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from executor import kernels as elementwise
from executor.blocks import chunks
from executor.buffers import SlabPool, WholeTensors
from executor.checksums import checksum
from executor.errors import RunError
from executor.journal import Journal
from executor.local import allow_open_files
from executor.memory import give_back_what_is_freed, peak_resident_nbytes
from executor.reader import SourceReader
from executor.resuming import Work, remaining
from executor.routing import Alias, Part, Piece, route
from executor.torch_threads import TorchThreads
from executor.weights import FileMatrix, Matrix, MeanMatrix, Weights, WholeMatrix
from executor.writer import ShardWriter
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
    MeanView,
    Plan,
    Root,
    Step,
    StreamStep,
    ZeroRoot,
    read_once,
)

if TYPE_CHECKING:
    import torch

Kernel = Callable[..., None]
"""`kernel(params, inputs, output)` computes the tensor `output` in place, from the tensors `inputs`. `params` is the
kernel step's JSON, parsed. Where the step works on blocks, a fourth argument is its `Weights`. In a run without torch
tensors are numpy's arrays."""

SYNC_SECONDS = 10.0
"""How often what is written is put on the disk for good: the most work that a machine that goes down can lose."""

SWITCH_SECONDS = 0.0002
"""How long an import in the background may keep the interpreter from a worker whose chunk the disk waits for. Python's
own 5 ms are longer than what it takes to write a chunk."""

_Chunks = deque[Future[tuple[int, int]]]
"""Chunks under way, in order. Each comes to the bytes read from and written to files."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `doing` says what runs now, where it is not copying."""

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
    checksums: dict[FileSink, int]
    seconds: float
    peak_buffer_nbytes: int
    peak_resident_nbytes: int


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
    threads: int = 1,
    imports: Sequence[str] = ("torch",),
) -> RunResult:
    """Write the plan's shards into `directory`, which exists, and wait until they are on the disk.

    `kernels` are the functions for the plan's kernel steps, by name, which compute in up to `threads` threads and use
    the modules `imports`: torch and others, or none. (Low-rank products take torch, too.) What `journal` says is
    finished is not done again. Without `share_extents` every output tensor gets physical extents of its own, also where
    the file system could share them. With `check_sources` everything is read a second time, and must be the same.
    `headers` are sent to the hosts of remote sources, so credentials are no part of a plan. Raises RunError when a
    source changed or cannot be read, or when the disk is full or fails; what was written until then stays where it is.
    """
    started = time.monotonic()
    journal = journal or Journal()
    allow_open_files(2 * len(plan.sources) + 2 * len(plan.shards))
    if any(step.workspace_nbytes for step in plan.kernels):
        give_back_what_is_freed()
    torch_threads = TorchThreads(plan, threads, imports)
    with (
        _switching_every(SWITCH_SECONDS),
        closing(SourceReader(plan.sources, headers)) as reader,
        closing(_shards(directory, plan, journal)) as writer,
        ThreadPoolExecutor(1) as syncer,
        ThreadPoolExecutor(plan.pool.workers) as workers,
        ThreadPoolExecutor(
            max((step.workers for step in plan.kernels), default=1), initializer=torch_threads.use_one
        ) as kernel_workers,
    ):
        routes = route(plan, reader, writer, directory if share_extents else None)
        work = remaining(plan, routes, journal)
        engine = _Run(
            plan,
            work,
            reader,
            writer,
            workers,
            kernel_workers,
            syncer,
            journal,
            torch_threads,
            kernels or {},
            on_progress,
            check_sources,
        )
        engine.written_nbytes += routes.shortcut_nbytes + work.finished_nbytes
        try:
            engine.run_steps(routes.aliases)
        except BaseException:
            reader.interrupt()
            workers.shutdown(wait=True, cancel_futures=True)
            raise
        engine.report("syncing")
        engine.finish()
        reader.check_unchanged()
        return RunResult(
            read_nbytes=engine.read_nbytes,
            written_nbytes=engine.written_nbytes,
            nbytes_by_path=dict(writer.nbytes) | ({"resumed": n} if (n := work.finished_nbytes) else {}),
            checksums=_checksums(plan, journal),
            seconds=time.monotonic() - started,
            peak_buffer_nbytes=engine.peak_buffer_nbytes,
            peak_resident_nbytes=peak_resident_nbytes(),
        )


def _checksums(plan: Plan, journal: Journal) -> dict[FileSink, int]:
    """Those of whole streams. Of one that an earlier run began, and this one shared, there is a part."""
    numel: dict[FileSink, int] = {}
    for step in plan.steps:
        if isinstance(step, StreamStep):
            for branch in step.branches:
                numel |= {sink: step.numel for sink in branch.sinks if isinstance(sink, FileSink)}
    streams = journal.finished.streams.items()
    return {content: stream.checksum for content, stream in streams if stream.numel == numel.get(content)}


@contextmanager
def _switching_every(seconds: float) -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _shards(directory: Path, plan: Plan, journal: Journal) -> ShardWriter:
    """The shards in `directory`. Where one is not there any more, nothing that the journal says of them counts."""
    if not all(_has_size(directory / shard.filename, shard.nbytes) for shard in plan.shards):
        journal.forget_streams()
    return ShardWriter(directory, plan.shards)


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


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
        reader: SourceReader,
        writer: ShardWriter,
        workers: ThreadPoolExecutor,
        kernel_workers: ThreadPoolExecutor,
        syncer: ThreadPoolExecutor,
        journal: Journal,
        torch_threads: TorchThreads,
        kernels: Mapping[str, Kernel],
        on_progress: Callable[[Progress], None] | None,
        check_sources: bool,
    ) -> None:
        self._plan = plan
        self._work = work
        self._torch = torch_threads
        self._reader = reader
        self._writer = writer
        self._workers = workers
        self._kernel_workers = kernel_workers
        self._syncer = syncer
        self._journal = journal
        self._kernels = kernels
        self._on_progress = on_progress
        self._check_sources = check_sources
        self._slabs = SlabPool(plan.pool.workers, plan.pool.slab_nbytes)
        self._tensors = WholeTensors(plan.buffer_nbytes, plan.tensors_nbytes)
        self._lock = Lock()
        self._stopping = Event()
        self._error: BaseException | None = None
        self._syncing: Future[None] | None = None
        self._synced = time.monotonic()
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
        kernel, last = None, -1
        with ThreadPoolExecutor(1) as kernels:
            try:
                for index in indices:
                    step = self._plan.steps[index]
                    forecast = self._plan.memory_nbytes[index] if _needs_whole_tensors(step) else self._plan.peak_nbytes
                    if isinstance(step, KernelStep):
                        self._finish(under_way)
                        kernel, last = kernels.submit(self._run_kernel, index, step, forecast), index + step.beside
                    else:
                        self._run_stream(under_way, step, self._work.pieces.get(index, ()), forecast)
                    if kernel is not None and index == last:
                        kernel.result()
                    if step.frees:
                        self._finish(under_way)
                        self._free(step.frees)
                self._finish(under_way)
            except BaseException as error:
                self._stop(error)
                raise

    def _stop(self, error: BaseException) -> BaseException:
        """End both parts, wherever they wait; returns the first error that there was, which the run ends with."""
        with self._lock:
            self._error = self._error or error
        self._stopping.set()
        self._reader.interrupt()
        return self._error

    def report(self, doing: str = "") -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(self.read_nbytes, self.written_nbytes, doing))

    def finish(self) -> None:
        """Put everything on the disk. Raises RunError where that failed at any time: the system says so once."""
        if self._syncing is not None:
            self._syncing.result()
        self._make_durable()

    def _make_durable(self) -> None:
        """Put everything that is written on the disk, and have the journal say so."""
        position = self._journal.position
        try:
            self._writer.sync()
        except RunError:
            self._journal.distrust()
            raise
        self._journal.mark_safe(position)

    def _make_durable_now_and_then(self) -> None:
        if self._syncing is not None and self._syncing.done():
            self._syncing.result()
            self._syncing, self._synced = None, time.monotonic()
        if self._syncing is None and time.monotonic() - self._synced > SYNC_SECONDS:
            self._syncing = self._syncer.submit(self._make_durable)

    def _free(self, buffers: Sequence[int]) -> None:
        self._tensors.free(buffers)
        for buffer in buffers:
            if buffer in self._work.result_keys:
                self._journal.drop_result(self._work.result_keys[buffer])

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
                self._submit(under_way, self._run_chunk, step, Piece(first, numel, piece.parts))

    def _submit(self, under_way: _Chunks, work: Callable[..., tuple[int, int]], *args: Any) -> None:
        """Have a worker do `work(slab, *args)` as soon as there is a slab for it."""
        self._check_stopping()
        slab = self._slabs.take()
        under_way.append(self._workers.submit(self._with_slab, slab, work, *args))
        while under_way and under_way[0].done():
            self._count(*under_way.popleft().result())

    def _with_slab(self, slab: memoryview, work: Callable[..., tuple[int, int]], *args: Any) -> tuple[int, int]:
        try:
            return work(slab, *args)
        finally:
            self._slabs.give_back(slab)

    def _run_chunk(self, slab: memoryview, step: StreamStep, piece: Piece) -> tuple[int, int]:
        """Read, transform and write one chunk; returns the bytes read from and written to files."""
        root = step.root
        nbytes = piece.numel * root.dtype.itemsize
        at = _chunk_in_page(root, piece)
        chunk, scratch = elementwise.cut(slab, nbytes, at)
        read = written = 0
        if step.factors():
            self._torch.use_one()
        match root:
            case FileRoot(source, offset):
                offset += piece.first * root.dtype.itemsize
                self._reader.read_into(source, offset, slab, at, nbytes)
                read = nbytes
            case MeanRoot(parts):
                total = elementwise.as_array(chunk, root.dtype, piece.numel)
                elementwise.average(parts, piece.first, total, scratch, self._read_checked)
                read = sum(piece.numel * part.dtype.itemsize for part, _ in read_once(parts))
            case BufferRoot(buffer, offset):
                begin = offset + piece.first * root.dtype.itemsize
                chunk = self._tensors.get(buffer)[begin : begin + nbytes]
            case ZeroRoot():
                elementwise.clear(chunk)
        for part in piece.parts:
            data = chunk
            if part.branch.ops:
                first, numel = piece.first, piece.numel
                whole, to = self._tensors.get, _place_in_page(part, first)
                data = elementwise.apply(part.branch.ops, chunk, root.dtype, first, numel, scratch, whole, to)
            written += self._write(step, part, piece.first, piece.numel, data)
        if self._check_sources and isinstance(root, FileRoot):
            self._reader.check_again(root.source, offset, slab, at, nbytes)
        return read, written

    def _read_checked(self, source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
        """Fill `slab[begin : begin + nbytes]` from a source, and see at once whether it is what it should be."""
        self._reader.read_into(source, offset, slab, begin, nbytes)
        if self._check_sources:
            self._reader.check_again(source, offset, slab, begin, nbytes)

    def _write(self, step: StreamStep, part: Part, first: int, numel: int, data: memoryview) -> int:
        """Write elements to all their places; returns how many bytes went to files."""
        itemsize = part.branch.dtype.itemsize
        files = []
        for sink in part.branch.sinks:
            if isinstance(sink, FileSink):
                self._writer.write(sink.shard, sink.offset + first * itemsize, data)
                files.append(sink)
                continue
            begin, end = max(first, sink.first), min(first + numel, sink.first + sink.numel)
            if begin < end:
                offset, nbytes = sink.offset + (begin - sink.first) * itemsize, (end - begin) * itemsize
                at = (begin - first) * itemsize
                self._tensors.get(sink.buffer)[offset : offset + nbytes] = data[at : at + nbytes]
        if part.content is not None:
            self._journal.add_chunk(part.content, first, numel, checksum(data, itemsize, first, step.head_numel), files)
        return len(files) * len(data)

    def _make_alias(self, under_way: _Chunks, alias: Alias) -> None:
        """Share what can be shared, copy the rest."""
        begin, end = self._writer.share(alias.origin, alias.target, alias.nbytes)
        self.written_nbytes += end - begin
        step = self._plan.pool.slab_nbytes
        for start, stop in ((0, begin), (end, alias.nbytes)):
            for at in range(start, stop, step):
                self._submit(under_way, self._copy, alias, at, min(step, stop - at))

    def _copy(self, slab: memoryview, alias: Alias, begin: int, nbytes: int) -> tuple[int, int]:
        self._writer.read_back(alias.origin.shard, alias.origin.offset + begin, slab[:nbytes])
        self._writer.write(alias.target.shard, alias.target.offset + begin, slab[:nbytes])
        return 0, nbytes

    def _run_kernel(self, index: int, step: KernelStep, forecast: int) -> None:
        result = step.output.buffer
        if index in self._work.restored:
            self._journal.load_result(self._work.result_keys[result], self._tensors.get(result))
            self._check_forecast(forecast)
        if index not in self._work.kernels:
            return
        self.report(step.kernel)
        self._torch.use_all()
        inputs = [self._view(view) for view in step.inputs]
        output = self._view(step.output)
        self._check_forecast(forecast, step.blocks_nbytes)
        kernel, params = self._kernels[step.kernel], json.loads(step.params)
        if step.block_nbytes:
            kernel(params, inputs, output, self._weights(step))
        else:
            kernel(params, inputs, output)
        if result in self._work.result_keys:
            self._journal.save_result(self._work.result_keys[result], self._tensors.get(result))

    def _weights(self, step: KernelStep) -> Weights:
        return Weights(
            [self._matrix(view) for view in step.weights],
            workers=self._kernel_workers,
            blocks=step.workers,
            threads=self._torch.count,
            block_nbytes=step.block_nbytes,
            check=self._check_stopping,
        )

    def _matrix(self, view: BufferView | FileView | MeanView) -> Matrix:
        def read_into(source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
            self._read_checked(source, offset, slab, begin, nbytes)
            self._count(nbytes, 0)

        match view:
            case BufferView():
                return WholeMatrix(self._tensor(view))
            case FileView():
                return FileMatrix(view.shape, view.dtype, view.offset, partial(read_into, view.source))
            case MeanView():
                return MeanMatrix(view.shape, view.dtype, view.parts, read_into)

    def _view(self, view: BufferView) -> torch.Tensor | elementwise.Array:
        if self._torch.uses_torch:
            return self._tensor(view)
        memory = self._tensors.get(view.buffer)
        return elementwise.as_array(memory, view.dtype, len(memory) // view.dtype.itemsize).reshape(view.shape)

    def _tensor(self, view: BufferView) -> torch.Tensor:
        memory = self._tensors.get(view.buffer)
        return elementwise.as_tensor(memory, view.dtype, len(memory) // view.dtype.itemsize).view(view.shape)

    def _finish(self, under_way: _Chunks) -> None:
        while under_way:
            self._count(*under_way.popleft().result())

    def _count(self, read_nbytes: int, written_nbytes: int) -> None:
        with self._lock:
            self.read_nbytes += read_nbytes
            self.written_nbytes += written_nbytes
            self._make_durable_now_and_then()
            self.report()

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise _StoppedError

    def _check_forecast(self, forecast: int, blocks_nbytes: int = 0) -> None:
        used = self._slabs.nbytes + self._tensors.nbytes + blocks_nbytes
        self.peak_buffer_nbytes = max(self.peak_buffer_nbytes, used + self._tensors.kept_nbytes)
        if used > forecast:
            raise AssertionError(f"buffers take {used} bytes where the plan forecast {forecast}")


def _needs_whole_tensors(step: Step) -> bool:
    """Whether a step runs a kernel, or fills or uses whole tensors."""
    if isinstance(step, KernelStep) or isinstance(step.root, BufferRoot) or step.factors():
        return True
    return any(isinstance(sink, BufferSink) for branch in step.branches for sink in branch.sinks)


def _chunk_in_page(root: Root, piece: Piece) -> int:
    """Where in a page a chunk begins: where it lies in its file, so that it can be read, and written, directly.

    A mean lies where it does in the file that it is written to as it is.
    """
    match root:
        case FileRoot(_, offset, dtype):
            return (offset + piece.first * dtype.itemsize) % PAGE
        case MeanRoot():
            return next((_place_in_page(part, piece.first) for part in piece.parts if not part.branch.ops), 0)
    return 0


def _place_in_page(part: Part, first: int) -> int:
    """Where in a page element `first` begins in the file that it is written to first."""
    for sink in part.branch.sinks:
        if isinstance(sink, FileSink):
            return (sink.offset + first * part.branch.dtype.itemsize) % PAGE
    return 0
