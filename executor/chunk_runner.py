"""What happens to a chunk: it is read, run through the operations of each branch, and written to all its places."""

from __future__ import annotations

from dataclasses import dataclass

from executor import chunk_ops
from executor.buffers import WholeTensors
from executor.checksums import checksum
from executor.errors import OutOfRangeError
from executor.journal import Journal
from executor.reader import SourceReader
from executor.regions import cut
from executor.torch_threads import TorchThreads
from executor.ways import Alias, Part, Piece
from executor.writer import ShardWriter
from planner.expr import DType
from planner.layout import PAGE
from planner.plan import BufferRoot, FileRoot, FileSink, MeanRoot, Root, StreamStep, ZeroRoot, read_once


@dataclass(frozen=True)
class ChunkRunner:
    """Runs chunks, each in a slab of memory that is its own meanwhile, from any number of threads.

    With `check_sources` everything is read a second time, and must be the same.
    """

    reader: SourceReader
    writer: ShardWriter
    tensors: WholeTensors
    journal: Journal
    torch_threads: TorchThreads
    check_sources: bool

    def run(self, slab: memoryview, step: StreamStep, piece: Piece) -> tuple[int, int]:
        """Run one chunk, and have the journal know; returns the bytes read from and written to files."""
        root = step.root
        nbytes = piece.numel * root.dtype.itemsize
        at = _chunk_offset_in_page(root, piece)
        chunk, scratch = cut(slab, nbytes, at)
        read = written = 0
        if step.factors():
            self.torch_threads.use_one()
        match root:
            case FileRoot(source, offset):
                offset += piece.first * root.dtype.itemsize
                self.read_into(source, offset, slab, at, nbytes)
                read = nbytes
            case MeanRoot(parts):
                total = chunk_ops.as_array(chunk, root.dtype, piece.numel)
                chunk_ops.average(parts, piece.first, total, scratch, self.read_into)
                read = sum(piece.numel * part.dtype.itemsize for part, _ in read_once(parts))
            case BufferRoot(buffer, offset):
                begin = offset + piece.first * root.dtype.itemsize
                chunk = self.tensors.get(buffer)[begin : begin + nbytes]
            case ZeroRoot():
                chunk_ops.clear(chunk)
        for part in piece.parts:
            data = chunk
            if part.branch.ops:
                first, numel = piece.first, piece.numel
                whole, to = self.tensors.get, _offset_in_page(part, first)
                data = chunk_ops.apply(part.branch.ops, chunk, root.dtype, first, numel, scratch, whole, to)
                if part.branch.dtype is DType.F16 and not chunk_ops.is_finite(data):
                    self._check_range(part, chunk_ops.as_array(chunk, root.dtype, numel), data)
            written += self._write(step, part, piece.first, piece.numel, data)
        return read, written

    def copy(self, slab: memoryview, alias: Alias, begin: int, nbytes: int) -> tuple[int, int]:
        """Copy a part of what an alias could not share; returns what `run` does, with no bytes read."""
        self.writer.read_back(alias.origin.shard, alias.origin.offset + begin, slab[:nbytes])
        self.writer.write(alias.target.shard, alias.target.offset + begin, slab[:nbytes])
        return 0, nbytes

    def read_into(self, source: int, offset: int, slab: memoryview, begin: int, nbytes: int) -> None:
        """Fill `slab[begin : begin + nbytes]` from a source, and see at once whether it is what it should be."""
        self.reader.read_into(source, offset, slab, begin, nbytes)
        if self.check_sources:
            self.reader.check_again(source, offset, slab, begin, nbytes)

    def _check_range(self, part: Part, chunk: chunk_ops.Array, data: memoryview) -> None:
        """Raises OutOfRangeError where a number of a chunk has no place in float16."""
        file = next((sink for sink in part.branch.sinks if isinstance(sink, FileSink)), None)
        if file is not None and chunk_ops.overflows(chunk, chunk_ops.as_array(data, DType.F16, len(chunk))):
            raise OutOfRangeError(
                f"{self.writer.tensor(file)}: has weights beyond 65,504, the largest number in float16: they would be "
                "infinite"
            )

    def _write(self, step: StreamStep, part: Part, first: int, numel: int, data: memoryview) -> int:
        """Write elements to all their places; returns how many bytes went to files."""
        itemsize = part.branch.dtype.itemsize
        files = []
        for sink in part.branch.sinks:
            if isinstance(sink, FileSink):
                self.writer.write(sink.shard, sink.offset + first * itemsize, data)
                files.append(sink)
                continue
            begin, end = max(first, sink.first), min(first + numel, sink.first + sink.numel)
            if begin < end:
                offset, nbytes = sink.offset + (begin - sink.first) * itemsize, (end - begin) * itemsize
                at = (begin - first) * itemsize
                chunk_ops.copy(data[at : at + nbytes], self.tensors.get(sink.buffer)[offset : offset + nbytes])
        if part.content is not None:
            self.journal.add_chunk(part.content, first, numel, checksum(data, itemsize, first, step.head_numel), files)
        return len(files) * len(data)


def _chunk_offset_in_page(root: Root, piece: Piece) -> int:
    """Where in a page a chunk begins: where it lies in its file, so that it can be read, and written, directly.

    A mean lies where it does in the file that it is written to as it is.
    """
    match root:
        case FileRoot(_, offset, dtype):
            return (offset + piece.first * dtype.itemsize) % PAGE
        case MeanRoot():
            return next((_offset_in_page(part, piece.first) for part in piece.parts if not part.branch.ops), 0)
    return 0


def _offset_in_page(part: Part, first: int) -> int:
    """Where in a page element `first` begins in the file that it is written to first."""
    for sink in part.branch.sinks:
        if isinstance(sink, FileSink):
            return (sink.offset + first * part.branch.dtype.itemsize) % PAGE
    return 0
