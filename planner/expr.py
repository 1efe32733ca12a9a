"""Tensor expressions: what an output tensor is made of, as immutable, hash-consed nodes.

Nothing here moves a byte. An expression says where bytes come from (`Read`), what is done to each element on the
way (`Elementwise`), of which tensors the mean is taken (`Mean`), which product of small matrices is added
(`AddLowRank`), how tensors are strung together (`Concat`), and what only a named kernel can compute (`Opaque`).

Two equal expressions are ONE object::

    Read(file, 4096, DType.BF16, (8, 8)) is Read(file, 4096, DType.BF16, (8, 8))

so a tensor that eight experts share is read once because it *is* once, and no pass has to look for it. Arithmetic is
done in float32, whatever the dtypes at either end, and rounded once, by the `Cast` that closes a chain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from threading import Lock
from typing import Any, ClassVar
from weakref import WeakValueDictionary

Shape = tuple[int, ...]

BLOCK = 1 << 14
"""Elements that stay together: noise is drawn, and checksums are taken, a block at a time. Streams are cut between
blocks, so that neither depends on how a tensor is cut."""

LOW_RANK_TILE = (16, 2048)
"""The rows and columns of a low-rank product that are computed at a time: always the same ones, however a tensor is
cut, since how a matrix product is rounded may depend on its shape."""


class DType(Enum):
    """An element type, under its safetensors name."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 4 if self is DType.F32 else 2


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that tensors are read from.

    It is identified by the file it really is (device, inode, size, time of last change), not by the path typed; who
    makes one sees to it that each file has one path. So a file that changes during a run is noticed.
    """

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    path: str

    @property
    def lasting(self) -> tuple[str, int, int]:
        """What identifies it after a restart, too. Device numbers are given out anew when a file system is mounted."""
        return self.path, self.nbytes, self.mtime_ns


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that tensors are read from over HTTP, range by range.

    It is identified by its content: `etag` is the entity tag that the server gives it, without quotes; on the Hub that
    is a digest. Who makes one sees to it that each content has one `url`.
    """

    url: str
    etag: str
    nbytes: int

    @property
    def lasting(self) -> tuple[str, int]:
        """What identifies it at any time, and on another server that has it."""
        return self.etag, self.nbytes


Source = SourceFile | RemoteFile


@cache
def field_names(cls: Any) -> tuple[str, ...]:
    """The names of a dataclass's fields. There are hundreds of thousands of nodes, and few classes."""
    return tuple(field.name for field in fields(cls))


class _HashConsed(type):
    """Builds each distinct node once, in any thread. Nodes compare by identity, so a key costs no walk of the tree."""

    _nodes: ClassVar[WeakValueDictionary[tuple[Any, ...], Any]] = WeakValueDictionary()
    _lock: ClassVar[Lock] = Lock()

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        node = super().__call__(*args, **kwargs)
        key = (cls, *(getattr(node, name) for name in field_names(cls)))
        with cls._lock:
            return cls._nodes.setdefault(key, node)


class Expr(metaclass=_HashConsed):
    """A tensor to be. Every node has a `dtype` and a `shape`."""

    __slots__ = ()

    dtype: DType
    shape: Shape

    @property
    def inputs(self) -> tuple[Expr, ...]:
        """The expressions this one is made of."""
        return ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Read(Expr):
    """`numel` elements that lie at byte `offset` of `file`, in C order."""

    file: Source
    offset: int
    dtype: DType
    shape: Shape


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Zeros(Expr):
    """A tensor of zeros."""

    dtype: DType
    shape: Shape


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Mean(Expr):
    """The elementwise mean of equally shaped `parts`, in float32: their sum, in their order, divided by their number.

    They may be of different dtypes, and one may stand there several times: where it follows itself, it is read once.
    """

    parts: tuple[Read, ...]

    def __post_init__(self) -> None:
        if len({part.shape for part in self.parts}) != 1:
            raise ValueError("the parts of a Mean must be of one shape")

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.parts

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return DType.F32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.parts[0].shape


@dataclass(frozen=True, slots=True)
class Cast:
    """Round to `dtype`, to nearest even."""

    dtype: DType


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by `factor`, in float32."""

    factor: float


@dataclass(frozen=True, slots=True)
class AddNoise:
    """Add `scale` × standard normal noise, in float32.

    The noise of an element depends on `seed` and the element's position alone, never on how the tensor is cut up.
    """

    scale: float
    seed: int


Op = Cast | Scale | AddNoise


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Elementwise(Expr):
    """`op` applied to each element of `input`."""

    op: Op
    input: Expr

    def __post_init__(self) -> None:
        _check_open(self.input)

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.input,)

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return self.op.dtype if isinstance(self.op, Cast) else DType.F32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.input.shape


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class AddLowRank(Expr):
    """`input` `[rows, columns]` plus `b` `[rows, rank]` · `a` `[rank, columns]`, in float32.

    Both factors are float32, and made elementwise of a `Read`: they are whole in memory while `input` streams by.
    """

    input: Expr
    b: Expr
    a: Expr

    def __post_init__(self) -> None:
        _check_open(self.input)
        if len(self.b.shape) != 2 or (self.b.shape[0], *self.a.shape[1:]) != self.input.shape:
            raise ValueError(f"{self.b.shape} times {self.a.shape} is not {self.input.shape}")
        if self.b.shape[1] != self.a.shape[0] or self.a.shape[0] == 0:
            raise ValueError(f"{self.b.shape} cannot be multiplied with {self.a.shape}")
        for factor in (self.b, self.a):
            root = factor
            while isinstance(root, Elementwise):
                root = root.input
            if not isinstance(root, Read) or factor.dtype is not DType.F32:
                raise ValueError("a factor of a low-rank product must be float32, and made elementwise of a Read")

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.input, self.b, self.a

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return DType.F32

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.input.shape


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Concat(Expr):
    """The elements of `parts`, one part after the other in C order, seen as a tensor of `shape`.

    Stacking is the same thing under another shape: eight `[I, H]` parts are a `[8, I, H]` tensor.
    """

    parts: tuple[Expr, ...]
    shape: Shape

    def __post_init__(self) -> None:
        if len({part.dtype for part in self.parts}) != 1:
            raise ValueError("the parts of a Concat must be of one dtype")
        if sum(part.numel for part in self.parts) != math.prod(self.shape):
            raise ValueError(f"the parts of a Concat do not fill the shape {self.shape}")

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.parts

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return self.parts[0].dtype


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Opaque(Expr):
    """What the kernel named `kernel` computes from `args`, which are whole in memory, and `weights`.

    `params` is a JSON text that only the kernel understands. Of `weights`, each a `Read` or a `Mean`, cast or not, the
    kernel takes some rows at a time: so they may be whole in memory, or stay in their files and be read as they are
    used, `passes` times over. `workspace_nbytes` is the most memory that the kernel uses beside its inputs and its
    result; `block_nbytes` what it takes to work on one block of rows, of which several may be under way at a time.
    """

    kernel: str
    params: str
    args: tuple[Expr, ...]
    dtype: DType
    shape: Shape
    workspace_nbytes: int = 0
    weights: tuple[Expr, ...] = ()
    block_nbytes: int = 0
    passes: int = 1

    def __post_init__(self) -> None:
        for weight in self.weights:
            if not isinstance(_uncast(weight), Read | Mean):
                raise ValueError("the weights of a kernel must be read from files, and no more than averaged and cast")

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (*self.args, *self.weights)


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Slice(Expr):
    """The elements of a kernel's result from element `begin` on, in C order, seen as a tensor of `shape`.

    (A part of a `Read` is a `Read`.)
    """

    input: Opaque
    begin: int
    shape: Shape

    def __post_init__(self) -> None:
        if self.begin < 0 or self.begin + math.prod(self.shape) > self.input.numel:
            raise ValueError(
                f"a Slice of {self.shape} from element {self.begin} does not lie within {self.input.shape}"
            )

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.input,)

    @property
    def dtype(self) -> DType:  # type: ignore[override]
        return self.input.dtype


def _check_open(x: Expr) -> None:
    """Raises ValueError where nothing more can be done to `x`, since it has been rounded."""
    if _uncast(x) is not x:
        raise ValueError("a Cast closes a chain: arithmetic comes before rounding")


def _uncast(x: Expr) -> Expr:
    return x.input if isinstance(x, Elementwise) and isinstance(x.op, Cast) else x


def reads_of(x: Expr) -> tuple[Read, ...]:
    """The ranges that a `Read` or a `Mean`, cast or not, is made of, in order; none for anything else."""
    root = _uncast(x)
    return root.parts if isinstance(root, Mean) else (root,) if isinstance(root, Read) else ()


def rows(x: Expr, begin: int, end: int) -> Expr:
    """`x[begin:end]` of a kernel's result, or of what is in files, averaged and cast or not; `x` where that is all."""
    if (begin, end) == (0, x.shape[0]):
        return x
    match x:
        case Opaque():
            return Slice(x, begin * math.prod(x.shape[1:]), (end - begin, *x.shape[1:]))
        case Read():
            return _rows_of_read(x, begin, end)
        case Mean(parts):
            return Mean(tuple(_rows_of_read(part, begin, end) for part in parts))
        case Elementwise(Cast(dtype), of):
            return cast(rows(of, begin, end), dtype)
    raise TypeError(f"there are no rows to be had of {type(x).__name__}")


def _rows_of_read(x: Read, begin: int, end: int) -> Read:
    row_nbytes = math.prod(x.shape[1:]) * x.dtype.itemsize
    return Read(x.file, x.offset + begin * row_nbytes, x.dtype, (end - begin, *x.shape[1:]))


def mean(parts: Sequence[Read]) -> Read | Mean:
    """The mean of `parts`, in float32; the part itself where all are one.

    Equal ones are put together, where the first of them stands, so that each is read once.
    """
    together = tuple(sorted(parts, key=parts.index))
    return together[0] if len({*together}) == 1 else Mean(together)


def cast(x: Expr, dtype: DType) -> Expr:
    """`x` as `dtype`; `x` itself where it already is."""
    return x if x.dtype is dtype else Elementwise(Cast(dtype), x)


def scale(x: Expr, factor: float) -> Expr:
    """`factor` · `x`, in float32; `x` itself where the factor is 1."""
    return x if factor == 1.0 else Elementwise(Scale(factor), x)


def add_low_rank(x: Expr, b: Expr, a: Expr, factor: float) -> Expr:
    """`x` `[rows, columns]` plus `factor` · `b` `[rows, rank]` · `a` `[rank, columns]`, in float32."""
    return AddLowRank(x, cast(scale(b, factor), DType.F32), cast(a, DType.F32))


def add_noise(x: Expr, scale: float, seed: int) -> Expr:
    """`x` plus `scale` × standard normal noise, in float32; `x` itself where the scale is 0."""
    return x if scale == 0.0 else Elementwise(AddNoise(scale, seed), x)


def stack(parts: Sequence[Expr]) -> Concat:
    """Equally shaped `parts` under a new first dimension."""
    return Concat(tuple(parts), (len(parts), *parts[0].shape))
