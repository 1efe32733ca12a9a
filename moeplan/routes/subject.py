"""What `moeplan routes` is asked about: a merge that has not been made, or a model that has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moeplan.config import load_config
from moeplan.options import Options
from moeplan.routes.after import routes_after
from moeplan.routes.before import routes_before
from moeplan.routes.statistics import Routes

if TYPE_CHECKING:
    from executor.engine import Progress


def routes_of(
    subject: Path,
    options: Options,
    files: Sequence[str] = (),
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Routes:
    """Where the tokens of prompts and of `files` go: in the model in the directory `subject`, or in what the YAML file
    `subject` would merge. Raises UserError, and RunError where the evaluation fails."""
    if subject.is_dir():
        return routes_after(subject, options, files, on_start, on_progress)
    config = load_config(subject, allow_all_same=True)
    return routes_before(config, str(subject), options, files, on_start, on_progress)
