"""The output directory: what may already be there, what goes beside the weights, and how it appears all at once.

Everything is written in a directory inside the output directory. Only when all of it is on the disk is it renamed to
its place, the index and config.json last, so no loader ever takes half a model for one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from executor.errors import RunError
from moeplan.errors import UserError

PARTIAL = ".moeplan-partial"
LAST = ("model.safetensors.index.json", "config.json")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
MAX_TOKENIZER_NBYTES = 256 << 20


class OutputError(UserError):
    """The output directory cannot be used."""


def check_output(directory: Path) -> None:
    """Refuse a place that already holds something. Raises OutputError; touches nothing."""
    try:
        held = sorted(entry.name for entry in directory.iterdir() if entry.name != PARTIAL)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{directory}: cannot be an output directory: {error.strerror}") from error
    if held:
        raise OutputError(f"{directory}: the directory is not empty ({held[0]}); give a new or an empty one")


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

    Raises OutputError for one that is not a plain file of sane size.
    """
    files = [source / name for name in TOKENIZER_FILES if (source / name).exists()]
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        files += sorted(templates.glob("*.jinja"))
    for file in files:
        if not file.is_file() or file.stat().st_size > MAX_TOKENIZER_NBYTES:
            raise OutputError(f"{file}: this is not a file that can be copied; use --no-copy-tokenizer to go without")
    return files


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """A directory to write the output in. On success its files appear in `directory`, otherwise nothing stays behind.

    What is written in it must be on the disk by then. Raises RunError where the directory cannot be made.
    """
    was_there = directory.exists()
    partial = directory / PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"{directory}: cannot be made: {error.strerror}") from error
    try:
        yield partial
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not was_there and not any(directory.iterdir()):
            directory.rmdir()


def write_beside(partial: Path, texts: Mapping[str, str], copied: Sequence[Path], source: Path) -> None:
    """Put `texts` and copies of `copied`, files below `source`, into `partial`, durably."""
    try:
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        for file in copied:
            target = partial / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
    except OSError as error:
        raise RunError(f"{error.filename or partial}: writing failed: {error.strerror}") from error


def to_json(value: Mapping[str, Any]) -> str:
    """JSON as the files beside the weights have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _publish(partial: Path, directory: Path) -> None:
    try:
        _sync(partial)
        names = sorted(entry.name for entry in partial.iterdir())
        for name in sorted(names, key=lambda name: LAST.index(name) if name in LAST else -1):
            (partial / name).rename(directory / name)
        _sync(directory)
    except OSError as error:
        raise RunError(f"{directory}: the finished files could not be moved here: {error.strerror}") from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
