"""Planning a merge: from a config to a plan, and to what that takes of memory and disk."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from executor.ways import physical_nbytes
from moeplan import gates
from moeplan.architectures.family import Family
from moeplan.config import MergeConfig
from moeplan.disk import existing, on_one_disk
from moeplan.errors import MoeplanWarning
from moeplan.fetching import files_to_fetch
from moeplan.fit import Sources
from moeplan.gates.device import CPU, Device, evaluating
from moeplan.gates.tokenizer import NoTokenizerError
from moeplan.hub import Hub
from moeplan.hub_download import DOWNLOAD_NBYTES, DOWNLOADS_AT_ONCE
from moeplan.identity import PLAN
from moeplan.lowering import Lowering
from moeplan.memory import MemoryCap, compile_within, memory_cap
from moeplan.model_card import CardSource, sources_of, warn_of_licences
from moeplan.model_config import model_config
from moeplan.model_ref import parse_model_ref
from moeplan.opening import Models, naming_prompts, open_models
from moeplan.options import OptionError, Options, shard_nbytes
from moeplan.output import CARD, CONFIG_COPY, OutputError
from moeplan.readers import warn_of_readers, warn_of_tokenizer
from moeplan.record import identity, texts_of
from moeplan.replacing import replaced_by
from moeplan.staging import check_output, check_unfinished, hub_of_unfinished, is_begun, unfinished_nbytes
from moeplan.tensor_names import OUTPUT_MATRIX
from moeplan.tokenizer_files import is_slow, tokenizer_files
from planner.expr import DType, RemoteFile
from planner.graph import TensorGraph
from planner.plan import Plan


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
    merged: tuple[CardSource, ...]
    """The models and adapters, as the model card names them."""

    dtype: DType
    device: Device
    """Where the base is evaluated."""

    model_config: dict[str, Any]
    copied: tuple[Path, ...]
    """Files of the base that are copied as they are."""

    missing: Mapping[str, int]
    """Files of the base that will be copied, too, with their sizes, but must be fetched from the Hub before."""

    hub: Hub = field(repr=False)
    plan: Plan = field(repr=False)
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
        beside = self.download_nbytes > 0 and on_one_disk(self.hub.cache, here)
        nbytes = self.disk_nbytes
        if out is not None and not self.options.clone_tensors:
            downloaded = beside and not self.options.stream
            nbytes += physical_nbytes(self.plan, here, downloaded_beside=downloaded) - self.plan.written_nbytes
        if out is not None:
            nbytes = max(0, nbytes - unfinished_nbytes(out))
        return nbytes + (self.download_nbytes if beside else 0)

    def replaced_files(self, out: Path | None) -> list[str]:
        """The names of what the finished model takes the place of in `out`."""
        if out is None or not self.options.overwrite or not out.is_dir():
            return []
        beside = [CARD, CONFIG_COPY] if self.options.write_model_card else []
        return replaced_by(beside, out, self.config.source_text)

    @property
    def memory_nbytes(self) -> int:
        """The forecast of the process's peak resident set."""
        return self.memory.process_nbytes + self.buffers_nbytes

    @property
    def buffers_nbytes(self) -> int:
        """What of that is the run's buffers, or what downloads take before it."""
        return max(self.plan.peak_nbytes, self.downloads_at_once * DOWNLOAD_NBYTES)


def plan(config: MergeConfig, out: str | Path | None = None, options: Options | None = None) -> MergePlan:
    """Plan a merge. Reads configs and headers, writes nothing, imports neither torch nor transformers.

    Of models on the Hub that are not in the cache, it fetches the small files into the cache and reads the headers.

    Raises UserError for sources that do not fit each other or the family, for an `out` that is in use or where another
    merge was left unfinished, for options that cannot be understood, and for a memory cap that is too small. Warns with
    MoeplanWarning.
    """
    options = options or Options()
    return plan_with(hub_of(out, options), config, out, options)


def hub_of(out: str | Path | None, options: Options) -> Hub:
    """The Hub, for a merge into `out`. One that was left unfinished there goes on with the commits of its beginning,
    and with what it streams, though it may be in the cache by now."""
    begun_with = () if out is None or options.restart else hub_of_unfinished(Path(out))
    return Hub(options.transformers_cache, *begun_with)


def plan_with(hub: Hub, config: MergeConfig, out: str | Path | None, options: Options) -> MergePlan:
    """`plan`, with what `hub` has found out so far."""
    if out is not None:
        check_output(Path(out), overwrite=options.overwrite)
    models = open_models(config, options, hub, reads_text=config.reads_text)
    sources, family = models.sources, models.families[0]
    if out is not None:
        _refuse_to_replace_a_source(Path(out), sources)
    layout = _layout(family, options.expert_layout)
    graph, device = _graph(config, models, options, layout)
    place = hub.place(parse_model_ref(config.base_model).model)
    settings = model_config(
        family,
        sources.base,
        num_experts=len(config.experts),
        with_shared=bool(config.shared_experts),
        with_output_matrix=OUTPUT_MATRIX in graph.outputs,
        with_slow_tokenizer=is_slow(place),
        experts_per_token=config.experts_per_token,
        dtype=models.dtype(config),
    )
    warn_of_readers(config, models.families, settings)
    if options.copy_tokenizer:
        warn_of_tokenizer(config, family, place)
    merged = sources_of(config, [model.directories for _, model in sources.named()])
    if options.write_model_card:
        warn_of_licences(merged)
    cap = memory_cap(options.max_memory, _packages(config, sources, options), len(graph.outputs))
    downloading = 0 if options.stream or not hub.holds_weights else DOWNLOAD_NBYTES
    shard_limit = shard_nbytes(options.out_shard_size, models.dtype(config).itemsize)
    snapshot = hub.snapshot(sources.base.checkpoint.path)
    merge_plan = MergePlan(
        config=config,
        family=family,
        alternatives=models.families[1:],
        layout=layout,
        sources=sources,
        merged=merged,
        dtype=models.dtype(config),
        device=device,
        model_config=settings,
        copied=tuple(tokenizer_files(sources.base.checkpoint.path)) if options.copy_tokenizer else (),
        missing=files_to_fetch(snapshot) if snapshot is not None and options.copy_tokenizer else {},
        hub=hub,
        plan=compile_within(cap, graph, shard_limit, options.threads, least_nbytes=downloading),
        memory=cap,
        options=options,
    )
    if merge_plan.downloads:
        hub.check_downloadable(merge_plan.downloads)
    if out is not None:
        _refuse_to_replace_a_text(Path(out), merge_plan)
        if is_begun(Path(out)):
            _check_unfinished(Path(out), merge_plan)
    return merge_plan


def _check_unfinished(out: Path, merge_plan: MergePlan) -> None:
    """Raises OutputError where what was left unfinished in `out` is another merge, as far as can be told before
    downloads: they change where sources are, and what follows from that."""
    later = ("source", PLAN) if merge_plan.downloads else ()
    known = {kind: what for kind, what in identity(merge_plan).items() if kind not in later}
    check_unfinished(out, known, restart=merge_plan.options.restart, overwrite=merge_plan.options.overwrite)


def _graph(config: MergeConfig, models: Models, options: Options, layout: str) -> tuple[TensorGraph, Device]:
    """What is to be written, and where the base is evaluated for it."""
    mode = gates.gate_mode(config.gate_mode)
    try:
        request = models.gate_request(config, options, reads_text=config.reads_text)
    except NoTokenizerError as error:
        raise NoTokenizerError(f"{error}, or use gate_mode: random") from None
    with naming_prompts(config):
        if mode.evaluates:
            device, routers = evaluating(options, lambda device: mode.routers(request.on(device)))
        else:
            device, routers = CPU, mode.routers(request)
    lowering = Lowering(
        config=config,
        family=models.families[0],
        sources=models.sources,
        routers=routers,
        dtype=models.dtype(config),
        layout=layout,
        seed=options.random_seed,
        averaged=request.base.averaged,
    )
    return lowering.graph(), device


def plan_again(hub: Hub, config: MergeConfig, out: str | Path, options: Options) -> MergePlan:
    """Plan the same again, at the same commits, without saying again what there was to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeplanWarning)
        return plan_with(hub.anew(), config, out, options)


def _packages(config: MergeConfig, sources: Sources, options: Options) -> tuple[str, ...]:
    """The heavy packages that the merge will use: those of its gates, and torch to multiply the factors of adapters."""
    modules = gates.gate_mode(config.gate_mode).modules(options.bits)
    adapted = any(model.adapter is not None for _, model in sources.named())
    return ("torch", *modules) if adapted and not modules else modules


def _layout(family: Family, asked: str | None) -> str:
    """The expert layout to write. Raises OptionError for one that `family` does not have."""
    if asked is None:
        return next(iter(family.layouts))
    if asked not in family.layouts:
        raise OptionError(f"--expert-layout: {family.name} has no layout {asked!r}; it has {', '.join(family.layouts)}")
    return asked


def _refuse_to_replace_a_source(out: Path, sources: Sources) -> None:
    for _, model in sources.named():
        if out.exists() and any(out.samefile(directory) for directory in model.directories):
            raise OutputError(f"{out}: is a source of this merge; give another directory")


def _refuse_to_replace_a_text(out: Path, merge_plan: MergePlan) -> None:
    replaced = {(out / name).resolve() for name in merge_plan.replaced_files(out)}
    for file in texts_of(merge_plan.config):
        if Path(file).resolve() in replaced:
            raise OutputError(
                f"{file}: is among this merge's `positive_files`, and the model would replace it; move it, or give "
                "another directory"
            )
