"""The header of a safetensors file: which bytes are which tensor. A pure function of the header's bytes.

A file is the header's length (8 bytes, little-endian), the header (a JSON object), and the data, which the tensors tile
without a hole. Whatever is accepted here, the safetensors library accepts too; see its `Metadata::validate`. Beyond
it, this reader refuses keys that appear twice, keys that the format does not know, and element types that a
merge cannot use.
"""

from dataclasses import dataclass
from typing import Any

from moeplan.untrusted_json import JSONError, parse_object, show
from planner.expr import DType, Shape

LENGTH_NBYTES = 8
"""Size of the field before the header that holds its length."""

_DTYPES = {dtype.value: dtype for dtype in DType}
_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_NBITS = 2**64 - 1  # the library counts in bits, in 64 of them


class HeaderError(ValueError):
    """The header is wrong. The message is a predicate to the file's name: "is truncated: ..."."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header. `begin` and `end` are bytes from the start of the file's data."""

    dtype: DType
    shape: Shape
    begin: int
    end: int


def parse_header(header: bytes, data_nbytes: int) -> dict[str, TensorInfo]:
    """The tensors of a file with this header, before `data_nbytes` bytes of data, in the order of their data.

    Raises HeaderError.
    """
    if not header.startswith(b"{"):
        raise HeaderError(f"is not a safetensors file: its header begins with {show(header[:16])}, not with '{{'")
    try:
        entries = parse_object(header)
    except JSONError as error:
        raise HeaderError(f"has a broken safetensors header: it {error}") from None
    _check_metadata(entries.pop("__metadata__", {}))
    tensors = sorted(
        ((name, _tensor_info(name, entry)) for name, entry in entries.items()),
        key=lambda item: (item[1].begin, item[1].end),
    )
    _check_tiling(tensors, LENGTH_NBYTES + len(header), data_nbytes)
    return dict(tensors)


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("has a broken safetensors header: __metadata__ must map text to text")


def _tensor_info(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise _wrong(name, f"must have dtype, shape and data_offsets and nothing else, not {show(entry)}")
    dtype = entry["dtype"]
    if not isinstance(dtype, str):
        raise _wrong(name, f"has the dtype {show(dtype)}, which is not text")
    if dtype not in _DTYPES:
        raise HeaderError(
            f"holds tensor {show(name)} as {show(dtype)}; moeplan reads F32, F16 and BF16: "
            "dequantise or convert the model first"
        )
    shape = entry["shape"]
    if not _are_counts(shape):
        raise _wrong(name, f"has the shape {show(shape)}, which is not a list of whole numbers from 0 up")
    offsets = entry["data_offsets"]
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _wrong(name, f"has the data_offsets {show(offsets)}, which are not two whole numbers from 0 up")
    begin, end = offsets
    if begin > end:
        raise _wrong(name, f"has data_offsets that run backwards: {show(offsets)}")
    nbytes = _DTYPES[dtype].itemsize
    for size in shape:
        nbytes *= size
        if max(size, nbytes * 8) > _MAX_NBITS:
            raise _wrong(name, f"has the impossible shape {show(shape)}: its size overflows 64 bits")
    if end - begin != nbytes:
        raise _wrong(
            name, f"takes {nbytes:,} bytes as {dtype} {show(shape)}, but its data_offsets hold {end - begin:,}"
        )
    return TensorInfo(_DTYPES[dtype], tuple(shape), begin, end)


def _are_counts(value: Any) -> bool:
    # type() and not isinstance(): True is an int to Python, but not to JSON.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(tensors: list[tuple[str, TensorInfo]], data_offset: int, data_nbytes: int) -> None:
    position, previous = 0, ""
    for name, info in tensors:
        if info.begin > position:
            raise _wrong(name, f"leaves a hole of {info.begin - position:,} bytes before it that no tensor holds")
        if info.begin < position:
            raise _wrong(name, f"overlaps tensor {show(previous)}")
        position, previous = info.end, name
    if position > data_nbytes:
        raise HeaderError(
            f"is truncated: its header describes {data_offset + position:,} bytes, the file has "
            f"{data_offset + data_nbytes:,}. Download it again"
        )
    if position < data_nbytes:
        raise HeaderError(f"is {data_nbytes - position:,} bytes longer than its header describes. Download it again")


def _wrong(name: str, what: str) -> HeaderError:
    return HeaderError(f"has a broken safetensors header: tensor {show(name)} {what}")
