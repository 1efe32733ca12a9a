"""The output directory: what may already be there, what goes beside the weights, and how it appears all at once.

Everything is written in a directory inside the output directory. Only when all of it is on the disk is it renamed to
its place, the index and config.json last, so no loader ever takes half a model for one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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

    What is written in it must be on the disk by then. Clears away what a merge that was killed left there. Raises
    OutputError where another merge is writing to `directory`, RunError where it cannot be made.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    partial = directory / PARTIAL
    with ExitStack() as cleanup:
        for path in reversed(made):
            cleanup.callback(_remove_if_empty, path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _lock(directory, cleanup)
            cleanup.callback(shutil.rmtree, partial, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        except OSError as error:
            raise RunError(f"{directory}: cannot be made: {error.strerror}") from error
        yield partial
        _publish(partial, directory)


def _lock(directory: Path, cleanup: ExitStack) -> None:
    """Keep other merges out of `directory` until `cleanup`, or until this process ends, however it does."""
    fd = os.open(directory, os.O_RDONLY)
    cleanup.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(f"{directory}: another merge is writing there; give another directory") from None
    except OSError:
        return  # a file system without locks, as some network mounts are


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
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
            _sync(path)
    except OSError as error:
        raise RunError(f"{error.filename or partial}: writing failed: {error.strerror}") from error


def to_json(value: Mapping[str, Any]) -> str:
    """JSON as the files beside the weights have it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _publish(partial: Path, directory: Path) -> None:
    names = sorted(entry.name for entry in partial.iterdir())
    names.sort(key=lambda name: LAST.index(name) if name in LAST else -1)
    try:
        _sync(partial)
        for name in names:
            (partial / name).rename(directory / name)
        _sync(directory)
    except BaseException as error:
        # Back to where they are cleared away: half a model must not stay, whatever stopped this.
        for name in names:
            with suppress(OSError):
                (directory / name).rename(partial / name)
        if isinstance(error, OSError):
            raise RunError(f"{directory}: the finished files could not be moved here: {error.strerror}") from error
        raise


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
