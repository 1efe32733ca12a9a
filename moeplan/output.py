"""What goes beside the weights. How it appears in its place: `moeplan.publication`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from executor.errors import RunError, naming
from executor.files import copy_file, sync, write_file
from moeplan.errors import UserError

RECORD = "moeplan.json"
CARD = "README.md"
CONFIG_COPY = "moeplan_config.yml"


class OutputError(UserError):
    """The output directory cannot be used."""


def write_beside(directory: Path, texts: Mapping[str, str], copied: Sequence[Path], source: Path) -> None:
    """Put `texts` and copies of `copied`, files below `source`, into `directory`, durably."""
    for name, text in texts.items():
        with naming(directory / name):
            write_file(directory / name, text.encode())
    for file in copied:
        target = directory / file.relative_to(source)
        with naming(target):
            target.parent.mkdir(exist_ok=True)
            try:
                copy_file(file, target)
            except OSError as error:
                if error.filename != str(file):
                    raise
                raise RunError(f"{file}: cannot be read: {error.strerror}") from error
            sync(target.parent)


def to_json(value: Mapping[str, Any]) -> str:
    """JSON as the files beside the weights have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
