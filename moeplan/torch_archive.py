"""Which bytes of a `.bin` file that `torch.save` wrote are which tensor. Nothing in the file is executed.

Since torch 1.6 such a file is a zip archive: `data.pkl`, a pickle that says which tensor is which part of which
storage, and the storages, each a member of its own, stored as it lies in memory. A pickle is a program for a small
stack machine. What makes it dangerous is that it may call whatever it names; this machine calls nothing. It knows the
few instructions that a dict of tensors takes, and turns the few names that belong to one into plain data (torch does
the same with `weights_only`, torch/_weights_only_unpickler.py; there, too, everything else is refused).

Nothing here is compared, hashed or walked but what was checked to be small, so time and memory follow from the size of
the pickle, which is bounded, and from `MAX_INSTRUCTIONS`.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from moeplan.untrusted_json import show
from moeplan.zip_members import Member, ZipError, stored_members
from planner.expr import DType, Shape

MAX_INSTRUCTIONS = 1_500_000
"""The most that a pickle may have. A state dict takes 45 for each tensor: this is 33,000 tensors."""

_MAX_DIMENSIONS = 64  # of a tensor, in torch
_MAX_SIZE = 2**63 - 1
_MAX_KEY_LENGTH = 20

_ZIP = b"PK"
_PICKLE = b"\x80"
_TO_CONVERT = "torch.save(torch.load(FILE, weights_only=True), FILE)"


class _Names:
    """What a pickle may call."""

    REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
    REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
    ORDERED_DICT = "collections.OrderedDict"


_STORAGE_DTYPES = {
    "torch.FloatStorage": DType.F32,
    "torch.HalfStorage": DType.F16,
    "torch.BFloat16Storage": DType.BF16,
}
_OTHER_STORAGES = {
    f"torch.{name}Storage"
    for name in ("Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat", "ComplexDouble")
}
_KNOWN = {
    _Names.REBUILD_TENSOR,
    _Names.REBUILD_PARAMETER,
    _Names.ORDERED_DICT,
    *_STORAGE_DTYPES,
    *_OTHER_STORAGES,
}


class ArchiveError(ValueError):
    """The file cannot be read as a dict of tensors. The message is a predicate to the file's name."""


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor at byte `offset` of the file, in C order."""

    offset: int
    dtype: DType
    shape: Shape


def read_archive(file: BinaryIO, file_nbytes: int, max_nbytes: int) -> tuple[dict[str, ArchivedTensor], int]:
    """The tensors in `file`, and how many bytes of it had to be read.

    Raises ArchiveError, also where that would be more than `max_nbytes`.
    """
    file.seek(0)
    start = file.read(4)
    if start.startswith(_PICKLE):
        raise ArchiveError(
            "is a pickle without the archive around it, as torch wrote them before version 1.6; its tensors cannot be "
            f"read in parts. Load and save it once: {_TO_CONVERT}"
        )
    if not start.startswith(_ZIP):
        raise ArchiveError(f"is no file of torch.save: it begins with {show(start)}. Download it again")
    try:
        members, directory_nbytes = stored_members(file, file_nbytes, max_nbytes)
    except ZipError as error:
        raise ArchiveError(str(error)) from None
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ArchiveError("is a zip archive, but not one that torch.save wrote: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order is not None and _content(file, order, 8) != b"little":
        raise ArchiveError(f"was saved on a big-endian machine. Load and save it on another one: {_TO_CONVERT}")
    program = members[pickles[0]]
    if directory_nbytes + program.nbytes > max_nbytes:
        raise ArchiveError(
            f"describes its tensors in {directory_nbytes + program.nbytes:,} bytes; at most {max_nbytes:,} are read"
        )
    content = _run(_content(file, program, program.nbytes))
    if type(content) is not dict:
        raise ArchiveError("holds something else than a dict of tensors; is it the file of a model's weights?")
    tensors = {name: _located(name, value, root, members) for name, value in content.items()}
    return tensors, directory_nbytes + program.nbytes


def _content(file: BinaryIO, member: Member, max_nbytes: int) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.nbytes, max_nbytes))


def _located(name: str, value: Any, root: str, members: Mapping[str, Member]) -> ArchivedTensor:
    """Where the tensor `name` lies, which the pickle says is `value`."""
    if type(value) is not _Tensor:
        raise ArchiveError(f"holds {show(name)}, which is not a tensor; is it the file of a model's weights?")
    storage = value.storage
    if storage.dtype is None:
        raise ArchiveError(
            f"holds tensor {show(name)} in a {storage.kind}; moeplan reads F32, F16 and BF16: dequantise or convert "
            "the model first"
        )
    if not value.is_contiguous():
        raise ArchiveError(
            f"holds tensor {show(name)}, {list(value.shape)}, transposed or as columns of another (strides "
            f"{list(value.strides)}), so it does not lie in one piece: load the model with transformers, then "
            "save_pretrained"
        )
    member = members.get(f"{root}data/{storage.key}")
    if member is None or member.nbytes != storage.numel * storage.dtype.itemsize:
        found = "is not there" if member is None else f"has {member.nbytes:,} bytes"
        expected = storage.numel * storage.dtype.itemsize
        raise ArchiveError(f"is broken: the storage of tensor {show(name)}, of {expected:,} bytes, {found}")
    if value.begin + math.prod(value.shape) > storage.numel:
        raise ArchiveError(f"is broken: tensor {show(name)} reaches beyond its storage")
    return ArchivedTensor(member.offset + value.begin * storage.dtype.itemsize, storage.dtype, value.shape)


# ------------------------------------------------------------------------------------------------ the stack machine


@dataclass(frozen=True, slots=True)
class _Name:
    """Something that the pickle would have looked up."""

    path: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """`numel` elements, in the member `data/{key}`; `dtype` None: of a kind that is not read."""

    kind: str
    dtype: DType | None
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A part of a storage, from element `begin` on."""

    storage: _Storage
    begin: int
    shape: Shape
    strides: Shape

    def is_contiguous(self) -> bool:
        """Whether its elements follow each other in C order."""
        stride = 1
        for size, given in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and given != stride:
                return 0 in self.shape
            stride *= size
        return True


def _broken(what: str) -> ArchiveError:
    return ArchiveError(f"has a broken pickle: {what}")


def _run(program: bytes) -> Any:
    """What the pickle `program` would make, with `_Tensor`s for tensors. Raises ArchiveError."""
    try:
        return _Machine(program).run()
    except (IndexError, KeyError, UnicodeDecodeError):
        raise _broken("it ends too early, or takes what it has not made") from None


class _Machine:
    """A run of a pickle. Values are None, numbers, texts, tuples, dicts with texts for keys, and the classes above."""

    def __init__(self, program: bytes) -> None:
        self._program = program
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        stack, memo = self._stack, self._memo
        for _ in range(MAX_INSTRUCTIONS):
            instruction = self._take(1)
            match instruction:
                case pickle.BINPUT:
                    memo[self._take(1)[0]] = stack[-1]
                case pickle.LONG_BINPUT:
                    memo[self._number("<I")] = stack[-1]
                case pickle.BINGET:
                    stack.append(memo[self._take(1)[0]])
                case pickle.LONG_BINGET:
                    stack.append(memo[self._number("<I")])
                case pickle.BININT1:
                    stack.append(self._take(1)[0])
                case pickle.BININT2:
                    stack.append(self._number("<H"))
                case pickle.BININT:
                    stack.append(self._number("<i"))
                case pickle.LONG1:
                    stack.append(self._long())
                case pickle.BINUNICODE:
                    stack.append(self._take(self._number("<I")).decode("utf-8"))
                case pickle.NONE:
                    stack.append(None)
                case pickle.NEWTRUE:
                    stack.append(True)
                case pickle.NEWFALSE:
                    stack.append(False)
                case pickle.EMPTY_TUPLE:
                    stack.append(())
                case pickle.TUPLE1:
                    stack[-1:] = [(stack[-1],)]
                case pickle.TUPLE2:
                    stack[-2:] = [(stack[-2], stack[-1])]
                case pickle.TUPLE3:
                    stack[-3:] = [(stack[-3], stack[-2], stack[-1])]
                case pickle.MARK:
                    self._marks.append(len(stack))
                case pickle.TUPLE:
                    stack.append(tuple(self._above_mark()))
                case pickle.EMPTY_DICT:
                    stack.append({})
                case pickle.SETITEM:
                    value, key = stack.pop(), stack.pop()
                    self._put([key, value])
                case pickle.SETITEMS:
                    self._put(self._above_mark())
                case pickle.GLOBAL:
                    stack.append(self._name())
                case pickle.BINPERSID:
                    stack.append(_storage(stack.pop()))
                case pickle.REDUCE:
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_called(function, arguments))
                case pickle.BUILD:
                    stack.pop()  # what torch keeps beside a state dict, about versions of modules
                    if type(stack[-1]) is not dict:
                        raise _broken("it gives a state to something else than a dict")
                case pickle.PROTO:
                    if self._take(1) != b"\x02":
                        raise ArchiveError(
                            f"has a pickle of another protocol than torch's. Save it again: {_TO_CONVERT}"
                        )
                case pickle.STOP:
                    return stack.pop()
                case _:
                    raise ArchiveError(
                        f"has a pickle with the instruction {show(instruction)}, which a dict of tensors has no use "
                        "for; nothing of it was executed"
                    )
        raise ArchiveError(
            f"has a pickle of more than {MAX_INSTRUCTIONS:,} instructions; no real checkpoint has so many"
        )

    def _take(self, nbytes: int) -> bytes:
        taken = self._program[self._at : self._at + nbytes]
        if len(taken) != nbytes:
            raise _broken("it ends too early")
        self._at += nbytes
        return taken

    def _number(self, format: str) -> int:
        number: int
        (number,) = struct.unpack(format, self._take(struct.calcsize(format)))
        return number

    def _long(self) -> int:
        nbytes = self._take(1)[0]
        if nbytes > 9:  # which hold every size that a file can have
            raise _broken("it has a number that is too large")
        return int.from_bytes(self._take(nbytes), "little", signed=True)

    def _line(self) -> str:
        end = self._program.index(b"\n", self._at, self._at + 1000)
        line = self._program[self._at : end]
        self._at = end + 1
        return line.decode("utf-8")

    def _name(self) -> _Name:
        try:
            path = f"{self._line()}.{self._line()}"
        except ValueError:
            raise _broken("a name does not end") from None
        if path not in _KNOWN:
            raise ArchiveError(
                f"has a pickle that would call or use {show(path)}, which a dict of tensors has no use for; nothing of "
                "it was executed. Do not load it with anything else unless you trust who made it"
            )
        return _Name(path)

    def _above_mark(self) -> list[Any]:
        """What lies above the last mark; the stack no longer has it."""
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _put(self, items: list[Any]) -> None:
        """Put keys and values, in turns, into the dict on top of the stack."""
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _broken("it puts entries into something else than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise _broken("it has a dict with a key that is not text")
            target[key] = value


def _storage(pid: Any) -> _Storage:
    """The storage that a persistent id stands for: ("storage", its kind, its key, its device, number of elements)."""
    if type(pid) is not tuple or len(pid) != 5:
        raise _broken("it refers to something else than a storage")
    what, kind, key, _, numel = pid
    is_key = type(key) is str and key.isdecimal() and len(key) < _MAX_KEY_LENGTH
    if what != "storage" or type(kind) is not _Name or not is_key or not _is_size(numel):
        raise _broken("it refers to something else than a storage")
    return _Storage(kind.path.removeprefix("torch."), _STORAGE_DTYPES.get(kind.path), key, numel)


def _called(function: Any, arguments: Any) -> Any:
    """What the call of a name in a pickle stands for."""
    if type(function) is not _Name:
        raise _broken("it calls something without a name")
    match function.path, arguments:
        case _Names.ORDERED_DICT, ():
            return {}
        case _Names.REBUILD_PARAMETER, (_Tensor() as tensor, _, _):
            return tensor
        case _Names.REBUILD_TENSOR, (_Storage() as storage, begin, tuple(shape), tuple(strides), _, _):
            # Flags may follow, that what is stored is to be negated or conjugated: such a call is none of these.
            if len(shape) == len(strides) <= _MAX_DIMENSIONS and all(map(_is_size, (begin, *shape, *strides))):
                return _Tensor(storage, begin, shape, strides)
    raise _broken(f"it calls {function.path} with something else than it takes")


def _is_size(value: Any) -> bool:
    # type() and not isinstance(): True is an int to Python.
    return type(value) is int and 0 <= value <= _MAX_SIZE
