"""What a merged model takes the place of, with `--overwrite`: the model that is there, and what describes that."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from moeplan.checkpoint import CONFIG
from moeplan.model_card import is_own_card
from moeplan.output import CARD, CONFIG_COPY, RECORD, OutputError
from moeplan.places import CheckpointError, opened
from moeplan.tokenizer_files import TEMPLATES, is_tokenizer_file

WEIGHTS_FILES = re.compile(r".*\.safetensors(\.index\.json)?|pytorch_model(-.*)?\.bin(\.index\.json)?")
"""What loaders may take for a model's weights. A GGUF that somebody made of the model is a model of its own."""

MAX_NBYTES = 2 << 20
"""More than a card or a config of moeplan's has."""


def is_of_a_model(name: str) -> bool:
    """Whether a file of this name in a model's directory belongs to the model."""
    return name in (CONFIG, TEMPLATES, RECORD) or is_tokenizer_file(name) or WEIGHTS_FILES.fullmatch(name) is not None


def replaced_by(names: Collection[str], directory: Path, config_text: str) -> list[str]:
    """What in `directory` a model of files with these `names`, merged as the YAML `config_text` says, takes the place
    of. A card and a YAML file stay where they are no work of moeplan's for another model. Raises OutputError where
    `refuse_directories` does."""
    there = sorted(entry.name for entry in directory.iterdir())
    replaced = [
        name
        for name in there
        if name in names
        or is_of_a_model(name)
        or (name == CARD and is_own_card(_text(directory, CARD)))
        or (name == CONFIG_COPY and _text(directory, CONFIG_COPY) != config_text)
    ]
    refuse_directories(directory, replaced)
    return replaced


def refuse_directories(directory: Path, names: Collection[str]) -> None:
    """Raises OutputError where one of `names` in `directory` is itself a directory: who knows what is in it."""
    for name in names:
        if name != TEMPLATES and (directory / name).is_dir():
            raise OutputError(f"{directory / name}: is a directory, and no part of a model; move it away")


def _text(directory: Path, name: str) -> str:
    try:
        with opened(directory, name) as file:
            return file.read(MAX_NBYTES).decode("utf-8", "replace")
    except CheckpointError:
        return ""
