"""Running a merge: the way through the house, from a config to a model on the disk."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from executor.errors import OutOfRangeError, RunError
from moeplan import gates
from moeplan.checkpoint import CONFIG, INDEX
from moeplan.config import MergeConfig
from moeplan.disk import free_nbytes
from moeplan.errors import MoeplanWarning
from moeplan.fetching import after, fetch
from moeplan.finished_routers import check_routers
from moeplan.hub import warn_of_wait
from moeplan.identity import Identity
from moeplan.memory import CapError, memory_cap, runtime_is_known
from moeplan.model_card import model_card
from moeplan.options import Options
from moeplan.output import CARD, CONFIG_COPY, RECORD, to_json, write_beside
from moeplan.planning import MergePlan, hub_of, plan_again, plan_with
from moeplan.record import identity, record
from moeplan.routers import RouterFacts
from moeplan.staging import finish_publication, staged
from moeplan.tokenizer_files import missing_code, tokenizer_files
from moeplan.untrusted_json import show
from planner.layout import index_json

if TYPE_CHECKING:
    from executor.engine import Progress, RunResult


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: where the model is, what it took, and what its routers are like, where this run made
    them of text."""

    path: Path
    run: RunResult
    seconds: float
    routers: RouterFacts | None


def merge(
    config: MergeConfig,
    out: str | Path,
    options: Options | None = None,
    on_plan: Callable[[MergePlan], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> MergeResult:
    """Merge, and put the model into the directory `out`, which is new or empty, unless `options` say otherwise.

    Goes on with a merge of the same that was interrupted there. `on_plan` is called with the plan before anything is
    written, `on_progress` as bytes move. Raises what `plan` raises, and RunError where the run fails: then what is
    finished is kept in `out`, in a directory of its own, and the error has a note that says so.
    """
    from executor.engine import finished, run  # here, because it takes numpy, which plans do without

    started = time.monotonic()
    options = options or Options()
    directory = Path(out)
    finish_publication(directory, overwrite=options.overwrite)
    merge_plan = _planned(config, directory, options, on_plan)
    fetched_nbytes = merge_plan.download_nbytes
    if fetched_nbytes:
        merge_plan = _with_sources_here(merge_plan, directory, on_progress)
    made_from = identity(merge_plan)
    with staged(
        directory,
        made_from,
        restart=options.restart,
        overwrite=options.overwrite,
        config_text=config.source_text,
    ) as stage:
        if stage.is_complete:
            result, facts = finished(merge_plan.plan), None
        else:
            _check_space(merge_plan, directory)
            with merge_plan.device.within_budget(), _advising():
                result = run(
                    merge_plan.plan,
                    stage.directory,
                    gates.gate_mode(config.gate_mode).all_kernels(),
                    after(fetched_nbytes, on_progress),
                    journal=stage.journal,
                    share_extents=not options.clone_tensors,
                    check_sources=options.check_sources,
                    headers=merge_plan.hub.headers,
                    on_wait=warn_of_wait,
                    threads=options.threads,
                    imports=merge_plan.memory.packages,
                )
            facts = check_routers(merge_plan, stage.directory)
            _write_beside(merge_plan, made_from, result, stage.directory)
            _warn_of_missing_code(merge_plan, stage.directory)
    of_text = facts if config.reads_text else None
    return MergeResult(directory, result, time.monotonic() - started, of_text)


def _planned(
    config: MergeConfig, out: Path, options: Options, on_plan: Callable[[MergePlan], None] | None
) -> MergePlan:
    """The plan, by what the libraries that the run uses take here; `on_plan` is told of it before they are imported."""
    hub = hub_of(out, options)
    try:
        merge_plan = plan_with(hub, config, out, options)
    except CapError as error:
        if runtime_is_known():
            raise
        _import(error.cap.packages)  # so that the smallest cap that is named works
        merge_plan = plan_again(hub, config, out, options)
    if on_plan is not None:
        on_plan(merge_plan)
    return merge_plan if runtime_is_known() else _with_packages_loaded(merge_plan, out)


@contextmanager
def _advising() -> Iterator[None]:
    """Within, a weight that the output's dtype has no place for is told with what to do in the YAML."""
    try:
        yield
    except OutOfRangeError as error:
        error.add_note("have dtype: bfloat16, or float32")
        raise


def _import(packages: tuple[str, ...]) -> None:
    for package in packages:
        import_module(package)


def _with_packages_loaded(merge_plan: MergePlan, out: Path) -> MergePlan:
    """Import what the run will use; plan anew where that takes more memory here than was reckoned with."""
    packages = merge_plan.memory.packages
    _import(packages)
    taken = memory_cap(None, packages, sum(len(shard.tensors) for shard in merge_plan.plan.shards)).process_nbytes
    if taken <= merge_plan.memory.process_nbytes:
        return merge_plan
    return plan_again(merge_plan.hub, merge_plan.config, out, merge_plan.options)


def _with_sources_here(merge_plan: MergePlan, out: Path, on_progress: Callable[[Progress], None] | None) -> MergePlan:
    """Fetch what is to be downloaded. Plan anew where weights have been fetched; else only the base's files have."""
    fetch(merge_plan, out, on_progress)
    if merge_plan.downloads:
        return plan_again(merge_plan.hub, merge_plan.config, out, merge_plan.options)
    # Only what is copied was missing, so it is to be copied.
    return replace(merge_plan, copied=tuple(tokenizer_files(merge_plan.sources.base.checkpoint.path)), missing={})


def _check_space(merge_plan: MergePlan, directory: Path) -> None:
    needed, free = merge_plan.needed_nbytes(directory), free_nbytes(directory)
    if needed > free:
        raise RunError(f"{directory}: the model takes {decimal(needed)}, and {decimal(free)} are free there")


def _write_beside(merge_plan: MergePlan, made_from: Identity, result: RunResult, directory: Path) -> None:
    _clear_beside(merge_plan, directory)
    base = merge_plan.sources.base.checkpoint.path
    texts = {CONFIG: to_json(merge_plan.model_config)}
    if len(merge_plan.plan.shards) > 1:
        texts[INDEX] = index_json(merge_plan.plan.shards)
    write_beside(directory, texts, merge_plan.copied, base)
    names = [*texts, *(str(file.relative_to(base)) for file in merge_plan.copied)]
    write_beside(directory, {RECORD: record(merge_plan, made_from, result.checksums, directory, names)}, (), base)
    if merge_plan.options.write_model_card:  # after the record, since people edit their cards
        write_beside(directory, {CARD: model_card(merge_plan), CONFIG_COPY: merge_plan.config.source_text}, (), base)


def _clear_beside(merge_plan: MergePlan, directory: Path) -> None:
    """Remove what a run that was stopped here wrote beside the weights: it may be half a file, or not be wanted now."""
    shards = {shard.filename for shard in merge_plan.plan.shards}
    for left in directory.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name not in shards:
            left.unlink()


def _warn_of_missing_code(merge_plan: MergePlan, directory: Path) -> None:
    missing = missing_code(directory)
    if missing:
        warnings.warn(
            f"{merge_plan.config.base_model}: its tokenizer_config.json names code, {', '.join(map(show, missing))}, "
            "that is not copied; if you trust it, put it beside the model",
            MoeplanWarning,
            stacklevel=3,
        )
