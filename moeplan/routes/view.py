"""What `moeplan routes` prints: a heat map of each layer's experts, which text goes where, numbers, advice.

Everything is drawn for 80 columns, or fewer where a terminal has no more, and is as readable without colours: then
cells are shaded by characters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from moeplan.routes.wording import CUT, among, best, layer_cells, layer_columns, percent, shortened
from moeplan.tables import fact, plain_table
from moeplan.wording import count, printable

WIDTH = 80
"""What fits most terminals. Nothing is drawn wider."""

MAX_ROWS = 32
"""More layers are shown as means of neighbours."""

MAX_CONFUSION = 10
"""With more experts, only those that get most of a text are listed: cells of all would not fit."""

MIN_NAME = 8
"""Where there is less room for the names of texts beside cells, they are listed, too."""

MAX_TEXTS = 16
"""With more texts, only those that agree least with their label are listed."""

NUMBER_WIDTH = 4
SHADES = " ░▒▓█"
ASCII_SHADES = " .:*#"
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Viridis (Smith and van der Walt, 2015): even steps of lightness, for every kind of sight. Cells have a colour of
text, too, so they read the same on a light and a dark terminal."""


@dataclass(frozen=True)
class HeatMap:
    """Shares as cells of a colour each, as wide as fit: with numbers (per cent), or without."""

    title: str
    shares: np.ndarray
    """`[rows, columns]`, NaN where there is none."""
    rows: Sequence[str]
    marked: frozenset[tuple[int, int]] = frozenset()
    """Cells whose numbers stand in brackets."""
    limit: float = math.inf
    """Larger shares have the colour of this one."""
    room: int = WIDTH
    """How wide it may be."""

    def width(self) -> int:
        return max(len(self.title), self._label_width() + int(self.shares.shape[1]) * self._cell_width())

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self.width(), self.width())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        colours = console.color_system is not None and not console.no_color
        shades = None if colours else ASCII_SHADES if options.ascii_only else SHADES
        cells, label = self._cell_width(), self._label_width()
        columns = max(1, (self.room - label) // cells)
        largest = float(np.nanmax(self.shares)) if np.isfinite(self.shares).any() else 0.0
        most = min(largest, self.limit)
        for start in range(0, self.shares.shape[1], columns):
            stop = min(start + columns, self.shares.shape[1])
            yield Text(" " * label + _ticks(start, stop, cells, self.room - label), style="dim", no_wrap=True)
            for row, name in enumerate(self.rows):
                line = Text(name + " " * (label - cell_len(name)), no_wrap=True)
                for column in range(start, stop):
                    line.append_text(self._cell(row, column, cells, most, shades))
                yield line
        yield self._legend(most, label, shades, is_cut=largest > most)

    def _label_width(self) -> int:
        return max(map(cell_len, self.rows)) + 1

    def _cell_width(self) -> int:
        """Wide enough for numbers if all columns fit so, else as wide as fits, at least 1."""
        room = (self.room - self._label_width()) // int(self.shares.shape[1])
        wide = NUMBER_WIDTH + bool(self.marked)
        return wide if room >= wide else 2 if room >= 2 else 1

    def _cell(self, row: int, column: int, cells: int, most: float, shades: str | None) -> Text:
        """A cell of a colour, or, where there are `shades`, of one of these or a number."""
        share = float(self.shares[row, column])
        text = " " * cells
        if share != share:
            return Text(text)
        if cells >= NUMBER_WIDTH:
            number = f"[{100 * share:.0f}]" if (row, column) in self.marked else f"{100 * share:.0f} "
            text = f"{number:>{cells}}"
        elif shades:
            text = _shade(share, most, shades) * cells
        return Text(text, style="" if shades else _style(share, most))

    def _legend(self, most: float, label: int, shades: str | None, *, is_cut: bool) -> Text:
        """What the darkest and the brightest cell mean."""
        if self._cell_width() >= NUMBER_WIDTH:
            return Text(" " * label + "per cent", style="dim")
        line = Text(" " * label + "0 % ", style="dim")
        for step in range(9):
            share = most * step / 8
            line.append(_shade(share, most, shades or " "), style="" if shades else _style(share, most))
        return line.append(f" {percent(most)}{' or more' * is_cut}")


def routes_view(data: dict[str, Any], columns: int) -> RenderableType:
    """What `moeplan routes` prints, from `Routes.to_data()`, where there are so many `columns`."""
    width = min(WIDTH, columns)
    parts: list[RenderableType] = [_facts(data)]
    parts += [Text(), *_heat_maps(data, width)]
    parts += [Text(), _confusion(data, width), Text(), *_tables(data, width), Text(), _advice(data)]
    return Group(*parts)


def _facts(data: dict[str, Any]) -> RenderableType:
    texts, k = data["texts"], data["experts_per_token"]
    held_out = sum(text["tokens"] for text in texts if text["held_out"])
    tokens = sum(text["tokens"] for text in texts)
    mode = f", gate_mode {printable(data['gate_mode'])}" if data["gate_mode"] else ""
    overall = data["overall"]
    num_experts = len(data["experts"])
    lines = [
        ("routes", [printable(data["subject"])]),
        ("", [f"{count(num_experts, 'expert')}, {k} per token, {count(len(data['layers']), 'layer')}{mode}"]),
        ("text", [f"{count(tokens, 'token')} in {count(len(texts), 'text')}, {held_out:,} of them held out"]),
    ]
    if overall["agreement_top1"] is not None:
        said = [
            f"{percent(overall['agreement_top1'])} of tokens go first to their own text's expert "
            f"(chance: {percent(1 / num_experts)})"
        ]
        if among(data):
            said.append(
                f"{percent(overall['agreement_topk'])} have it among their {k} (chance: {percent(k / num_experts)})"
            )
        lines.append(("agree", said))
    return Group(*(fact(name, said) for name, said in lines))


def _heat_maps(data: dict[str, Any], width: int) -> Iterator[RenderableType]:
    """Layers by experts: who comes first, and who works, where that is another question."""
    num_experts, groups = len(data["experts"]), _groups(len(data["layers"]))
    labels = [_span(group) for group in groups]
    maps = [HeatMap("layer: best expert", _grouped(data, "top1", groups), labels, limit=CUT / num_experts, room=width)]
    if k := among(data):
        title, limit = f"layer: among the best {k}", CUT * k / num_experts
        maps.append(HeatMap(title, _grouped(data, "topk", groups), labels, limit=limit, room=width))
    if len(maps) == 2 and sum(map(HeatMap.width, maps)) + 4 <= width:
        beside = Table.grid(padding=(0, 4, 0, 0))
        beside.add_row(*maps)
        yield beside
        return
    for index, heat_map in enumerate(maps):
        yield from [Text()] * bool(index)
        yield heat_map


def _confusion(data: dict[str, Any], width: int) -> RenderableType:
    """Which text goes to which expert first, on average over layers."""
    shares, title = data["overall"]["text_top1"], "text: best expert, mean over layers"
    shown = _shown_texts(data)
    if len(shown) < len(data["texts"]):
        title += f" (the {len(shown)} of {len(data['texts'])} texts that agree least)"
    names = [printable(data["texts"][index]["name"]) for index in shown]
    left = width - 1 - len(data["experts"]) * (NUMBER_WIDTH + 1)
    if len(data["experts"]) <= MAX_CONFUSION and left >= MIN_NAME:
        names = [shortened(name, min(40, left)) for name in names]
        marked = frozenset(
            (row, data["texts"][index]["expert"])
            for row, index in enumerate(shown)
            if data["texts"][index]["expert"] is not None
        )
        return HeatMap(title, np.array([shares[index] for index in shown], dtype=float), names, marked, room=width)
    rows = []
    for name, index in zip(names, shown, strict=True):
        expert = data["texts"][index]["expert"]
        own = "" if expert is None else f"{expert}: {percent(shares[index][expert])}"
        rows.append((shortened(name, min(28, max(MIN_NAME, width // 2 - 12))), own, best(shares[index])))
    return Group(Text(title, style="bold"), plain_table(("text", "its expert>", "most of it goes to"), rows))


def _shown_texts(data: dict[str, Any]) -> list[int]:
    """The places of the texts to show, in order."""
    texts, shares = data["texts"], data["overall"]["text_top1"]

    def agreement(index: int) -> float:
        expert = texts[index]["expert"]
        return -1.0 if expert is None else shares[index][expert] or 0.0

    return sorted(sorted(range(len(texts)), key=agreement)[:MAX_TEXTS])


def _tables(data: dict[str, Any], width: int) -> Iterator[RenderableType]:
    """Layers in numbers, in one table, or, where that would be wider, in several with some of its columns."""
    layers = data["layers"]
    any_degenerate = any(layer["degenerate"] for layer in layers)
    columns = ["layer", *(f"{column}>" for column in layer_columns(data)), *["degenerate"] * any_degenerate]
    rows = []
    for group in _groups(len(layers)):
        members = [layers[index] for index in group]
        degenerate = any(layer["degenerate"] for layer in members)
        rows.append([_span(group), *layer_cells(data, members), *["yes" if degenerate else ""] * any_degenerate])
    if len(layers) > 1:
        rows.append(["all", *layer_cells(data, layers), *[""] * any_degenerate])
    for number, part in enumerate(_parts([[column.rstrip(">") for column in columns], *rows], width)):
        yield from [Text()] * bool(number)
        table = plain_table([columns[column] for column in part], [[row[c] for c in part] for row in rows], gap=1)
        if len(layers) > 1:
            table.rows[-1].style = "bold"
        yield table
    if len(layers) > 1:
        yield Text("all: means over layers, but the largest cosine and condition", style="dim")


def _parts(rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of a table, in parts that are no wider, each with the first column."""
    first, *widths = [max(map(len, cells)) + 1 for cells in zip(*rows, strict=True)]
    parts, left = [[0]], width - first
    for column, of_column in enumerate(widths, 1):
        if of_column > left and len(parts[-1]) > 1:
            parts.append([0])
            left = width - first
        parts[-1].append(column)
        left -= of_column
    return parts


def _advice(data: dict[str, Any]) -> RenderableType:
    sentences = Table.grid(padding=(0, 1))
    for sentence in data["advice"] or ["nothing: no problem was found"]:
        sentences.add_row("-", printable(sentence))
    return Group(Text("advice", style="bold"), sentences)


def _groups(layers: int) -> list[range]:
    """All layers in at most `MAX_ROWS` groups of neighbours, as even as they can be."""
    count = min(layers, MAX_ROWS)
    return [range(layers * group // count, layers * (group + 1) // count) for group in range(count)]


def _span(group: range) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}"


def _grouped(data: dict[str, Any], key: str, groups: Iterable[range]) -> np.ndarray:
    """`[groups, num_experts]`: means over layers."""
    shares = np.array([layer[key] for layer in data["layers"]], dtype=float)
    return np.array([shares[group.start : group.stop].mean(axis=0) for group in groups])


def _ticks(start: int, stop: int, cells: int, room: int) -> str:
    """The experts' numbers, as far apart as they need to be, as far as there is room."""
    if cells >= NUMBER_WIDTH:
        return "".join(f"{column} ".rjust(cells) for column in range(start, stop))
    line = ""
    for column in range(start, stop):
        gap = (column - start) * cells
        if column % (2 if cells == 2 else 5) == 0 and gap + len(str(column)) <= room:
            line = line.ljust(gap) + str(column)
    return line


def _shade(share: float, most: float, shades: str) -> str:
    return shades[round((len(shades) - 1) * _part(share, most))]


def _style(share: float, most: float) -> Style:
    place = _part(share, most) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    colour = [round(a + (b - a) * (place - low)) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True)]
    red, green, blue = colour
    # Black and white have the same contrast on a luminance of 0.18 (WCAG 2.1: (1 + 0.05) / (L + 0.05)).
    text = "#000000" if _luminance(colour) > 0.18 else "#ffffff"
    return Style.parse(f"{text} on #{red:02x}{green:02x}{blue:02x}")


def _luminance(colour: Sequence[int]) -> float:
    """WCAG's relative luminance of an sRGB colour, 0 to 255 each."""
    linear = [(part / 255 / 12.92) if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _part(share: float, most: float) -> float:
    return min(share / most, 1.0) if most > 0 else 0.0
