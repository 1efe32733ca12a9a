"""Passages of files, as prompts: drawn at random, by a seed, from text or from JSON lines with a `text` each.

A file may be larger than memory, so what is looked at is bounded: all of a small one, slices at random places of a
large one. A passage is a piece of one text, from one white space to another.
"""

from __future__ import annotations

import os
import re
import stat
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import BinaryIO

from moeplan.errors import UserError
from moeplan.untrusted_json import JSONError, parse_object, show

NBYTES = 1 << 10
"""The size of a passage: with most text and tokenizers this becomes some 250 tokens."""

SLICE_NBYTES = 1 << 16
MOST_SLICES = 32
"""What is looked at of a file: so many slices."""

MAX_LINE_NBYTES = 1 << 20
"""Of a line of JSON, without its end."""

JSON_LINES = (".jsonl", ".ndjson", ".json")

TEXT = "text"
WANTED = f"write a JSON object with a `{TEXT}` on each line"


class PassageError(UserError):
    """A file is not one that passages can be drawn from."""


def passages(file: str, seed: str, most_nbytes: int) -> list[str]:
    """Passages of `file`, in random order, of so many bytes at most (or one). Raises PassageError."""
    random = Random(seed)
    try:
        if not stat.S_ISREG(Path(file).stat().st_mode):
            raise PassageError(f"{file}: is not a regular file; name a file of text, or of JSON lines")
        with open(file, "rb") as stream:
            nbytes = os.fstat(stream.fileno()).st_size
            texts = _json_texts if file.lower().endswith(JSON_LINES) else _plain_texts
            found = [piece for text in texts(file, stream, _slices(nbytes, random)) for piece in _pieces(text)]
    except OSError as error:
        raise PassageError(f"{file}: cannot be read: {error.strerror}") from error
    if not found:
        raise PassageError(f"{file}: there is no text in it")
    random.shuffle(found)
    taken, room = found[:1], most_nbytes - len(found[0].encode())
    for piece in found[1:]:
        room -= len(piece.encode())
        if room < 0:
            break
        taken.append(piece)
    return taken


def _slices(nbytes: int, random: Random) -> list[tuple[int, int]]:
    """The ranges of a file that are looked at: all of it in one, or one somewhere in each of `MOST_SLICES` parts."""
    if nbytes <= MOST_SLICES * SLICE_NBYTES:
        return [(0, nbytes)]
    part = nbytes // MOST_SLICES
    begins = [number * part + random.randrange(part - SLICE_NBYTES + 1) for number in range(MOST_SLICES)]
    return [(begin, begin + SLICE_NBYTES) for begin in begins]


def _plain_texts(file: str, stream: BinaryIO, slices: Sequence[tuple[int, int]]) -> Iterator[str]:
    for begin, end in slices:
        stream.seek(begin)
        content = stream.read(end - begin)
        if b"\0" in content:
            raise PassageError(f"{file}: is not text; name a file of text, or of JSON lines")
        if len(slices) > 1:
            content = re.sub(rb"\A\S*\s|\s\S*\Z", b"", content)  # from the first whole word up to the last
            content = re.sub(rb"\A[\x80-\xbf]+|[\xc0-\xff][\x80-\xbf]*\Z", b"", content)  # and no part of a character
        try:
            yield content.decode("utf-8" if begin else "utf-8-sig")  # which leaves a byte order mark out
        except UnicodeDecodeError as error:
            at = begin + error.start
            raise PassageError(f"{file}: is not UTF-8 text (near byte {at:,}): save it as UTF-8") from None


def _json_texts(file: str, stream: BinaryIO, slices: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Of each slice, of all lines that begin in it; at the least of one, since a line may be longer than a slice."""
    at = number = 0
    for begin, end in slices:
        is_whole = begin <= at  # or the slice begins somewhere in a line
        at = stream.seek(max(at, begin))  # no line is taken twice
        while line := stream.readline(MAX_LINE_NBYTES + 1):
            number += 1
            # Of a file that is not read whole it is not known which line that is.
            where = f"{file}: line {number:,}" if len(slices) == 1 else f"{file}: the line at byte {at:,}"
            if len(line.removesuffix(b"\n")) > MAX_LINE_NBYTES:
                raise PassageError(f"{where} is longer than 1 MiB; {WANTED}")
            text = line if at else line.removeprefix(BOM_UTF8)
            at += len(line)
            if is_whole:
                if text.strip():
                    yield _text(where, text)
                if at >= end:
                    break
            is_whole = True


def _text(where: str, line: bytes) -> str:
    try:
        text = parse_object(line).get(TEXT)
    except JSONError as error:
        raise PassageError(f"{where} {error}; {WANTED}") from None
    if text is None:
        raise PassageError(f"{where} has no `{TEXT}`; {WANTED}")
    if not isinstance(text, str):
        raise PassageError(f"{where}: `{TEXT}` is {show(text)}; {WANTED}")
    return text


def _pieces(text: str) -> Iterator[str]:
    """`text`, cut at white space into pieces of about `NBYTES`. None is white space alone."""
    piece: list[str] = []
    room = NBYTES
    for word in re.findall(r"\s*\S+", text.rstrip()):  # or white space at the end takes quadratic time
        for part in (word[at : at + NBYTES] for at in range(0, len(word), NBYTES)):  # text without any white space
            size = len(part.encode())
            if size > room:
                if words := "".join(piece).lstrip():
                    yield words
                piece, room = [], NBYTES
            piece.append(part)
            room -= size
    if piece:
        yield "".join(piece).lstrip()
