"""Planning and running a merge: the way through the house, from a config to a model on the disk."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.errors import RunError
from executor.routing import physical_nbytes
from moeplan import architectures, gates, lowering
from moeplan.adapter import CONFIG as ADAPTER_CONFIG
from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import Family
from moeplan.checkpoint import MERGE_ADAPTER, CheckpointError, open_checkpoint
from moeplan.config import PROMPTLESS, MergeConfig
from moeplan.errors import MoeplanWarning
from moeplan.fetching import after, fetch, fetch_tokenizer, files_to_fetch
from moeplan.gates.device import CPU, Device, evaluating
from moeplan.gates.prompts import PromptError
from moeplan.hub import DOWNLOAD_NBYTES, DOWNLOADS_AT_ONCE, Hub
from moeplan.lowering import Lowering, Sources
from moeplan.memory import CapError, MemoryCap, compile_within, memory_cap, runtime_is_known
from moeplan.model_card import CARD, CONFIG_COPY, Source, model_card, sources_of, warn_of_licences
from moeplan.model_config import DTYPE_NAMES, model_config, stored_dtype
from moeplan.model_ref import ModelRef, parse_model_ref
from moeplan.options import OptionError, Options, shard_nbytes
from moeplan.output import (
    CONFIG,
    INDEX,
    OutputError,
    existing,
    free_nbytes,
    missing_code,
    on_one_disk,
    to_json,
    tokenizer_files,
    write_beside,
)
from moeplan.record import RECORD, identity, record
from moeplan.routing import RouterFacts, router_facts, stored_routers
from moeplan.staging import Identity, check_output, staged, unfinished_nbytes
from moeplan.untrusted_json import show
from moeplan.wording import runs
from planner.expr import DType, RemoteFile
from planner.layout import index_json
from planner.plan import Plan

if TYPE_CHECKING:
    from executor.engine import Progress, RunResult


@dataclass(frozen=True)
class MergePlan:
    """A merge that could be run: what `moeplan.merge` would do, and what `--plan` prints."""

    config: MergeConfig
    family: Family
    alternatives: tuple[Family, ...]
    """Other families that would fit, too."""

    layout: str
    """How the experts are laid out: a key of `family.layouts`."""

    sources: Sources
    merged: tuple[Source, ...]
    """The models and adapters, as the model card names them."""

    dtype: DType
    device: Device
    """Where the base is evaluated."""

    model_config: dict[str, Any]
    copied: tuple[Path, ...]
    """Files of the base that are copied as they are."""

    missing: Mapping[str, int]
    """Files of the base that will be copied, too, with their sizes, but must be fetched from the Hub before."""

    hub: Hub
    plan: Plan
    memory: MemoryCap
    options: Options

    @property
    def disk_nbytes(self) -> int:
        """The size of the output."""
        return self.plan.written_nbytes + sum(file.stat().st_size for file in self.copied) + sum(self.missing.values())

    @property
    def remote_files(self) -> list[RemoteFile]:
        """The files of weights that are read, and are on the Hub alone."""
        return [source for source in self.plan.sources if isinstance(source, RemoteFile)]

    @property
    def download_nbytes(self) -> int:
        """The size of what will be downloaded into the cache before anything is written."""
        return sum(file.nbytes for file in self.downloads) + sum(self.missing.values())

    @property
    def downloads(self) -> list[RemoteFile]:
        """The files of weights that will be downloaded into the cache before anything is written."""
        return [] if self.options.stream else self.remote_files

    @property
    def downloads_at_once(self) -> int:
        """How many of them: as many as help and fit the memory, which is one at the least."""
        fit = max(1, self.memory.budget_nbytes // DOWNLOAD_NBYTES)
        return min(DOWNLOADS_AT_ONCE, fit, len(self.downloads))

    @property
    def moved_nbytes(self) -> int:
        """What progress is measured by: bytes downloaded and bytes written."""
        return self.download_nbytes + self.plan.written_nbytes

    def needed_nbytes(self, out: Path | None) -> int:
        """The space that the merge will yet take on the disk of `out`, or, where that is None, of this directory.

        That is the output's, less what can be shared in `out` and what an unfinished merge has written there; and that
        of downloads, where the cache is on the same disk.
        """
        here = existing(out or Path())
        beside = on_one_disk(self.hub.cache, here)
        nbytes = self.disk_nbytes
        if out is not None and not self.options.clone_tensors:
            downloaded = beside and not self.options.stream
            nbytes += physical_nbytes(self.plan, here, downloaded_beside=downloaded) - self.plan.written_nbytes
        if out is not None:
            nbytes = max(0, nbytes - unfinished_nbytes(out))
        return nbytes + (self.download_nbytes if beside else 0)

    @property
    def memory_nbytes(self) -> int:
        """The forecast of the process's peak resident set."""
        return self.memory.process_nbytes + self.buffers_nbytes

    @property
    def buffers_nbytes(self) -> int:
        """What of that is the run's buffers, or what downloads take before it."""
        return max(self.plan.peak_nbytes, self.downloads_at_once * DOWNLOAD_NBYTES)


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: where the model is, what it took, and what its routers are like, where this run made
    them of text."""

    path: Path
    run: RunResult
    seconds: float
    routers: RouterFacts | None


@dataclass(frozen=True)
class Models:
    """The models of a merge, opened, and what they can be merged as: the families that fit, best first."""

    sources: Sources
    families: tuple[Family, ...]

    def dtype(self, config: MergeConfig) -> DType:
        """What the output is stored as: the base's own, where the config does not say."""
        return next((d for d, name in DTYPE_NAMES.items() if name == config.dtype), None) or stored_dtype(
            self.sources.base
        )

    def gate_request(self, config: MergeConfig, options: Options, texts: tuple[str, ...] = ()) -> gates.GateRequest:
        """What the routers are made for and of; `texts` are evaluated beside that. All by the CPU."""
        shared = self.families[0].shared
        is_gated = shared is not None and shared.gate is not None
        return gates.GateRequest(
            mode=config.gate_mode,
            base=self.sources.base,
            experts=config.experts,
            shared=config.shared_experts if is_gated else (),
            models=self.sources.experts + (self.sources.shared if is_gated else ()),
            ridge=config.ridge,
            gate_tokens=config.gate_tokens,
            seed=options.random_seed,
            bits=options.bits,
            trust_remote_code=options.trust_remote_code,
            averaged=lowering.averaged(config, self.sources, self.dtype(config)),
            texts=texts,
        )


def open_models(config: MergeConfig, options: Options, hub: Hub, *, reads_text: bool) -> Models:
    """Open the models that `config` names: their configs and headers, and the tokenizer of a base on the Hub where it
    `reads_text`. Raises UserError for what cannot be opened or merged."""
    sources = _open_sources(config, hub)
    families = architectures.choose(config, [model for _, model in sources.named()])
    lowering.check_fit(config, families[0], sources)
    snapshot = hub.snapshot(sources.base.checkpoint.path)
    if snapshot is not None and reads_text:
        with _naming(config, "base_model"):
            fetch_tokenizer(snapshot, with_code=options.trust_remote_code)
    return Models(sources, tuple(families))


def plan(config: MergeConfig, out: str | Path | None = None, options: Options | None = None) -> MergePlan:
    """Plan a merge. Reads configs and headers, writes nothing, imports neither torch nor transformers.

    Of models on the Hub that are not in the cache, it fetches the small files into the cache and reads the headers.

    Raises UserError for sources that do not fit each other or the family, for an `out` that is in use, for options that
    cannot be understood, and for a memory cap that is too small. Warns with MoeplanWarning.
    """
    options = options or Options()
    return _plan(config, out, options, Hub(options.transformers_cache))


def _plan(config: MergeConfig, out: str | Path | None, options: Options, hub: Hub) -> MergePlan:
    if out is not None:
        check_output(Path(out), overwrite=options.overwrite)
    models = open_models(config, options, hub, reads_text=config.gate_mode not in PROMPTLESS)
    sources, family = models.sources, models.families[0]
    if out is not None:
        _refuse_to_replace_a_source(Path(out), sources)
    dtype = models.dtype(config)
    count = len(config.experts)
    if count & (count - 1):
        warnings.warn(
            f"{config.where('experts')}: {count} is no power of two, which older versions of llama.cpp cannot read",
            MoeplanWarning,
            stacklevel=2,
        )
    _warn_of_readers(config, family, models.families[1:])
    mode = gates.gate_mode(config.gate_mode)
    request = models.gate_request(config, options)
    with naming_prompts(config):
        if mode.evaluates:
            device, routers = evaluating(options, lambda device: mode.routers(replace(request, device=device)))
        else:
            device, routers = CPU, mode.routers(request)
    graph = Lowering(
        config=config,
        family=family,
        sources=sources,
        routers=routers,
        dtype=dtype,
        layout=_layout(family, options.expert_layout),
        seed=options.random_seed,
        averaged=request.averaged,
    ).graph()
    merged = sources_of(config, [model.directories for _, model in sources.named()])
    if options.write_model_card:
        warn_of_licences(merged)
    cap = memory_cap(options.max_memory, _packages(mode, sources, options))
    downloading = 0 if options.stream or not hub.holds_weights else DOWNLOAD_NBYTES
    shard_limit = shard_nbytes(options.out_shard_size, dtype.itemsize)
    snapshot = hub.snapshot(sources.base.checkpoint.path)
    merge_plan = MergePlan(
        config=config,
        family=family,
        alternatives=models.families[1:],
        layout=_layout(family, options.expert_layout),
        sources=sources,
        merged=merged,
        dtype=dtype,
        device=device,
        model_config=model_config(
            family,
            sources.base,
            num_experts=count,
            with_shared=bool(config.shared_experts),
            experts_per_token=config.experts_per_token,
            dtype=dtype,
        ),
        copied=tuple(tokenizer_files(sources.base.checkpoint.path)) if options.copy_tokenizer else (),
        missing=files_to_fetch(snapshot) if snapshot is not None and options.copy_tokenizer else {},
        hub=hub,
        plan=compile_within(cap, graph, shard_limit, options.threads, least_nbytes=downloading),
        memory=cap,
        options=options,
    )
    if merge_plan.downloads:
        hub.check_downloadable(merge_plan.downloads)
    return merge_plan


def _packages(mode: gates.GateMode, sources: Sources, options: Options) -> tuple[str, ...]:
    """The heavy packages that the merge will use: those of its gates, and torch to multiply the factors of adapters."""
    modules = mode.modules(options.bits)
    adapted = any(model.adapter is not None for _, model in sources.named())
    return ("torch", *modules) if adapted and not modules else modules


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
    hub = Hub(options.transformers_cache)
    try:
        merge_plan = _plan(config, out, options, hub)
    except CapError as error:
        if runtime_is_known():
            raise
        _import(error.cap.packages)  # so that the smallest cap that is named works
        merge_plan = _again(config, out, options, hub)
    if on_plan is not None:
        on_plan(merge_plan)
    if not runtime_is_known():
        merge_plan = _with_packages_loaded(merge_plan, out)
    fetched_nbytes = merge_plan.download_nbytes
    if fetched_nbytes:
        fetch(merge_plan, Path(out), on_progress)
        merge_plan = _with_sources_here(merge_plan, out)
    directory = Path(out)
    made_from = identity(merge_plan)
    with staged(directory, made_from, restart=options.restart, overwrite=options.overwrite) as stage:
        if stage.is_complete:
            result, facts = finished(merge_plan.plan), None
        else:
            _check_space(merge_plan, directory)
            with merge_plan.device.within_budget():
                result = run(
                    merge_plan.plan,
                    stage.directory,
                    gates.gate_mode(config.gate_mode).kernels,
                    after(fetched_nbytes, on_progress),
                    journal=stage.journal,
                    share_extents=not options.clone_tensors,
                    check_sources=options.check_sources,
                    headers=merge_plan.hub.headers,
                    threads=options.threads,
                    imports=merge_plan.memory.packages,
                )
            facts = _router_facts(merge_plan, stage.directory)
            _warn_degenerate(merge_plan, facts)
            _write_beside(merge_plan, made_from, result, stage.directory)
            _warn_of_missing_code(merge_plan, stage.directory)
    of_text = None if config.gate_mode in PROMPTLESS else facts
    return MergeResult(directory, result, time.monotonic() - started, of_text)


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


def _refuse_to_replace_a_source(out: Path, sources: Sources) -> None:
    for _, model in sources.named():
        if out.resolve() in (directory.resolve() for directory in model.directories):
            raise OutputError(f"{out}: is a source of this merge; give another directory")


def _check_space(merge_plan: MergePlan, directory: Path) -> None:
    needed, free = merge_plan.needed_nbytes(directory), free_nbytes(directory)
    if needed > free:
        raise RunError(f"{directory}: the model takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there")


def _import(packages: tuple[str, ...]) -> None:
    for package in packages:
        import_module(package)


def _with_sources_here(merge_plan: MergePlan, out: str | Path) -> MergePlan:
    """Plan anew where weights have been fetched; else only the base's files have."""
    if merge_plan.downloads:
        return _again(merge_plan.config, out, merge_plan.options, merge_plan.hub)
    # Only what is copied was missing, so it is to be copied.
    return replace(merge_plan, copied=tuple(tokenizer_files(merge_plan.sources.base.checkpoint.path)), missing={})


def _with_packages_loaded(merge_plan: MergePlan, out: str | Path) -> MergePlan:
    """Import what the run will use; plan anew where that takes more memory here than was reckoned with."""
    _import(merge_plan.memory.packages)
    taken = memory_cap(None, ()).process_nbytes
    if taken <= merge_plan.memory.process_nbytes:
        return merge_plan
    return _again(merge_plan.config, out, merge_plan.options, merge_plan.hub)


def _again(config: MergeConfig, out: str | Path, options: Options, hub: Hub) -> MergePlan:
    """Plan the same again, at the same commits, without saying again what there was to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeplanWarning)
        return _plan(config, out, options, hub.anew())


def _open_sources(config: MergeConfig, hub: Hub) -> Sources:
    """Open each distinct source once."""
    opened: dict[ModelRef, DenseModel] = {}

    def open_once(reference: ModelRef) -> DenseModel:
        if reference not in opened:
            if reference.adapter is None:
                opened[reference] = architectures.as_dense_model(open_checkpoint(hub.place(reference.model)))
            else:
                adapter = hub.place(reference.adapter, ADAPTER_CONFIG)
                opened[reference] = open_once(ModelRef(reference.model)).with_adapter(adapter)
        return opened[reference]

    def model(reference: str, *path: str | int) -> DenseModel:
        ref = parse_model_ref(reference)
        is_new = ref not in opened
        with _naming(config, *path):
            source = open_once(ref)
        if source.adapter is not None and not source.adapter.reads and is_new:
            warnings.warn(
                f"{config.where(*path)}: {ref.adapter} changes no MLP, which is all that an expert gives, so this one "
                f"is {ref.model} as it is",
                MoeplanWarning,
                stacklevel=2,
            )
        return source

    base = parse_model_ref(config.base_model)
    if base.adapter is not None:
        raise CheckpointError(
            f"{config.where('base_model')}: {base}: only experts can have an adapter on them; {MERGE_ADAPTER}"
        )
    return Sources(
        base=model(config.base_model, "base_model"),
        experts=tuple(model(e.source_model, "experts", i, "source_model") for i, e in enumerate(config.experts)),
        shared=tuple(
            model(e.source_model, "shared_experts", i, "source_model") for i, e in enumerate(config.shared_experts)
        ),
    )


@contextmanager
def _naming(config: MergeConfig, *path: str | int) -> Iterator[None]:
    """Within, a CheckpointError names the line in the config of what it is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{config.where(*path)}: {error}") from error


@contextmanager
def naming_prompts(config: MergeConfig) -> Iterator[None]:
    """Within, a PromptError becomes a CheckpointError that names the prompt's line in the config."""
    try:
        yield
    except PromptError as error:
        number, *place = error.place
        role, number = ("experts", number) if number < len(config.experts) else ("shared_experts", 0)
        raise CheckpointError(f"{config.where(role, number, *place)}: {error}") from error


def _layout(family: Family, asked: str | None) -> str:
    """The expert layout to write. Raises OptionError for one that `family` does not have."""
    if asked is None:
        return next(iter(family.layouts))
    if asked not in family.layouts:
        raise OptionError(f"--expert-layout: {family.name} has no layout {asked!r}; it has {', '.join(family.layouts)}")
    return asked


def _router_facts(merge_plan: MergePlan, directory: Path) -> RouterFacts:
    router = merge_plan.family.layouts[merge_plan.layout].router
    names = [router.format(layer=layer) for layer in range(merge_plan.sources.base.num_layers)]
    return router_facts(stored_routers(directory, merge_plan.plan.shards, names))


def _warn_of_readers(config: MergeConfig, family: Family, alternatives: tuple[Family, ...]) -> None:
    if family.readers is not None:
        others = "".join(f"; `architecture: {other.name}` would fit, too" for other in alternatives)
        warnings.warn(
            f"{config.where('architecture')}: transformers 5 cannot load a {family.name} model: use {family.readers}"
            f"{others}",
            MoeplanWarning,
            stacklevel=3,
        )


def _warn_degenerate(merge_plan: MergePlan, facts: RouterFacts) -> None:
    if facts.degenerate:
        advice = "" if merge_plan.config.gate_mode in PROMPTLESS else "; give them prompts that differ more"
        layers = "all layers" if len(facts.degenerate) == facts.num_layers else f"layers {runs(facts.degenerate)}"
        warnings.warn(
            f"routing is degenerate in {layers}: the router cannot tell some experts apart{advice}",
            MoeplanWarning,
            stacklevel=3,
        )


def _warn_of_missing_code(merge_plan: MergePlan, directory: Path) -> None:
    missing = missing_code(directory)
    if missing:
        warnings.warn(
            f"{merge_plan.config.base_model}: its tokenizer_config.json names code, {', '.join(map(show, missing))}, "
            "that is not copied; if you trust it, put it beside the model",
            MoeplanWarning,
            stacklevel=3,
        )
