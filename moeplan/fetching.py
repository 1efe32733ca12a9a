"""What a merge fetches from the Hub into the cache: the base's tokenizer, and weights that are not to be streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from rich.filesize import decimal

from executor.errors import RunError
from moeplan.disk import free_nbytes, on_one_disk
from moeplan.hub import Snapshot
from moeplan.tokenizer_files import FAST, MAX_NBYTES, MAX_READ_NBYTES, READ_WITH_FAST, is_tokenizer_file

if TYPE_CHECKING:
    from pathlib import Path

    from executor.engine import Progress
    from moeplan.planning import MergePlan

OnProgress = Callable[["Progress"], None]


def fetch_tokenizer(base: Snapshot, *, with_code: bool) -> None:
    """Have in the cache what prompts need, code that the model brings with it included. Raises CheckpointError."""
    only_fast = base.has(FAST) and not with_code
    wanted = READ_WITH_FAST if only_fast else [n for n in base.names() if is_tokenizer_file(n)]
    wanted = [*wanted, *(n for n in base.names() if with_code and n.endswith(".py"))]
    base.fetch(wanted, MAX_READ_NBYTES)


def files_to_fetch(base: Snapshot) -> Mapping[str, int]:
    """The files of the base that are copied and not in the cache yet, with their sizes."""
    names = [name for name in base.files if is_tokenizer_file(name) and not base.is_here(name)]
    return {name: base.files[name].nbytes for name in sorted(names)}


def fetch(merge_plan: MergePlan, out: Path, on_progress: OnProgress | None) -> None:
    """Have in the cache everything that must be there before the run.

    Raises CheckpointError where the base's files cannot be had, RunError where weights cannot, and for a full disk.
    """
    from executor.engine import Progress

    hub = merge_plan.hub
    _check_space(merge_plan, out)
    base = hub.snapshot(merge_plan.sources.base.checkpoint.path)
    if base is not None:
        base.fetch(merge_plan.missing, MAX_NBYTES)
    lock = Lock()
    done = sum(merge_plan.missing.values())

    def came(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if on_progress is not None:
                on_progress(Progress(done, done, "fetching"))

    came(0)
    if merge_plan.downloads:
        hub.download(merge_plan.downloads, merge_plan.downloads_at_once, came)


def after(nbytes: int, on_progress: OnProgress | None) -> OnProgress | None:
    """Progress of what follows when `nbytes` have been fetched."""
    if on_progress is None:
        return None
    return lambda state: on_progress(replace(state, written_nbytes=nbytes + state.written_nbytes))


def _check_space(merge_plan: MergePlan, out: Path) -> None:
    cache = merge_plan.hub.cache
    needed = merge_plan.needed_nbytes(out) if on_one_disk(cache, out) else merge_plan.download_nbytes
    free = free_nbytes(cache)
    if needed > free:
        raise RunError(
            f"{cache}: the models to download and what is made of them take {decimal(needed)}, and "
            f"{decimal(free)} are free there: free some, give another --transformers-cache, or use --stream"
        )
