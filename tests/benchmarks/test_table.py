"""What the table says beside the numbers."""

from dataclasses import replace

import pytest

from benchmarks.results import not_run
from benchmarks.table import _note


@pytest.mark.parametrize(("growth", "said"), [(-4096, "adds 0.00 GB"), (6_770_000_000, "adds 6.77 GB")])
def test_what_a_run_adds_to_a_file_system_is_never_minus_nothing(growth: int, said: str) -> None:
    assert _note(replace(not_run(""), volume_growth_nbytes=growth)) == said
