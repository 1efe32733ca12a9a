"""What was measured is not lost when nobody is there to read it."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from benchmarks.publishing import publish


class Gone(io.StringIO):
    """A terminal, or a `tee`, that has ended."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_the_report_is_written_before_anything_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "some_plots", SimpleNamespace(draw=lambda *_: ["plot.png"]))
    views = SimpleNamespace(to_json=lambda _: "{}", to_markdown=lambda _, drawn: "#", to_terminal=lambda _: "table")
    with pytest.raises(SystemExit):
        publish(None, tmp_path, Console(file=Gone()), views=views, plots="some_plots")
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json"}
