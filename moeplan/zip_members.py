"""Where the members of a zip archive lie that are stored as they are, neither compressed nor encrypted.

The archive is a stranger's. Python's own reader takes any amount of memory for the list of members, and does not say
where their bytes begin. Format: APPNOTE.TXT 6.3.10 (PKWARE), whose sections are named below.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from moeplan.untrusted_json import show

_END = struct.Struct("<4s4H2LH")  # 4.3.16: the last thing in the file, where there is no comment
_END_SIGNATURE = b"PK\x05\x06"
_LOCATOR = struct.Struct("<4sLQL")  # 4.3.15: before it, in archives of over 4 GiB
_LOCATOR_SIGNATURE = b"PK\x06\x07"
_END_64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_END_64_SIGNATURE = b"PK\x06\x06"
_ENTRY = struct.Struct("<4s6H3L5H2L")  # 4.3.12: a member, in the central directory
_ENTRY_SIGNATURE = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")  # 4.3.7: before a member's bytes
_LOCAL_SIGNATURE = b"PK\x03\x04"
_EXTRA = struct.Struct("<2H")
_ZIP64 = 1  # 4.5.3: an extra field with sizes of over 4 GiB
_TOO_LARGE = 2**32 - 1
_ENCRYPTED = 1
_STORED = 0


class ZipError(ValueError):
    """The archive is broken, or not one of stored members. The message is a predicate to the file's name."""


@dataclass(frozen=True, slots=True)
class Member:
    """`nbytes` at byte `offset` of the archive."""

    offset: int
    nbytes: int


def stored_members(file: BinaryIO, file_nbytes: int, max_directory_nbytes: int) -> tuple[dict[str, Member], int]:
    """The members of the archive `file` by name, and the size of their list.

    Raises ZipError, also for a list of more than `max_directory_nbytes`.
    """
    try:
        offset, nbytes = _directory(file, file_nbytes)
        if nbytes > max_directory_nbytes:
            raise ZipError(f"lists its members in {nbytes:,} bytes; at most {max_directory_nbytes:,} are read")
        if offset + nbytes > file_nbytes:
            raise _truncated()
        return _located(file, _entries(_read(file, offset, nbytes)), offset), nbytes
    except struct.error:
        raise ZipError("is a broken zip archive: a record ends too early. Download it again") from None


def _truncated() -> ZipError:
    return ZipError(
        "is truncated, or not a zip archive: its list of members is not where it should end. Download it again"
    )


def _read(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    file.seek(offset)
    return file.read(nbytes)


def _directory(file: BinaryIO, file_nbytes: int) -> tuple[int, int]:
    """Where the central directory lies, and its size."""
    end = file_nbytes - _END.size
    if end < 0:
        raise _truncated()
    signature, *_, nbytes, offset, _ = _END.unpack(_read(file, end, _END.size))
    if signature != _END_SIGNATURE:
        raise _truncated()
    if end >= _LOCATOR.size:
        signature, _, end_64, _ = _LOCATOR.unpack(_read(file, end - _LOCATOR.size, _LOCATOR.size))
        if signature == _LOCATOR_SIGNATURE:
            if end_64 > file_nbytes:
                raise _truncated()
            signature, *_, nbytes, offset = _END_64.unpack(_read(file, end_64, _END_64.size))
            if signature != _END_64_SIGNATURE:
                raise _truncated()
    return offset, nbytes


def _entries(directory: bytes) -> dict[str, Member]:
    """The members that the central directory lists, each with where its local header begins."""
    entries: dict[str, Member] = {}
    at = 0
    while at < len(directory):
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            _,
            packed,
            nbytes,
            name_nbytes,
            extra_nbytes,
            comment_nbytes,
            *_,
            begin,
        ) = _ENTRY.unpack_from(directory, at)
        if signature != _ENTRY_SIGNATURE:
            raise ZipError("is a broken zip archive: its list of members is not one. Download it again")
        at += _ENTRY.size
        name = directory[at : at + name_nbytes].decode("utf-8", "backslashreplace")
        at += name_nbytes
        sizes = [nbytes, packed, begin]
        _widen(sizes, directory[at : at + extra_nbytes])
        at += extra_nbytes + comment_nbytes
        nbytes, packed, begin = sizes
        if method != _STORED or flags & _ENCRYPTED or packed != nbytes:
            raise ZipError(
                f"holds {show(name)} compressed or encrypted; torch.save stores it as it is: load the file with torch "
                "and save it again"
            )
        if name in entries:
            raise ZipError(f"is a broken zip archive: it lists {show(name)} twice")
        entries[name] = Member(begin, nbytes)
    return entries


def _widen(sizes: list[int], extra: bytes) -> None:
    """Put the sizes of over 4 GiB, which stand in an extra field, in the place of those that say so."""
    at = 0
    while at < len(extra) and _TOO_LARGE in sizes:
        kind, nbytes = _EXTRA.unpack_from(extra, at)
        at += _EXTRA.size
        if kind == _ZIP64:
            for index, size in enumerate(sizes):
                if size == _TOO_LARGE:
                    (sizes[index],) = struct.unpack_from("<Q", extra, at)
                    at += 8
            return
        at += nbytes


def _located(file: BinaryIO, entries: Mapping[str, Member], directory_offset: int) -> dict[str, Member]:
    """Where members' own bytes lie: behind their local headers, which may be padded."""
    for name, entry in entries.items():
        if entry.offset > directory_offset:
            raise ZipError(f"is a broken zip archive: {show(name)} does not lie before the list of members")
    members = {}
    headers = _read_each(file, [entry.offset for entry in entries.values()], _LOCAL.size)
    for (name, entry), header in zip(entries.items(), headers, strict=True):
        signature, *_, name_nbytes, extra_nbytes = _LOCAL.unpack(header)
        if signature != _LOCAL_SIGNATURE:
            raise ZipError(f"is a broken zip archive: {show(name)} is not where it is listed. Download it again")
        begin = entry.offset + _LOCAL.size + name_nbytes + extra_nbytes
        if begin + entry.nbytes > directory_offset:
            raise ZipError(f"is a broken zip archive: {show(name)} does not lie before the list of members")
        members[name] = Member(begin, entry.nbytes)
    return members


def _read_each(file: BinaryIO, offsets: Sequence[int], nbytes: int) -> Iterable[bytes]:
    """`nbytes` bytes from each offset; all at once of a file that has a way to, since each takes it a round trip."""
    at_once = getattr(file, "read_each", None)
    return at_once(offsets, nbytes) if at_once is not None else (_read(file, offset, nbytes) for offset in offsets)
