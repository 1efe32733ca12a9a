"""JSON from strangers, read in bounded time and memory.

Config files, indexes and safetensors headers are downloaded. Python's own parser takes more than JSON allows (NaN, lone
surrogates, a key twice), makes infinity of 1e999, and builds fifty bytes of objects from two bytes of text; this one
refuses all of it. How long the text may be is for the caller to say, before it reads it.
"""

import json
import math
import re
import reprlib
from collections import Counter
from typing import Any, NoReturn

MAX_VALUES = 320_000
"""The most values one text may hold. A safetensors header has nine for each tensor: this is 35,000 in one file."""

MAX_DEPTH = 64
"""The deepest nesting taken. Real files have five levels; what is written out again must fit any parser's stack."""

_MAX_INT_DIGITS = 20  # of 2**64 - 1: what is longer is a float to serde_json, and int() takes quadratic time
_LONE_SURROGATE_CANDIDATE = re.compile(rb"\\u[dD][89a-fA-F]")

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100


class JSONError(ValueError):
    """The text is not a JSON object, or is larger than any honest one. The message is a predicate: "is not UTF-8"."""


def show(value: object) -> str:
    """`value` as a message may hold it: short, and with nothing in it that a terminal obeys."""
    return _brief.repr(value)


def parse_object(text: bytes, max_values: int = MAX_VALUES, *, holds_paths: bool = False) -> dict[str, Any]:
    """The JSON object that `text` is. Whole numbers of over 20 digits, and -0, are floats.

    `holds_paths` takes halves of surrogate pairs, too, by which Python spells the bytes of a path that are not UTF-8.
    Raises JSONError.
    """
    # Every value but the outermost follows one of these three, or a key that does.
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise JSONError(f"holds more than {max_values:,} JSON values; no real checkpoint has so many")
    try:
        value = _decoder.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise JSONError(f"is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise JSONError(f"is not JSON ({error})") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise JSONError(f"is not a JSON object but {show(value)}")
    _check_depth(value)
    if not holds_paths and _LONE_SURROGATE_CANDIDATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise JSONError("holds half of a surrogate pair, which is not a character") from None
    return value


def _too_deep() -> JSONError:
    return JSONError(f"is nested more than {MAX_DEPTH} levels deep; no real checkpoint is")


def _check_depth(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise JSONError(f"has the key {show(key)} twice")
    return result


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_INT_DIGITS and digits != "-0" else _float(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JSONError(f"holds the number {show(digits)}, which is beyond what a float can be")
    return value


def _constant(name: str) -> NoReturn:
    raise JSONError(f"is not JSON: it holds {name}")


_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)
