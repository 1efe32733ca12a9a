"""Plots can be read."""

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.cases import MEMORY_CAPS
from benchmarks.contenders import moeplan
from benchmarks.results import CaseResult, Machine, Report, Result, not_run


def test_memory_caps_are_not_printed_over_each_other() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import _over_memory_caps

    capped = []
    for cap in MEMORY_CAPS:
        plan = {"memory": {"cap_nbytes": int(cap.removesuffix("MiB")) << 20}}
        run = replace(not_run(""), error=None, seconds=1.0, peak_rss_nbytes=80 << 20, printed={"plan": plan})
        capped.append(Result(moeplan("--max-memory", cap).name, (run,)))
    measured = CaseResult("memory", "memory", "", read_nbytes=0, output_nbytes=0, results=tuple(capped))
    figure = _over_memory_caps(Report("now", 1.0, 1, False, False, Machine("", 1, 1, "", "", 0.0, 0.0), (measured,)))
    figure.draw_without_rendering()
    for axes in figure.axes:
        labels = axes.get_xticklabels()
        assert [f"{label.get_text()}MiB" for label in labels] == list(MEMORY_CAPS)
        assert all(left.get_window_extent().x1 < right.get_window_extent().x0 for left, right in pairwise(labels))
