"""How a finished model appears in its place, all at once: an old one's files are moved out of it, then its own into it.

The index and config.json are the first to go and the last to come, so no loader ever takes half a model for one. It can
be stopped anywhere and done again, since the journal says which files these are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from executor.errors import RunError, reason
from executor.files import sync
from executor.journal import Journal
from moeplan.checkpoint import CONFIG, INDEX
from moeplan.output import OutputError
from moeplan.replacing import refuse_directories, replaced_by

MODEL = "model"
REPLACED = "replaced"

LAST = (INDEX, CONFIG)
"""What loaders look for, moved to its place after everything else, and out of it before."""


class GoneError(RunError):
    """A finished file is gone: to go on is of no use."""


def begin(directory: Path, partial: Path, journal: Journal, *, overwrite: bool, config_text: str) -> None:
    """Put the finished files on the disk, and into the journal which they are, and what they take the place of.

    Raises RunError, and OutputError where something is in the way.
    """
    model = partial / MODEL
    try:
        sync(model)
        names = [entry.name for entry in model.iterdir()]
        taken = [name for name in sorted(names) if os.path.lexists(directory / name)]
        if taken and not overwrite:
            raise _has_appeared(directory / taken[0])
        journal.begin_publishing(names, replaced_by(names, directory, config_text) if overwrite else [])
    except OSError as error:
        raise _not_moved(directory, error) from error


def publish(directory: Path, partial: Path, journal: Journal, *, overwrite: bool) -> None:
    """Move the finished files to their place, and what they replace out of it.

    Can be stopped anywhere and done again. Raises RunError, and OutputError where something is in the way.
    """
    model, replaced = partial / MODEL, partial / REPLACED
    try:
        new = sorted(journal.finished.publishing or (), key=_lateness)
        # One that is not in `model/` any more is in its place already.
        left = [name for name in new if (model / name).exists()]
        # What was taken away is not taken again: what is there under its name since, somebody has put there.
        old = [
            name
            for name in journal.finished.replacing
            if left and (name in left or name not in new) and not os.path.lexists(replaced / name)
        ]
        appeared = [name for name in left if name not in old and os.path.lexists(directory / name)]
        if appeared and not overwrite:
            raise _has_appeared(directory / appeared[0])
        refuse_directories(directory, [*old, *appeared])
        gone = [name for name in new if not (model / name).exists() and not (directory / name).exists()]
        if gone:
            raise GoneError(f"{model / gone[0]}: is gone, though it was finished; remove {partial} and merge again")
        moves = [(directory / name, replaced / name) for name in sorted([*old, *appeared], key=_lateness, reverse=True)]
        moves += [(model / name, directory / name) for name in new]
        replaced.mkdir(exist_ok=True)
        _move(directory, moves)
    except OSError as error:
        raise _not_moved(directory, error) from error


def _not_moved(directory: Path, error: OSError) -> RunError:
    return RunError(f"{directory}: the finished files could not be moved here: {reason(error)}")


def _has_appeared(path: Path) -> OutputError:
    return OutputError(f"{path}: has appeared there since the merge began; move it away, or add --overwrite")


def _move(directory: Path, moves: Sequence[tuple[Path, Path]]) -> None:
    """Move files within `directory`, durably: all of them or none. Those that are not there are there already."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            if os.path.lexists(source):
                if (source, target) == moves[-1]:
                    sync(directory)  # what loaders look for is there for good when all else is
                done.append((source, target))
                source.rename(target)
        sync(directory)
    except BaseException:
        # Back to where they were: half a model must not stay, and the old one must, whatever stopped this.
        for source, target in reversed(done):
            with suppress(OSError):
                target.rename(source)
        raise


def _lateness(name: str) -> int:
    return LAST.index(name) + 1 if name in LAST else 0
