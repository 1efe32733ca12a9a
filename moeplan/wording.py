"""How numbers are written for people, in messages and on the model card, and how text that is a stranger's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


def runs(numbers: Sequence[int]) -> str:
    """`0-3, 7`, for ascending numbers."""
    found = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def count(number: int, thing: str) -> str:
    """`1 text`, `2,000 tokens`."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey, and no terminal can show, but line ends."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
