"""The output directory while a merge is under way: one merge at a time, and nothing that is finished is lost.

Everything is written in a directory inside the output directory::

    OUT/.moeplan-partial/
        journal      what is finished, and what of: see `executor.journal`
        results/     kernels' results that later kernels need
        model/       the model's files, under their names
        replaced/    with --overwrite: the old model's files, while the new one's are moved to their place

Only when all of `model/` is on the disk is it moved to its place: see `moeplan.publication`. A merge that is
interrupted, however that happens, leaves this directory, and the same merge goes on from there. A merge that did not
get as far as to finish anything leaves nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executor.errors import HopelessError, RunError, reason
from executor.journal import RESULTS, Journal, read_identity, read_publishing
from moeplan import publication
from moeplan.adapter_config import ADAPTER_CONFIG
from moeplan.checkpoint import CONFIG
from moeplan.disk import existing
from moeplan.identity import COMMITS, Identity, difference
from moeplan.output import OutputError
from moeplan.publication import MODEL, REPLACED

PARTIAL = ".moeplan-partial"

GOES_ON = "what is finished is kept: run the same command again to go on"

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Stage:
    """A merge under way: `directory` is where its files go, `journal` what is finished of it."""

    directory: Path
    journal: Journal

    @property
    def is_complete(self) -> bool:
        """Whether an earlier run wrote everything, and was stopped while it moved the files to their place."""
        return self.journal.finished.publishing is not None


def check_output(directory: Path, *, overwrite: bool = False) -> None:
    """Refuse a place that already holds something, unless that may be overwritten.

    Raises OutputError; touches nothing.
    """
    try:
        held = {entry.name for entry in directory.iterdir()} - {PARTIAL}
    except FileNotFoundError:
        if directory.is_symlink():
            raise OutputError(
                f"{directory}: is a link to {directory.readlink()}, which is not there; make that directory, or give "
                "another one"
            ) from None
        _check_writable(existing(directory))
        return
    except OSError as error:
        raise OutputError(f"{directory}: cannot be an output directory: {error.strerror}") from error
    partial = directory / PARTIAL
    if os.path.lexists(partial) and not partial.is_dir():
        raise OutputError(f"{partial}: is no directory, and an unfinished merge would be there; move it away")
    held -= set(read_publishing(partial))
    if ADAPTER_CONFIG in held:
        raise OutputError(
            f"{directory}: holds an adapter ({ADAPTER_CONFIG}), which transformers would put on the merged model; give "
            "another directory, or move the adapter away"
        )
    if held and not overwrite:
        instead = "replace the model in it" if CONFIG in held else "write beside that (--plan says what it replaces)"
        raise OutputError(
            f"{directory}: the directory is not empty ({min(held)}); give a new or an empty one, or --overwrite to "
            f"{instead}"
        )
    _check_writable(directory)


def _check_writable(directory: Path) -> None:
    """Before hours of downloads, and in a plan."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OutputError(f"{directory}: this user may not write there; give another directory")


def is_begun(directory: Path) -> bool:
    """Whether an unfinished merge is in `directory`."""
    return read_identity(directory / PARTIAL) is not None


def unfinished_nbytes(directory: Path) -> int:
    """The space that an unfinished merge in `directory` takes already."""
    files = (directory / PARTIAL / MODEL).glob("*")
    return sum(file.stat().st_blocks * 512 for file in files if file.is_file())


def hub_of_unfinished(directory: Path) -> tuple[dict[str, str], frozenset[str]]:
    """What an unfinished merge in `directory` was begun with on the Hub: the commits of models, by their names, and the
    lasting names of the files that it reads there."""
    identity = read_identity(directory / PARTIAL) or {}
    commits, sources = (of if isinstance(of, dict) else {} for of in map(identity.get, (COMMITS, "source")))
    return (
        {name: commit for name, commit in commits.items() if isinstance(commit, str) and COMMIT.fullmatch(commit)},
        frozenset(name for name, facts in sources.items() if isinstance(facts, dict) and "etag" in facts),
    )


def check_unfinished(directory: Path, identity: Identity, *, restart: bool = False, overwrite: bool = False) -> None:
    """Raises OutputError where a merge of something else, as far as `identity` goes, is in the way in `directory`, or
    one is writing there."""
    with ExitStack() as cleanup:
        _lock(directory, cleanup, to_read=True)
        before = read_identity(directory / PARTIAL)
        known = None if before is None else {kind: before.get(kind, {}) for kind in identity}
        _goes_on(directory, known, identity, restart=restart, overwrite=overwrite)


def finish_publication(directory: Path, *, overwrite: bool = False) -> None:
    """Move the rest of a finished model to its place in `directory`, where its merge was stopped while it did that.

    What was merged, and what is to be merged now, does not matter. The journal stays, so the same merge is done at
    once. Raises OutputError where another merge is writing there, and what moving raises.
    """
    if read_publishing(directory / PARTIAL):
        with ExitStack() as cleanup:
            _lock(directory, cleanup)
            _finish_publication(directory, overwrite)


def check_finished(directory: Path) -> None:
    """Raises OutputError where there is no more than an unfinished merge in `directory`."""
    if (directory / PARTIAL).exists() and not (directory / CONFIG).exists():
        raise OutputError(f"{directory}: an unfinished merge is there; run its command again, which goes on with it")


@contextmanager
def at_rest(directory: Path) -> Iterator[None]:
    """Within, no merge moves files into `directory`. Raises OutputError where one is writing there, or was stopped
    before it made a model, or while it moved that to its place."""
    with ExitStack() as cleanup:
        with suppress(OSError):  # what cannot be opened is for the reader to say
            _lock(directory, cleanup, to_read=True)
        partial = directory / PARTIAL
        if any((partial / MODEL / name).exists() for name in read_publishing(partial)):
            raise OutputError(
                f"{directory}: an unfinished merge is there, which was stopped when it moved its model to its place: "
                "run its command again"
            )
        check_finished(directory)
        yield


@contextmanager
def staged(
    directory: Path, identity: Identity, *, restart: bool = False, overwrite: bool = False, config_text: str = ""
) -> Iterator[Stage]:
    """Where to write the model for `directory`, merged as the YAML `config_text` says. On success its files appear
    there.

    What is written must be on the disk by then. Goes on with an unfinished merge of the same `identity`; `restart` has
    that thrown away. One that was stopped while it moved the finished model to its place is finished before, whatever
    it is of. On an error what is finished is kept, and the error gets a note that says so, but for a HopelessError.
    Raises OutputError where another merge is writing to `directory`, or another one was left unfinished there, RunError
    where it cannot be made.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    partial = directory / PARTIAL
    with ExitStack() as cleanup:
        for path in reversed(made):
            cleanup.callback(_remove_if_empty, path)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _lock(directory, cleanup)
            _finish_publication(directory, overwrite)
            if not _goes_on(directory, read_identity(partial), identity, restart=restart, overwrite=overwrite):
                shutil.rmtree(partial, ignore_errors=True)
            for path in (partial, partial / MODEL):  # in what is locked, and not in one that is made anew
                path.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{error.filename or directory}: cannot be made: {reason(error)}") from error
        journal: Journal | None = None
        was_begun = is_begun(directory)
        try:
            journal = Journal(partial, identity)
            stage = Stage(partial / MODEL, journal)
            yield stage
            if not stage.is_complete:
                publication.begin(directory, partial, journal, overwrite=overwrite, config_text=config_text)
            publication.publish(directory, partial, journal, overwrite=overwrite)
            journal.close()  # a network's file system keeps a directory in which a file is open
        except BaseException as error:
            if journal is not None:
                journal.close()
            if isinstance(error, HopelessError) or (journal.is_empty if journal is not None else not was_begun):
                shutil.rmtree(partial, ignore_errors=True)
            else:
                _say_that_it_goes_on(error)
            raise
        _clear_away(partial)


def _finish_publication(directory: Path, overwrite: bool) -> None:
    partial = directory / PARTIAL
    identity = read_identity(partial)
    if identity is None or not read_publishing(partial):
        return
    journal = Journal(partial, identity)
    try:
        if journal.finished.publishing is not None:  # after a restart of the machine it may not count
            publication.publish(directory, partial, journal, overwrite=overwrite)
            _clear_work(partial)
    except BaseException as error:
        _say_that_it_goes_on(error)
        raise
    finally:
        journal.close()


def _say_that_it_goes_on(error: BaseException) -> None:
    if not isinstance(error, publication.GoneError):
        error.add_note(GOES_ON)


def _goes_on(
    directory: Path, before: Mapping[str, Any] | None, now: Identity, *, restart: bool, overwrite: bool
) -> bool:
    """Whether the merge in `directory`, which was `before`, is gone on with. Raises OutputError where it is in the
    way."""
    if before == now and not restart:
        return True
    if read_publishing(directory / PARTIAL):  # its model is in its place: see `finish_publication`
        if not overwrite:
            raise OutputError(
                f"{directory}: holds a finished model, whose merge was stopped when it moved it here; give another "
                "directory, or --overwrite to replace the model"
            )
    elif before is not None and not restart:
        raise _of_something_else(directory, before, now)
    return False


def _of_something_else(directory: Path, before: Mapping[str, Any], now: Identity) -> OutputError:
    return OutputError(
        f"{directory}: an unfinished merge is there, of something else: {difference(before, now)}. Undo the change to "
        "go on with it, or add --restart to start afresh"
    )


def _lock(directory: Path, cleanup: ExitStack, *, to_read: bool = False) -> None:
    """Keep other merges out of `directory` until `cleanup`, or until this process ends, however it does."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    cleanup.callback(os.close, fd)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if to_read else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        busy = (
            "a merge is writing there; wait until it is done"
            if to_read
            else "another merge is writing there, or `moeplan verify` reads what is there; give another directory"
        )
        raise OutputError(f"{directory}: {busy}") from None
    except OSError:
        return  # a file system without locks, as some network mounts are


def _clear_away(partial: Path) -> None:
    """Remove what a finished merge leaves, its journal last: who is stopped here can give the same command again."""
    _clear_work(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _clear_work(partial: Path) -> None:
    """Remove everything but the journal."""
    for left in (MODEL, REPLACED, RESULTS):
        shutil.rmtree(partial / left, ignore_errors=True)


def _remove_if_empty(directory: Path) -> None:
    with suppress(OSError):
        directory.rmdir()
