"""What programs that read merged models get wrong, or refuse, said when one is planned.

docs/compatibility.md has it all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from moeplan.architectures.family import Family
from moeplan.config import MergeConfig
from moeplan.errors import MoeplanWarning
from moeplan.places import Place
from moeplan.tokenizer_files import FAST, MAKE_FAST, SLOW, has_code, is_slow


def warn_of_readers(config: MergeConfig, families: Sequence[Family], settings: Mapping[str, Any]) -> None:
    """Say who cannot read a model of the first of `families` with these `settings` in its config.json as it is meant.

    `families` are all that fit.
    """
    family, *others = families
    count = len(config.experts)
    if count & (count - 1):
        _warn(config, "experts", f"{count} is no power of two, which older versions of llama.cpp cannot read")
    for words in family.warnings(settings):
        _warn(config, "architecture", words)
    if family.readers is not None:
        instead = "".join(f"; `architecture: {other.name}` would fit, too" for other in others)
        _warn(
            config, "architecture", f"transformers 5 cannot load a {family.name} model: use {family.readers}{instead}"
        )


def warn_of_tokenizer(config: MergeConfig, family: Family, base: Place) -> None:
    """Of one that transformers 5 reads wrong in the merged model, and not by code of its own."""
    if family.ignores_tokenizer_class and is_slow(base) and not has_code(base):
        _warn(
            config,
            "base_model",
            f"{base.label} has a {SLOW} and no {FAST}, without which transformers 5 reads the tokenizer of a "
            f"{family.name} model wrong; to make one, run in the merged model's directory: {MAKE_FAST}",
        )


def _warn(config: MergeConfig, key: str, words: str) -> None:
    warnings.warn(f"{config.where(key)}: {words}", MoeplanWarning, stacklevel=4)
