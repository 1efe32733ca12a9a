"""What goes beside the weights, and the space for all of it. How it appears in its place: `moeplan.staging`."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from executor.errors import RunError
from executor.files import sync, write_file
from moeplan.checkpoint import CheckpointError, opened
from moeplan.errors import UserError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",  # Mistral's, for mistral-common
    "tokenizer.model.v7",
    "tekken.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
MAX_TOKENIZER_NBYTES = 256 << 20
MAX_TOKENIZER_FILES = 256
WITHOUT = "use --no-copy-tokenizer to go without"


class OutputError(UserError):
    """The output directory cannot be used."""


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model on the Hub, by its path there, is one that `tokenizer_files` would take."""
    return name in TOKENIZER_FILES or re.fullmatch(r"additional_chat_templates/[\w.-]+\.jinja", name) is not None


def is_of_a_model(name: str) -> bool:
    """Whether a file of this name in a model's directory belongs to the model."""
    suffixes = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")
    return name in (CONFIG, "moeplan.json", *TOKENIZER_FILES) or name.endswith(suffixes)


def existing(directory: Path) -> Path:
    """`directory`, or the nearest directory above it that exists."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    return place


def free_nbytes(directory: Path) -> int:
    """The space that is free where `directory` is or will be."""
    return shutil.disk_usage(existing(directory)).free


def tokenizer_files(source: Path) -> list[Path]:
    """The files of a checkpoint that a merged model takes over as they are.

    Raises CheckpointError for one that is really a file of another place, or not a plain file of sane size.
    """
    names = [name for name in TOKENIZER_FILES if os.path.lexists(source / name)]
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        names += sorted(str(file.relative_to(source)) for file in templates.glob("*.jinja"))
    if len(names) > MAX_TOKENIZER_FILES:
        raise CheckpointError(f"{templates}: holds {len(names):,} files ({WITHOUT})")
    for name in names:
        try:
            with opened(source, name) as file:
                nbytes = os.fstat(file.fileno()).st_size
        except CheckpointError as error:
            raise CheckpointError(f"{error} ({WITHOUT})") from None
        if nbytes > MAX_TOKENIZER_NBYTES:
            raise CheckpointError(f"{source / name}: is larger than {MAX_TOKENIZER_NBYTES:,} bytes ({WITHOUT})")
    return [source / name for name in names]


def write_beside(directory: Path, texts: Mapping[str, str], copied: Sequence[Path], source: Path) -> None:
    """Put `texts` and copies of `copied`, files below `source`, into `directory`, durably."""
    try:
        for name, text in texts.items():
            write_file(directory / name, text.encode())
        for file in copied:
            target = directory / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            write_file(target, file.read_bytes())
            sync(target.parent)
    except OSError as error:
        raise RunError(f"{error.filename or directory}: writing failed: {error.strerror}") from error


def to_json(value: Mapping[str, Any]) -> str:
    """JSON as the files beside the weights have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
