"""`moeplan verify`: reading a finished model again, to see whether it is what the merge wrote.

`moeplan.json` says what that was. Tensors that share extents with a source were never read by the merge, so there is no
checksum: they are compared with the source, as long as it is the file that it was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.verifying import Range, wrong
from moeplan.errors import UserError
from moeplan.output import RECORD
from moeplan.record import FORMAT, file_sha256, header, header_sha256
from moeplan.safetensors_header import parse_header
from moeplan.staging import at_rest
from moeplan.untrusted_json import JSONError, parse_object, show

MAX_RECORD_NBYTES = 64 << 20
MAX_RECORD_VALUES = 4_000_000

MAX_COUNT = 1 << 60
"""More than any file has elements or bytes, and still an offset that the system takes."""


class RecordError(UserError):
    """A directory has no `moeplan.json` that a model can be verified by."""


@dataclass
class Verification:
    """What was found: `wrong` and `unknown` have a line for each tensor or file that is, or may be, not as written."""

    checked_nbytes: int = 0
    tensors: int = 0
    wrong: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def verify(
    directory: str | Path,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Verification:
    """Check every file and every tensor of the model in `directory`.

    `on_start` is told how many bytes there are to read, `on_progress` how many were read. Raises RecordError where
    there is nothing to check it by, and OutputError where a merge is moving another model there.
    """
    with at_rest(Path(directory)):
        return _verify(Path(directory), on_start, on_progress)


def _verify(
    directory: Path, on_start: Callable[[int], None] | None, on_progress: Callable[[int], None] | None
) -> Verification:
    record = _read_record(directory)
    found = Verification()
    try:
        ranges, names = _ranges(directory, record, found)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise RecordError(f"{directory / RECORD}: is not what moeplan writes") from None
    found.checked_nbytes = sum(of.numel * of.itemsize for of in ranges)
    if on_start is not None:
        on_start(found.checked_nbytes)
    bad = dict.fromkeys(names[index] for index in wrong(ranges, on_progress))
    found.wrong += [f"{name}: is not what was written" for name in bad]
    return found


def _ranges(directory: Path, record: dict[str, Any], found: Verification) -> tuple[list[Range], list[str]]:
    """What is to be read, and the tensor that each range is of. What is wrong without that goes into `found`."""
    for name, expected in record["files"].items():
        _check_file(directory / name, name, expected, found)
    ranges: list[Range] = []
    names: list[str] = []
    sources = {path: _state(Path(path), facts) for path, facts in record["made_from"]["source"].items()}
    for shard, facts in record["shards"].items():
        for tensor, offset, itemsize, numel in _tensors(directory, shard, facts, found):
            found.tensors += 1
            segments = record["tensors"][tensor]
            _check_segments(segments, numel)
            for segment in segments:
                reason = sources[segment["source"]] if "source" in segment else None
                if reason is not None:
                    found.unknown.append(f"{tensor}: was shared with {segment['source']}, which {reason}")
                else:
                    ranges.append(_range(directory / shard, offset, itemsize, segment))
                    names.append(f"{tensor} ({shard}, from byte {offset:,})")
                offset += segment["numel"] * itemsize
    if not found.wrong and found.tensors != len(record["tensors"]):
        raise ValueError("tensors of no shard")
    return ranges, names


def _read_record(directory: Path) -> dict[str, Any]:
    file = directory / RECORD
    if file.exists() and not file.is_file():  # a FIFO would be waited for
        raise RecordError(f"{file}: is not a regular file; only a model that moeplan merged can be verified")
    try:
        with open(file, "rb") as opened:
            text = opened.read(MAX_RECORD_NBYTES + 1)
    except OSError as error:
        raise RecordError(
            f"{file}: cannot be read ({error.strerror}); only a model that moeplan merged can be verified"
        ) from None
    if len(text) > MAX_RECORD_NBYTES:
        raise RecordError(f"{file}: is larger than {MAX_RECORD_NBYTES:,} bytes; moeplan does not write such")
    try:
        record = parse_object(text, MAX_RECORD_VALUES, holds_paths=True)
    except JSONError as error:
        raise RecordError(f"{file}: {error}") from None
    if record.get("format") != FORMAT:
        raise RecordError(f"{file}: is of format {show(record.get('format'))}, and this moeplan reads {FORMAT}")
    return record


def _check_file(path: Path, name: str, expected: str, found: Verification) -> None:
    try:
        if not path.is_file():
            found.wrong.append(f"{name}: is not there")
        elif file_sha256(path) != expected:
            found.wrong.append(f"{name}: is not what was written")
    except OSError as error:
        found.wrong.append(f"{name}: cannot be read ({error.strerror})")


def _check_segments(segments: list[dict[str, Any]], numel: int) -> None:
    """See that a record's segments of a tensor make up all of it, in whole numbers. Raises ValueError."""
    counts = [segment.get(key, 0) for segment in segments for key in ("numel", "head", "offset")]
    if any(type(count) is not int or not 0 <= count < MAX_COUNT for count in counts):
        raise ValueError("segments of what no file has")
    if sum(segment["numel"] for segment in segments) != numel:
        raise ValueError("segments that are not the tensor")


def _tensors(
    directory: Path, shard: str, facts: dict[str, Any], found: Verification
) -> list[tuple[str, int, int, int]]:
    """Of each tensor of a shard whose header is what was written: name, offset, size of an element, and how many it
    has. Else none; and none that lie beyond its end, where it was cut."""
    path = directory / shard
    try:
        if not path.is_file():
            found.wrong.append(f"{shard}: is not there")
            return []
        length, text = header(path)
        nbytes = path.stat().st_size
    except OSError as error:
        found.wrong.append(f"{shard}: cannot be read ({error.strerror})")
        return []
    if hashlib.sha256(length + text).hexdigest() != facts["header_sha256"]:
        found.wrong.append(f"{shard}: its header is not what was written")
        return []
    if nbytes != facts["nbytes"]:
        found.wrong.append(f"{shard}: has {nbytes:,} bytes, and {facts['nbytes']:,} were written")
    start = len(length) + len(text)
    infos = parse_header(text, facts["nbytes"] - start)
    return [
        (name, start + info.begin, info.dtype.itemsize, math.prod(info.shape))
        for name, info in infos.items()
        if start + info.end <= nbytes
    ]


def _range(file: Path, offset: int, itemsize: int, segment: dict[str, Any]) -> Range:
    if "source" in segment:
        source = Path(segment["source"])
        return Range(file, offset, segment["numel"], itemsize, segment["numel"], None, source, segment["offset"])
    return Range(file, offset, segment["numel"], itemsize, segment["head"], int(segment["xxh3"], 16))


def _state(path: Path, facts: dict[str, Any]) -> str | None:
    """Why a source can say nothing about the model any more; None where it is what it was."""
    try:
        now = path.stat()
        if (now.st_size, now.st_mtime_ns) != (facts["nbytes"], facts["mtime_ns"]):
            return "was changed since"
        return None if header_sha256(path) == facts["header_sha256"] else "was changed since"
    except OSError:
        return "is not there any more"
