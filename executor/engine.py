"""Running a plan.

Streams are cut into chunks, and chunks are independent of each other: each says where it is read, what is done to it
and where it goes. So a few workers take them in the plan's order, one slab of memory each, and reading, computing and
writing overlap without any queue between them. Taking a slab waits until one is free, which bounds the memory of a run
whatever the size of a tensor. A kernel waits for the chunks before it, since it needs whole tensors.
"""

from __future__ import annotations

import json
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor import kernels as elementwise
from executor.buffers import SlabPool, WholeTensors
from executor.memory import peak_resident_nbytes
from executor.reader import SourceReader
from executor.routing import Alias, Piece, Routes, route
from executor.torch_threads import TorchThreads
from executor.writer import ShardWriter
from planner.expr import AddNoise
from planner.layout import PAGE
from planner.plan import (
    BufferRoot,
    BufferSink,
    BufferView,
    FileRoot,
    FileSink,
    KernelStep,
    Plan,
    Root,
    StreamStep,
    ZeroRoot,
)

if TYPE_CHECKING:
    import torch

Kernel = Callable[[Any, Sequence["torch.Tensor"], "torch.Tensor"], None]
"""`kernel(params, inputs, output)` computes `output` in place. `params` is the kernel step's JSON, parsed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. `doing` says what runs now, where it is not copying."""

    read_nbytes: int
    written_nbytes: int
    doing: str


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did. `nbytes_by_path` says how the output's bytes got there: "direct", "buffered", "reflinked" …"""

    read_nbytes: int
    written_nbytes: int
    nbytes_by_path: dict[str, int]
    seconds: float
    peak_buffer_nbytes: int
    peak_resident_nbytes: int


def run(
    plan: Plan,
    directory: Path,
    kernels: Mapping[str, Kernel] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    share_extents: bool = True,
) -> RunResult:
    """Write the plan's shards into `directory`, which exists, and wait until they are on the disk.

    `kernels` are the functions for the plan's kernel steps, by name. Without `share_extents` every output tensor gets
    physical extents of its own, also where the file system could share them. Raises RunError when a source changed or
    cannot be read, or when the disk is full or fails; what was written until then stays where it is.
    """
    started = time.monotonic()
    _allow_open_files(len(plan.sources) + 2 * len(plan.shards))
    with (
        closing(SourceReader(plan.sources)) as reader,
        closing(ShardWriter(directory, plan.shards)) as writer,
        ThreadPoolExecutor(plan.pool.workers) as workers,
    ):
        engine = _Run(plan, reader, writer, workers, kernels or {}, on_progress)
        try:
            engine.run_steps(route(plan, reader, writer, directory if share_extents else None))
        except BaseException:
            workers.shutdown(wait=True, cancel_futures=True)
            raise
        engine.report("syncing")
        writer.sync()
        reader.check_unchanged()
        return RunResult(
            read_nbytes=engine.read_nbytes,
            written_nbytes=engine.written_nbytes,
            nbytes_by_path=dict(writer.nbytes),
            seconds=time.monotonic() - started,
            peak_buffer_nbytes=engine.peak_buffer_nbytes,
            peak_resident_nbytes=peak_resident_nbytes(),
        )


class _Run:
    """A run under way."""

    def __init__(
        self,
        plan: Plan,
        reader: SourceReader,
        writer: ShardWriter,
        workers: ThreadPoolExecutor,
        kernels: Mapping[str, Kernel],
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._plan = plan
        self._torch = TorchThreads(plan)
        self._reader = reader
        self._writer = writer
        self._workers = workers
        self._kernels = kernels
        self._on_progress = on_progress
        self._slabs = SlabPool(plan.pool.workers, plan.pool.slab_nbytes)
        self._tensors = WholeTensors(plan.buffer_nbytes)
        self._under_way: deque[Future[tuple[int, int]]] = deque()
        self.read_nbytes = 0
        self.written_nbytes = sum(shard.data_start for shard in plan.shards)
        self.peak_buffer_nbytes = 0

    def run_steps(self, routes: Routes) -> None:
        self.written_nbytes += routes.shortcut_nbytes
        for index, (step, forecast) in enumerate(zip(self._plan.steps, self._plan.memory_nbytes, strict=True)):
            if isinstance(step, KernelStep):
                self._finish_chunks()
                self._run_kernel(step, forecast)
            else:
                self._run_stream(step, routes.pieces[index], forecast)
            if step.frees:
                self._finish_chunks()
                self._tensors.free(step.frees)
        self._finish_chunks()
        for alias in routes.aliases:
            self._make_alias(alias)
        self._finish_chunks()

    def report(self, doing: str = "") -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(self.read_nbytes, self.written_nbytes, doing))

    def _run_stream(self, step: StreamStep, pieces: Sequence[Piece], forecast: int) -> None:
        for branch in step.branches:
            for sink in branch.sinks:
                if isinstance(sink, BufferSink):
                    self._tensors.get(sink.buffer)
        self._check_forecast(forecast)
        for piece in pieces:
            for chunk in _chunks(piece, step.chunk_numel):
                self._submit(self._run_chunk, step.root, chunk)

    def _submit(self, work: Callable[..., tuple[int, int]], *args: Any) -> None:
        """Have a worker do `work(slab, *args)` as soon as there is a slab for it."""
        slab = self._slabs.take()
        self._under_way.append(self._workers.submit(self._with_slab, slab, work, *args))
        while self._under_way and self._under_way[0].done():
            self._count(self._under_way.popleft())

    def _with_slab(self, slab: memoryview, work: Callable[..., tuple[int, int]], *args: Any) -> tuple[int, int]:
        try:
            return work(slab, *args)
        finally:
            self._slabs.give_back(slab)

    def _run_chunk(self, slab: memoryview, root: Root, piece: Piece) -> tuple[int, int]:
        """Read, transform and write one chunk; returns the bytes read from and written to files."""
        nbytes = piece.numel * root.dtype.itemsize
        slab = slab[_alignment(piece) :]
        chunk, scratch = elementwise.cut(slab, nbytes)
        read = written = 0
        match root:
            case FileRoot(source, offset):
                self._reader.read_into(source, offset + piece.first * root.dtype.itemsize, chunk)
                read = nbytes
            case BufferRoot(buffer, offset):
                begin = offset + piece.first * root.dtype.itemsize
                chunk = self._tensors.get(buffer)[begin : begin + nbytes]
            case ZeroRoot():
                elementwise.clear(chunk)
        for branch in piece.branches:
            data = chunk
            if branch.ops:
                self._torch.use_one()
                data = elementwise.apply(branch.ops, chunk, root.dtype, piece.first, piece.numel, scratch)
            for sink in branch.sinks:
                offset = sink.offset + piece.first * branch.dtype.itemsize
                if isinstance(sink, FileSink):
                    self._writer.write(sink.shard, offset, data)
                    written += len(data)
                else:
                    self._tensors.get(sink.buffer)[offset : offset + len(data)] = data
        return read, written

    def _make_alias(self, alias: Alias) -> None:
        """Share what can be shared, copy the rest."""
        begin, end = self._writer.share(alias.origin, alias.target, alias.nbytes)
        self.written_nbytes += end - begin
        step = self._plan.pool.slab_nbytes
        for start, stop in ((0, begin), (end, alias.nbytes)):
            for at in range(start, stop, step):
                self._submit(self._copy, alias, at, min(step, stop - at))

    def _copy(self, slab: memoryview, alias: Alias, begin: int, nbytes: int) -> tuple[int, int]:
        self._writer.read_back(alias.origin.shard, alias.origin.offset + begin, slab[:nbytes])
        self._writer.write(alias.target.shard, alias.target.offset + begin, slab[:nbytes])
        return 0, nbytes

    def _run_kernel(self, step: KernelStep, forecast: int) -> None:
        self.report(step.kernel)
        self._torch.use_all()
        inputs = [self._view(view) for view in step.inputs]
        output = self._view(step.output)
        self._check_forecast(forecast)
        self._kernels[step.kernel](json.loads(step.params), inputs, output)

    def _view(self, view: BufferView) -> torch.Tensor:
        memory = self._tensors.get(view.buffer)
        numel = len(memory) // view.dtype.itemsize
        return elementwise.as_tensor(memory, view.dtype, numel).view(view.shape)

    def _finish_chunks(self) -> None:
        while self._under_way:
            self._count(self._under_way.popleft())

    def _count(self, chunk: Future[tuple[int, int]]) -> None:
        read, written = chunk.result()
        self.read_nbytes += read
        self.written_nbytes += written
        self.report()

    def _check_forecast(self, forecast: int) -> None:
        used = self._slabs.nbytes + self._tensors.nbytes
        self.peak_buffer_nbytes = max(self.peak_buffer_nbytes, used)
        if used > forecast:
            raise AssertionError(f"buffers take {used} bytes where the plan forecast {forecast}")


def _chunks(piece: Piece, chunk_numel: int) -> Iterator[Piece]:
    """`piece` in chunks. The first is cut so that the others begin at a page of the file they are written to first.

    Not where noise is drawn: noise comes in blocks, and chunks must begin where a block does.
    """
    first, end = piece.first, piece.first + piece.numel
    numel = chunk_numel
    noisy = any(isinstance(op, AddNoise) for branch in piece.branches for op in branch.ops)
    if not noisy and piece.numel > chunk_numel:
        numel -= _alignment(piece) // piece.branches[0].dtype.itemsize
    while first < end:
        yield Piece(first, min(numel, end - first), piece.branches)
        first, numel = first + numel, chunk_numel


def _alignment(piece: Piece) -> int:
    """Where in a page the piece begins in the file that it is written to first."""
    for branch in piece.branches:
        for sink in branch.sinks:
            if isinstance(sink, FileSink):
                return (sink.offset + piece.first * branch.dtype.itemsize) % PAGE
    return 0


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256  # what Python and torch have open is far below
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
