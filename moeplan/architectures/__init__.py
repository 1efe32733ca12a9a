"""The output families, and which of them a merge is written as."""

from __future__ import annotations

from collections.abc import Sequence

from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import Family
from moeplan.architectures.mixtral import MIXTRAL
from moeplan.config import ConfigError, MergeConfig

FAMILIES: tuple[Family, ...] = (MIXTRAL,)
"""In order of preference where several fit."""


def choose(config: MergeConfig, models: Sequence[DenseModel]) -> Family:
    """The family that `config` names, or the first that fits it and the source `models`.

    Raises ConfigError, saying for each family why not, where there is none.
    """
    named = config.architecture or ""
    candidates = [family for family in FAMILIES if family.name.lower().startswith(named.lower())]
    if not candidates:
        known = ", ".join(family.name for family in FAMILIES)
        raise ConfigError(f"{config.where('architecture')}: there is no output family {named!r}; there is {known}")
    reasons = [(family, _why_not(family, config, models)) for family in candidates]
    for family, reason in reasons:
        if reason is None:
            return family
    listed = "; ".join(f"{family.name}: {reason}" for family, reason in reasons)
    raise ConfigError(f"{config.where('experts')}: no output family fits these models. {listed}")


def _why_not(family: Family, config: MergeConfig, models: Sequence[DenseModel]) -> str | None:
    if config.shared_experts:
        return f"{config.where('shared_experts')}: it has no shared expert; remove the key"
    for model in models:
        if model.name not in family.sources:
            return f"it is made of {' or '.join(family.sources)} models, and {model.checkpoint.path} is {model.name}"
    return None
