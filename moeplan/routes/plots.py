"""The page's plots, drawn with matplotlib as SVG that takes its colours from the page, light or dark.

Only this module imports matplotlib. Colours are placeholders that become CSS variables; cells are one hue, as opaque
as their value is large, so that they suit any background, and text on them can be read at every value.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # not in every version

WIDTH = 4.8
"""In inches. At this width a font of 10.5 points is read on a phone, where plots shrink, and on a desktop."""

INK, MUTED, BLUE, ORANGE, GREEN = "#010101", "#020202", "#030303", "#040404", "#050505"
STYLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
}
POSITIVE, NEGATIVE = (26, 117, 209), (196, 84, 10)
"""Of a luminance near 0.18, where black and white have the same contrast, 4.6 : 1."""

MAX_NUMBERS = 10
"""With more columns, cells are too narrow for numbers."""

SETTINGS: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may have a $
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


@contextmanager
def _settings() -> Iterator[None]:
    """matplotlib as it is by default, whatever its user's settings are, but for ours."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for name, value in SETTINGS.items():
            matplotlib.rcParams[name] = value
        yield


@_settings()
def heat_map(
    label: str,
    values: np.ndarray,
    columns: str,
    rows: str | Sequence[str],
    *,
    outlined: Sequence[tuple[int, int]] = (),
    signed: bool = False,
    limit: float = math.inf,
) -> str:
    """An SVG of `values`, `[rows, columns]`, as coloured cells: cosines between −1 and 1 if `signed`, else shares.

    `label` is what a screen reader says, `columns` names the axis below, `rows` the one on the left, or each row.
    Shares of `limit` or more have one colour.
    """
    num_rows, num_columns = values.shape
    numbered = num_columns <= MAX_NUMBERS
    most = 1.0 if signed or not np.isfinite(values).any() else max(min(float(np.nanmax(values)), limit), 1e-6)
    square = num_rows == num_columns and not numbered
    height = WIDTH * 0.85 if square else min(6.5, max(1.0, num_rows * (0.3 if numbered else 0.13)))
    figure = Figure(figsize=(WIDTH, height + 1.15), layout="constrained")
    axes, scale = figure.subplots(2, 1, height_ratios=[height, 0.13])
    axes.imshow(_colours(values / most), aspect="auto", interpolation="none")
    axes.set_xlabel(columns)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if isinstance(rows, str):
        axes.set_ylabel(rows)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=max(2, min(10, num_rows))))
    else:
        axes.set_yticks(range(num_rows), rows, fontsize=9.5)
    if numbered:
        _write_numbers(axes, values, signed)
    for row, column in outlined:
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.2 if numbered else 0.35)
        )
    _draw_scale(scale, most, signed, is_cut=bool((values > most).any()))
    return _svg(figure, label)


@_settings()
def layer_lines(label: str, layers: Sequence[dict[str, Any]], among: int | None, num_experts: int) -> str:
    """An SVG of agreement (of the best expert, and `among` so many), entropy and load balance over the layers."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    marker = "o" if len(layers) <= 40 else ""
    lines = [("agreement_top1", "agreement: first", BLUE, "-"), ("entropy", "entropy", ORANGE, ":")]
    if among:
        lines[1:1] = [("agreement_topk", f"agreement: among {among}", GREEN, "--")]
    for key, name, colour, dashes in lines:
        values = _over_layers(layers, key)
        if np.isfinite(values).any():
            above.plot(100 * values, dashes, label=name, color=colour, marker=marker, markersize=3.5, linewidth=1.8)
    if np.isfinite(_over_layers(layers, "agreement_top1")).any():
        above.axhline(100 / num_experts, label="chance, first", color=MUTED, linestyle=(0, (1, 3)), linewidth=1.5)
    above.set_ylim(0, 103)
    above.set_ylabel("per cent")
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9.5)
    balance = _over_layers(layers, "load_balance")
    below.plot(balance, color=BLUE, marker=marker, markersize=3.5, linewidth=1.8)
    below.axhline(1, color=MUTED, linestyle=(0, (1, 3)), linewidth=1.5)
    below.set_ylabel("load balance")
    top = float(np.nanmax(balance)) if np.isfinite(balance).any() else 1.0
    below.set_ylim(
        min(0.95, float(np.nanmin(balance)) - 0.02) if np.isfinite(balance).any() else 0, max(1.25, 1.05 * top)
    )
    below.set_xlabel("layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure, label)


def _over_layers(layers: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([layer[key] for layer in layers], dtype=float)


def _colours(parts: np.ndarray) -> np.ndarray:
    """RGBA, `[rows, columns, 4]`, of parts of the largest value, between −1 and 1; transparent where NaN."""
    known = np.nan_to_num(parts)
    colours = np.empty((*parts.shape, 4), dtype=np.uint8)
    colours[..., :3] = np.where(known[..., np.newaxis] < 0, NEGATIVE, POSITIVE)
    colours[..., 3] = np.rint(255 * np.clip(np.abs(known), 0, 1))
    return colours


def _write_numbers(axes: Axes, values: np.ndarray, signed: bool) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            number = f"{value:z.2f}".replace("-", "−") if signed else f"{100 * value:.0f}"
            axes.text(column, row, number, ha="center", va="center_baseline", fontsize=9)


def _draw_scale(axes: Axes, most: float, signed: bool, *, is_cut: bool) -> None:
    """What the colours mean."""
    least = -most if signed else 0.0
    values = np.linspace(least, most, 101)[np.newaxis]
    extent = (least, most, 0.0, 1.0)
    axes.imshow(_colours(values / most), aspect="auto", interpolation="none", extent=extent)
    ticks = [-1.0, 0.0, 1.0] if signed else [0.0, most / 2, most]
    digits = 1 if most < 0.095 else 0
    names = [f"{tick:.0f}".replace("-", "−") if signed else f"{100 * tick:.{digits}f} %" for tick in ticks]
    if is_cut:
        names[-1] = f"≥ {names[-1]}"
    axes.set_xticks(ticks, names)
    axes.set_yticks([])


def _svg(figure: Figure, label: str) -> str:
    """The figure as an element for a page: no declarations, no metadata, no size, no ids that others may have."""
    file = io.StringIO()
    with warnings.catch_warnings():
        # Fonts are the browser's, so it does not matter which glyphs matplotlib's lack.
        warnings.simplefilter("ignore", UserWarning)
        matplotlib.rcParams["svg.hashsalt"] = label  # ids follow from it, and are the same in every run
        figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub("<[^>]*>", _tag, text)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height|version)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{html.escape(label)}">{rest}'


def _tag(found: re.Match[str]) -> str:
    """A tag as the page has it. What stands between tags are names, whatever they look like."""
    tag = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", found[0])
    for placeholder, colour in STYLES.items():
        tag = tag.replace(placeholder, colour)
    return tag
