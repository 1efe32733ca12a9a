"""Opening the models of a merge: what is wrong with one is told with the line that names it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from moeplan import architectures, gates, lowering
from moeplan.adapter_config import ADAPTER_CONFIG, MERGE_ADAPTER
from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import Family
from moeplan.checkpoint import open_checkpoint
from moeplan.config import MergeConfig
from moeplan.errors import MoeplanWarning
from moeplan.fetching import fetch_tokenizer
from moeplan.fit import Sources, check_fit
from moeplan.gates.prompts import PromptError, Prompts, tokenize
from moeplan.hub import Hub
from moeplan.model_config import DTYPE_NAMES, stored_dtype
from moeplan.model_ref import ModelRef, parse_model_ref
from moeplan.options import Options
from moeplan.places import CheckpointError
from planner.expr import DType


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

    def gate_request(
        self, config: MergeConfig, options: Options, *, reads_text: bool, texts: Sequence[str] = ()
    ) -> gates.GateRequest:
        """What the routers are made for and of, the prompts where it `reads_text`, and beside these passages of the
        files `texts`. All by the CPU. Raises UserError for text that cannot be read."""
        shared = self.families[0].shared
        is_gated = shared is not None and shared.gate is not None
        gated = config.shared_experts if is_gated else ()
        prompts = Prompts()
        if reads_text:
            with naming_prompts(config):
                prompts = tokenize(
                    self.sources.base,
                    config.experts + gated,
                    gate_tokens=config.gate_tokens,
                    seed=options.random_seed,
                    trust_remote_code=options.trust_remote_code,
                    texts=texts,
                )
        return gates.GateRequest(
            mode=config.gate_mode,
            base=gates.Base(
                self.sources.base,
                averaged=lowering.averaged(config, self.sources, self.dtype(config)),
                bits=options.bits,
                trust_remote_code=options.trust_remote_code,
            ),
            experts=config.experts,
            shared=gated,
            models=self.sources.experts + (self.sources.shared if is_gated else ()),
            prompts=prompts,
            ridge=config.ridge,
            seed=options.random_seed,
        )


def open_models(config: MergeConfig, options: Options, hub: Hub, *, reads_text: bool) -> Models:
    """Open the models that `config` names: their configs and headers, and the tokenizer of a base on the Hub where it
    `reads_text`. Raises UserError for what cannot be opened or merged."""
    try:
        sources = _open_sources(config, hub)
    finally:
        hub.close_connections()
    families = architectures.choose(config, [model for _, model in sources.named()])
    check_fit(config, families[0], sources)
    snapshot = hub.snapshot(sources.base.checkpoint.path)
    if reads_text:
        _warn_of_empty_prompts(config)
    if snapshot is not None and reads_text:
        with _naming(config, "base_model"):
            fetch_tokenizer(snapshot, with_code=options.trust_remote_code)
    return Models(sources, tuple(families))


def _open_sources(config: MergeConfig, hub: Hub) -> Sources:
    """Open each distinct source once."""
    opened: dict[ModelRef, DenseModel] = {}

    def open_once(reference: ModelRef) -> DenseModel:
        if reference not in opened:
            if reference.adapter is None:
                opened[reference] = architectures.as_dense_model(open_checkpoint(hub.place(reference.model)))
            elif reference.is_of_several_adapters:
                raise CheckpointError(
                    f"{reference.adapter}: no such directory; if these are several adapters, one is all that a model "
                    f"can have on it: {MERGE_ADAPTER}"
                )
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


def _warn_of_empty_prompts(config: MergeConfig) -> None:
    """Of the first of them, and of how many there are."""
    empty = [
        (role, number, key, position)
        for role, experts in (("experts", config.experts), ("shared_experts", config.shared_experts))
        for number, expert in enumerate(experts)
        for key in ("positive_prompts", "negative_prompts")
        for position, text in enumerate(getattr(expert, key))
        if not text
    ]
    if empty:
        rest = len(empty) - 1
        more = f" ({rest:,} more {'is' if rest == 1 else 'are'} empty, too)" if rest else ""
        warnings.warn(
            f"{config.where(*empty[0])}: an empty prompt tells nothing: write text, or remove it{more}",
            MoeplanWarning,
            stacklevel=2,
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
