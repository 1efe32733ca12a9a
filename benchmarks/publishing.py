"""Writes what was measured: a table in the terminal, Markdown and JSON, and plots where matplotlib is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console


def publish(measured: Any, out: Path, console: Console, *, views: ModuleType, plots: str) -> None:
    """Write `measured` to the directory `out`, which is there.

    `views` has `to_terminal`, `to_json` and `to_markdown` for it; the module named `plots`, which needs matplotlib, has
    `draw`.
    """
    (out / "report.json").write_text(views.to_json(measured), encoding="utf-8")
    drawable = find_spec("matplotlib") is not None
    drawn: list[str] = import_module(plots).draw(measured, out) if drawable else []
    (out / "report.md").write_text(views.to_markdown(measured, drawn), encoding="utf-8")
    # Printing is last, since who reads may be gone: Ctrl-C ends a `tee`, too.
    if not drawable:
        console.print("no plots, because matplotlib is missing: pip install '.[bench]'", markup=False)
    console.print(views.to_terminal(measured))
    console.print(f"\n{', '.join(['report.md', 'report.json', *drawn])}: in {out}", soft_wrap=True)
