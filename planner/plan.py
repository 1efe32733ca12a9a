"""The plan: what the executor does, as plain data. JSON in, JSON out, equal for equal inputs.

Files and buffers are named by their index in `Plan.sources`, `Plan.shards` and `Plan.buffer_nbytes`.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import cache
from itertools import groupby
from typing import Any, cast, get_args, get_origin, get_type_hints

from planner.errors import UserError
from planner.expr import DType, Op, Shape, Source, field_names
from planner.layout import Shard

FORMAT = 6


@dataclass(frozen=True, slots=True)
class FileRoot:
    """A stream's elements lie at byte `offset` of source file `source`."""

    source: int
    offset: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class MeanRoot:
    """A stream's elements are the means of those of `parts`, in float32: added up in their order, then divided."""

    parts: tuple[FileRoot, ...]

    @property
    def dtype(self) -> DType:
        return DType.F32


@dataclass(frozen=True, slots=True)
class BufferRoot:
    """A stream's elements lie at byte `offset` of buffer `buffer`."""

    buffer: int
    offset: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class ZeroRoot:
    """A stream's elements are zero."""

    dtype: DType


Root = FileRoot | MeanRoot | BufferRoot | ZeroRoot


def read_once(parts: Iterable[FileRoot]) -> Iterator[tuple[FileRoot, int]]:
    """The parts of a mean as they are read, each with the times that it counts: what follows itself is read once."""
    for part, same in groupby(parts):
        yield part, sum(1 for _ in same)


def _reads(root: Root, numel: int) -> Iterator[tuple[FileRoot, int]]:
    """Each range that is read from a source for `numel` elements of `root`, with its size in bytes."""
    match root:
        case FileRoot():
            parts: tuple[FileRoot, ...] = (root,)
        case MeanRoot():
            parts = root.parts
        case _:
            parts = ()
    for part, _ in read_once(parts):
        yield part, numel * part.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileSink:
    """A stream's results go to byte `offset` of shard `shard`."""

    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class BufferSink:
    """`numel` of a stream's results, from element `first` on, go to byte `offset` of buffer `buffer`."""

    buffer: int
    offset: int
    first: int
    numel: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """Add the product of float32 matrices, in float32: buffer `b` `[rows, rank]` times buffer `a` `[rank, columns]`.

    A stream's elements are those of a matrix `[rows, columns]`, row after row.
    """

    b: int
    a: int
    rank: int
    columns: int


ChunkOp = Op | LowRank


@dataclass(frozen=True, slots=True)
class Branch:
    """`ops`, fused, turn a stream's elements into elements of `dtype`, which go to each of `sinks`."""

    ops: tuple[ChunkOp, ...]
    dtype: DType
    sinks: tuple[FileSink | BufferSink, ...]

    def factors(self) -> set[int]:
        """The buffers whose products are added on the way."""
        return {buffer for op in self.ops if isinstance(op, LowRank) for buffer in (op.b, op.a)}


@dataclass(frozen=True, slots=True)
class StreamStep:
    """Read `numel` elements once, in chunks of `chunk_numel`, and run each chunk through every branch.

    The first block has `head_numel` elements, every other one `planner.expr.BLOCK`; chunks are whole blocks. `frees`
    are the buffers that nothing needs afterwards.
    """

    root: Root
    numel: int
    head_numel: int
    chunk_numel: int
    branches: tuple[Branch, ...]
    frees: tuple[int, ...]

    def reads(self) -> Iterator[tuple[FileRoot, int]]:
        """Each range that is read from a source, with its size in bytes."""
        return _reads(self.root, self.numel)

    def factors(self) -> set[int]:
        """The buffers that must be whole before it runs, since their products are added on the way."""
        return {buffer for branch in self.branches for buffer in branch.factors()}


@dataclass(frozen=True, slots=True)
class BufferView:
    """A whole tensor at the start of buffer `buffer`."""

    buffer: int
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class FileView:
    """A tensor that stays in its files, `root` rounded to `dtype`: rows of it are read as they are used."""

    root: FileRoot | MeanRoot
    dtype: DType
    shape: Shape

    def reads(self) -> Iterator[tuple[FileRoot, int]]:
        """Each range that is read from a source, with its size in bytes."""
        return _reads(self.root, math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class KernelStep:
    """Run the kernel named `kernel`. `frees` are the buffers that nothing needs afterwards.

    `inputs` are whole in memory; of `weights`, which are whole or in files, it takes blocks of rows, `workers` at a
    time with `block_nbytes` of memory each. Those that are in files are read `passes` times. The `beside` steps that
    follow are streams, and run while it does.
    """

    kernel: str
    params: str
    inputs: tuple[BufferView, ...]
    weights: tuple[BufferView | FileView, ...]
    output: BufferView
    workspace_nbytes: int
    block_nbytes: int
    workers: int
    passes: int
    beside: int
    frees: tuple[int, ...]

    @property
    def blocks_nbytes(self) -> int:
        """Bytes of all the blocks that are under way."""
        return self.workers * self.block_nbytes

    @property
    def streamed(self) -> tuple[FileView, ...]:
        """The weights that are read as they are used."""
        return tuple(weight for weight in self.weights if not isinstance(weight, BufferView))

    def reads(self) -> Iterator[tuple[FileRoot, int]]:
        """Each range that is read from a source, with its size in bytes, as often as it is read."""
        for view in self.streamed * self.passes:
            yield from view.reads()

    @property
    def streamed_nbytes(self) -> int:
        """The bytes that are read of them, all passes together."""
        return sum(nbytes for _, nbytes in self.reads())


Step = StreamStep | KernelStep


@dataclass(frozen=True, slots=True)
class Pool:
    """The chunk buffers: `workers` slabs of `slab_nbytes`, one for each chunk under way."""

    workers: int
    slab_nbytes: int

    @property
    def nbytes(self) -> int:
        return self.workers * self.slab_nbytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the executor needs, and everything `--plan` prints.

    `memory_nbytes[i]` forecasts the bytes of all buffers while step i runs: the pool, whole tensors, workspace, blocks.
    A step that has to do with no whole tensor takes nothing but the pool, which is there all the time.
    `graph_digest` is that of what was planned.
    """

    format: int
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    steps: tuple[Step, ...]
    buffer_nbytes: tuple[int, ...]
    pool: Pool
    memory_nbytes: tuple[int, ...]
    graph_digest: str

    @property
    def kernels(self) -> list[KernelStep]:
        """The steps that run kernels."""
        return [step for step in self.steps if isinstance(step, KernelStep)]

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that buffers take at any time."""
        return max(self.memory_nbytes, default=self.pool.nbytes)

    @property
    def tensors_nbytes(self) -> int:
        """Bytes that whole tensors may take at any time, and keep within the peak: what is left beside the pool and the
        most that a kernel's workspace and blocks take."""
        beside = max((step.workspace_nbytes + step.blocks_nbytes for step in self.kernels), default=0)
        return self.peak_nbytes - self.pool.nbytes - beside

    @property
    def written_nbytes(self) -> int:
        """The size of all output shards."""
        return sum(shard.nbytes for shard in self.shards)

    def reads(self) -> Iterator[tuple[FileRoot, int]]:
        """Each range that is read from a source, with its size in bytes."""
        for step in self.steps:
            yield from step.reads()

    @property
    def read_nbytes(self) -> int:
        """Bytes read from sources."""
        return sum(nbytes for _, nbytes in self.reads())

    @property
    def reread_nbytes(self) -> int:
        """How many of `read_nbytes` are read for another time."""
        unique = 0
        end: tuple[int, int] = (-1, 0)
        for root, nbytes in sorted(self.reads(), key=lambda read: (read[0].source, read[0].offset)):
            begin = max(root.offset, end[1]) if root.source == end[0] else root.offset
            stop = max(begin, root.offset + nbytes)
            unique += stop - begin
            end = (root.source, stop)
        return self.read_nbytes - unique

    @property
    def fingerprint(self) -> str:
        """A digest of the sources and of what is written where: equal for plans that give equal bytes from equal
        files, whatever their budget and the form that it leads to."""
        sources = [source.lasting for source in self.sources]
        content = {"sources": sources, "shards": _encode(self.shards), "graph": self.graph_digest}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` takes back."""
        return json.dumps(_encode(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote. Raises UserError for a plan of another version."""
        data = json.loads(text)
        if data.get("format") != FORMAT:
            raise UserError(f"this plan is of format {data.get('format')}, and this moeplan reads {FORMAT}; plan again")
        return cast(Plan, _decode(Plan, data))


def _encode(value: Any) -> Any:
    """`value` as JSON types. Plans have hundreds of thousands of values, so the commonest are looked at first."""
    kind: Any = type(value)
    if kind is int or kind is str or kind is float:
        return value
    if kind is tuple:
        return [_encode(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return {name: _encode(getattr(value, name)) for name in field_names(kind)}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _decode(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(_decode(get_args(hint)[0], item) for item in value)
    if isinstance(hint, types.UnionType) or get_origin(hint) is typing.Union:
        # The members of each union here differ in their field names.
        hint = next(member for member in get_args(hint) if set(_hints(member)) == set(value))
    if is_dataclass(hint):
        hints = _hints(cast(type, hint))
        return cast(type, hint)(**{name: _decode(hints[name], item) for name, item in value.items()})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return value
