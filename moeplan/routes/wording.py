"""How numbers and names of `Routes.to_data()` are written: in sentences, in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len


def percent(share: float | None) -> str:
    """`38 %`, `1.6 %`, `0 %`: a share to two digits, and to tenths at most; nothing where it is not known."""
    if share is None:
        return ""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.0995 else f"{100 * share:.0f} %"


def decimals(number: float | None) -> str:
    """`1.04`; nothing where it is not known."""
    return "" if number is None else f"{number:z.2f}"


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def closest(cosine: Sequence[Sequence[float | None]]) -> float | None:
    """The largest cosine between two different rows; None where none is known."""
    known = [value for row, values in enumerate(cosine) for value in values[:row] if value is not None]
    return max(known, default=None)


def among(data: dict[str, Any]) -> int | None:
    """`experts_per_token`, where who works on a token is another question than who comes first; else None."""
    k = data["experts_per_token"]
    return k if 1 < k < len(data["experts"]) else None


CUT = 4
"""Cells of layers are coloured by shares up to this many times an even one, lest one expert of one layer hide how all
others differ."""


def best(shares: Sequence[float | None]) -> str:
    """`3: 41 %, 7: 22 %, 1: 9 %`: the experts that get most."""
    ranked = sorted(range(len(shares)), key=lambda expert: (-(shares[expert] or 0.0), expert))
    return ", ".join(f"{expert}: {percent(shares[expert])}" for expert in ranked[:3] if shares[expert])


def shortened(name: str, width: int) -> str:
    """The end of a name says most: `…/models/doctor`. A character may be as wide as two."""
    if cell_len(name) <= width:
        return name
    end = name[1 - width :]
    while cell_len(end) >= width:
        end = end[1:]
    return f"…{end}"


def layer_columns(data: dict[str, Any]) -> list[str]:
    """What `layer_cells` gives, in words short enough for a terminal."""
    agreement = ["agree 1", *([f"agree {k}"] if (k := among(data)) else [])]
    return [
        *(agreement if data["overall"]["agreement_top1"] is not None else []),
        "entropy",
        "weight",
        "balance",
        "cosine",
        "condition",
    ]


def layer_cells(data: dict[str, Any], layers: Sequence[dict[str, Any]]) -> list[str]:
    """Means over some `layers` of `data`, but the worst of them for the condition number and the closest rows."""
    keys = ["agreement_top1", *(["agreement_topk"] if among(data) else [])]
    if data["overall"]["agreement_top1"] is None:
        keys = []
    shares = [percent(mean([layer[key] for layer in layers])) for key in (*keys, "entropy", "first_weight")]
    conditions = [layer["condition"] for layer in layers]
    cosines = [cosine for layer in layers if (cosine := closest(layer["cosine"])) is not None]
    return [
        *shares,
        decimals(mean([layer["load_balance"] for layer in layers])),
        decimals(max(cosines, default=None)),
        "∞" if None in conditions else f"{max(conditions):.3g}",
    ]
