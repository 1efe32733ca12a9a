"""What goes beside the weights. How it appears in its place: `moeplan.staging`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from executor.errors import RunError
from executor.files import copy_file, sync, write_file
from moeplan.errors import UserError

RECORD = "moeplan.json"
CARD = "README.md"
CONFIG_COPY = "moeplan_config.yml"


class OutputError(UserError):
    """The output directory cannot be used."""


def write_beside(directory: Path, texts: Mapping[str, str], copied: Sequence[Path], source: Path) -> None:
    """Put `texts` and copies of `copied`, files below `source`, into `directory`, durably."""
    try:
        for name, text in texts.items():
            write_file(directory / name, text.encode())
        for file in copied:
            target = directory / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            copy_file(file, target)
            sync(target.parent)
    except OSError as error:
        if error.filename in map(str, copied):
            raise RunError(f"{error.filename}: cannot be read: {error.strerror}") from error
        raise RunError(f"{error.filename or directory}: writing failed: {error.strerror}") from error


def to_json(value: Mapping[str, Any]) -> str:
    """JSON as the files beside the weights have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
