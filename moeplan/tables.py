"""Tables for terminals: of columns, and of a word before what there is to say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], gap: int = 2) -> Table:
    """A table without lines, with a `gap` between columns. One whose name ends in `>` is for numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    for column in columns:
        is_number = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def fact(name: str, lines: Sequence[str]) -> Table:
    """`name`, bold, before `lines`, which stand one below the other, and go on there where they are too long."""
    table = Table.grid()
    table.add_column(width=8, style="bold")
    table.add_column(overflow="fold")
    table.add_row(name, Text("\n".join(lines)))
    return table
