"""What `moeplan routes` prints."""

from __future__ import annotations

import io
import re
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from routes_cases import example

from moeplan.routes.statistics import Routes, Text
from moeplan.routes.view import COLOURS, WIDTH, HeatMap, _luminance, _style, _ticks, routes_view
from moeplan.routes.wording import best, decimals, layer_columns, percent

SIZES = [(1, 1, 1), (2, 4, 2), (3, 2, 1), (4, 4, 2), (10, 32, 2), (17, 40, 2), (64, 32, 8), (130, 5, 4)]


def printed(found: Routes, *, colours: bool = False, no_color: bool = False, width: int = WIDTH) -> str:
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        force_terminal=colours,
        color_system="truecolor" if colours else None,
        no_color=no_color,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(routes_view(found.to_data(), width))
    return file.getvalue()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@cache
def with_short_names(num_experts: int, num_layers: int, experts_per_token: int) -> Routes:
    return example(num_experts, num_layers, experts_per_token, names=[f"m/{expert}" for expert in range(num_experts)])


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [WIDTH, 60, 40])
def test_nothing_is_wider_than_80_columns_or_the_terminal(
    width: int, size: tuple[int, int, int], colours: bool
) -> None:
    found = with_short_names(*size)
    text = without_codes(printed(found, colours=colours, width=width))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text, "nothing is cut off"
    data, words = found.to_data(), " ".join(text.split())
    assert [column for column in layer_columns(data) if column not in text] == []
    if "most of it goes to" in text:
        listed = [int(name) for name in re.findall(r"^m/(\d+) ", text, re.MULTILINE)]
        assert [index for index in listed if best(data["overall"]["text_top1"][index]) not in words] == []


@pytest.mark.parametrize("width", [WIDTH, 60, 40])
@pytest.mark.parametrize("experts", [2, 6, 7, 10, 17, 38, 64, 130])
def test_each_expert_has_a_cell_and_every_so_many_a_number(experts: int, width: int) -> None:
    file = io.StringIO()
    Console(file=file, width=width).print(HeatMap("title", np.ones((1, experts)), ["31"], room=width))
    lines = file.getvalue().splitlines()
    cells = "".join(line[3:] for line in lines if line.startswith("31 "))
    with_numbers, wide = "100" in cells, cells.count("█") == 2 * experts
    assert (cells.count("100") if with_numbers else cells.count("█") // (1 + wide)) == experts
    numbers = [int(number) for line in lines if re.fullmatch(r" [\d ]+", line) for number in line.split()]
    every = 1 if with_numbers else 2 if wide else 5
    assert numbers == [number for number in range(0, experts, every) if number in numbers]
    assert len(numbers) >= experts // every - 1


def test_a_number_that_there_is_no_room_for_is_left_out() -> None:
    assert _ticks(0, 76, 1, 76).split() == [str(number) for number in range(0, 75, 5)]
    assert _ticks(0, 76, 1, 77).split() == [str(number) for number in range(0, 76, 5)]


def test_what_is_not_a_terminal_gets_the_same_and_no_codes() -> None:
    assert "\x1b" not in printed(example(64, 32))
    wide = printed(example(4, 4), width=10_000)
    assert [line.rstrip() for line in wide.splitlines()] == [
        line.rstrip() for line in printed(example(4, 4)).splitlines()
    ]


def test_cells_of_few_experts_have_numbers() -> None:
    found = example(4, 4)
    line = next(line for line in printed(found).splitlines() if line.startswith("0 "))
    first = [round(100 * share) for share in found.layers[0].numbers.top1]
    among = [round(100 * share) for share in found.layers[0].numbers.topk]
    assert [int(number) for number in line.split()] == [0, *first, 0, *among]


def test_cells_of_many_experts_are_shaded_without_colours() -> None:
    text = printed(example(64, 4, preference=6.0))
    assert re.search(r"[░▒▓█]{3}", text)
    assert not re.search(r"[░▒▓█]", printed(example(64, 4), colours=True))


def test_a_terminal_that_is_to_show_no_colours_gets_shades() -> None:
    assert re.search(r"[░▒▓█]{3}", printed(example(64, 4, preference=6.0), colours=True, no_color=True))


def test_where_shades_cannot_be_written_other_characters_stand_for_them() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    Console(file=file, width=WIDTH).print(routes_view(example(64, 4, preference=6.0).to_data(), WIDTH))
    file.seek(0)
    assert re.search(r"\n0 +[ .:*#]{60,}\n", file.read())


def test_what_there_is_one_of_is_not_said_in_the_plural() -> None:
    assert "1 expert, 1 per token, 1 layer, gate_mode" in printed(example(1, 1, 1))
    assert "200 tokens in 1 text, 200 of them held out" in printed(example(1, 1, 1))


def test_many_layers_are_shown_as_means_of_neighbours() -> None:
    lines = printed(example(4, 80)).splitlines()
    assert sum(line.startswith("77–79 ") for line in lines) == 2


def test_what_the_last_row_has_means_of_is_said() -> None:
    said = "\nall: means over layers, but the largest cosine and condition\n"
    assert said in printed(example(4, 4))
    assert said not in printed(example(4, 1))


def test_the_expert_that_a_text_belongs_to_is_marked() -> None:
    text = printed(example(3, 4, more_texts=[Text("notes.txt", None, 90, True)]))
    [line] = [line for line in text.splitlines() if line.startswith("models/1 ")]
    assert re.search(r"models/1 +\d+ +\[\d+\] +\d+ *$", line)
    [line] = [line for line in text.splitlines() if line.startswith("notes.txt")]
    assert "[" not in line


def test_of_many_texts_those_are_listed_that_agree_least() -> None:
    found = example(64, 4)
    text = printed(found)
    assert "the 16 of 64 texts that agree least" in text
    agreement = [found.overall.text_top1[expert, expert] for expert in range(64)]
    listed = [int(number) for number in re.findall(r"^models/(\d+) ", text, re.MULTILINE)]
    assert listed == sorted(np.argsort(agreement, kind="stable")[:16])


def test_advice_and_degenerate_layers_are_shown() -> None:
    text = printed(example(3, 2, preference=0.0))
    assert re.search(r"advice\n- .* chance", text)
    assert "nothing: no problem was found" in printed(example())


def test_names_cannot_write_to_the_terminal() -> None:
    hostile = "\x1b]0;title\x07\x1b[2J[red]"
    found = example(2, 2, names=[hostile, "b"], subject=hostile, more_texts=[Text(hostile, None, 70, True)])
    text = printed(found)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"\x1b[2J[red]" in text


def test_cells_stand_below_each_other_whatever_the_width_of_names() -> None:
    text = printed(example(4, 2, names=["模型/医生助手", "models/b", "モデル" * 14, "d"]))
    _, _, confusion = text.partition("text: best expert")
    lines = [line for line in confusion.splitlines() if re.search(r"\[\d+\]", line)]
    assert [cell_len(line.partition("[")[0]) for line in lines] == [41, 46, 51, 56]


def test_text_on_every_colour_can_be_read() -> None:
    """By WCAG's contrast of 4.5 : 1."""
    for share in np.linspace(0, 1, 101):
        style = _style(share, 1.0)
        colours = [colour.get_truecolor() for colour in (style.color, style.bgcolor) if colour is not None]
        dark, light = sorted(map(_luminance, colours))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_colours_get_lighter_in_even_steps() -> None:
    lightness = [_luminance(colour) ** (1 / 2.4) for colour in COLOURS]
    assert all(low < high for low, high in pairwise(lightness))


def test_a_text_without_tokens_has_cells_without_numbers() -> None:
    lines = printed(example(3, 2, more_texts=[Text("empty.txt", None, 0, True)])).splitlines()
    assert [line.split() for line in lines if line.startswith("empty.txt")] == [["empty.txt"]]


def test_shares_have_two_digits_and_tenths_at_most() -> None:
    shares = (0, 0.0004, 0.0005, 0.016, 0.0996, 0.384, 1, None)
    assert [percent(share) for share in shares] == ["0 %", "< 0.1 %", "0.1 %", "1.6 %", "10 %", "38 %", "100 %", ""]


def test_what_is_nearly_nothing_is_not_less_than_nothing() -> None:
    assert decimals(-0.004) == "0.00"
    assert decimals(-0.006) == "-0.01"
