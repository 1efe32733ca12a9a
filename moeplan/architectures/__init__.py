"""The output families, and which of them a merge is written as."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moeplan.architectures.attention import CannotHoldError, attention_settings
from moeplan.architectures.deepseek import DEEPSEEK
from moeplan.architectures.dense import DenseModel, dense_model
from moeplan.architectures.family import Family
from moeplan.architectures.granite_moe_shared import GRANITE_MOE_SHARED
from moeplan.architectures.mixtral import MIXTRAL
from moeplan.architectures.qwen2_moe import QWEN2_MOE
from moeplan.architectures.qwen3_moe import QWEN3_MOE
from moeplan.checkpoint import Checkpoint
from moeplan.config import MergeConfig
from moeplan.places import CheckpointError
from moeplan.untrusted_json import show
from moeplan.yaml_file import ConfigError

FAMILIES: tuple[Family, ...] = (MIXTRAL, DEEPSEEK, QWEN2_MOE, QWEN3_MOE, GRANITE_MOE_SHARED)
"""In order of preference where several fit, which is mergekit's, so that the same YAML gives the same family."""


DENSE_FAMILIES = {dense.model_type: dense for family in FAMILIES for dense in family.sources}


def as_dense_model(checkpoint: Checkpoint) -> DenseModel:
    """See `checkpoint` as a model of its family. Raises CheckpointError where it is of none that moeplan knows."""
    family = DENSE_FAMILIES.get(checkpoint.model_type)
    if family is None:
        raise CheckpointError(
            f"{checkpoint.label}: models of type {show(checkpoint.model_type)} cannot be merged; "
            f"moeplan knows {', '.join(sorted(DENSE_FAMILIES))}"
        )
    return dense_model(checkpoint, family)


def choose(config: MergeConfig, models: Sequence[DenseModel]) -> list[Family]:
    """The families that fit `config` and its source `models`, best first, among those that `architecture` names.

    The base stands first in `models`. Raises ConfigError, saying for each family why not and what to change, where
    there is none; CheckpointError for a base that no family could hold.
    """
    named = config.architecture or ""
    candidates = [family for family in FAMILIES if any(_plain(name).startswith(_plain(named)) for name in family.names)]
    if not candidates:
        known = ", ".join(family.name for family in FAMILIES)
        raise ConfigError(f"{config.where('architecture')}: there is no output family {named!r}; there are {known}")
    reasons = [(family, _why_not(family, config, models)) for family in candidates]
    fitting = [family for family, reason in reasons if reason is None]
    if not fitting:
        table = "".join(f"\n  {family.name:<20} {reason}" for family, reason in reasons)
        raise ConfigError(f"{config.where('experts')}: no output family fits these models:{table}")
    return fitting


def _plain(name: str) -> str:
    """A family's name, however it is spelt: `Qwen2 MoE`, `qwen2_moe`, `qwen2-moe`."""
    return re.sub(r"[-_ ]", " ", name.lower())


def _why_not(family: Family, config: MergeConfig, models: Sequence[DenseModel]) -> str | None:
    """Why `family` cannot be the output, and which change to the YAML would make it fit; None where it fits."""
    for model in models:
        if model.family not in family.sources:
            sources = ", ".join(source.model_type for source in family.sources)
            return f"is made of {sources} models, and {model.checkpoint.label} is {model.model_type}"
    shared = config.shared_experts
    if shared and family.shared is None:
        return "has no shared expert: remove shared_experts"
    if family.shared is not None and family.shared.required and not shared:
        return "needs a shared expert: add one under shared_experts"
    if family.shared is not None and shared:
        has_gate = family.shared.gate is not None
        if not has_gate and (shared[0].has_text or shared[0].negative_prompts):
            return "has no gate on its shared expert: remove the prompts of shared_experts[0]"
        if has_gate and not shared[0].has_text and config.reads_text:
            return "has a gate on its shared expert: give shared_experts[0] positive_prompts"
    try:
        attention_settings(family, models[0])
    except CannotHoldError as error:
        return str(error)
    return None
