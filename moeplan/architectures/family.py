"""What an output family is: data. One file beside this one declares each, and `moeplan.lowering` reads them all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """A family of MoE models that merges can be written as.

    Tensors outside the MLPs keep their names. In the names of the others `{layer}` and `{expert}` stand for numbers.
    """

    name: str
    """As `architecture:` in the YAML may abbreviate it, in any case."""

    sources: tuple[str, ...]
    """The dense families, by `model_type`, that its experts can come from."""

    model_type: str
    model_class: str
    """The class in transformers that reads it."""

    router: str
    """The router's weight, `[num_experts, hidden_size]`."""

    experts: Mapping[str, str]
    """Each expert's tensors: the output name by the name in the source's MLP."""

    num_experts_key: str
    """What config.json calls the number of experts."""

    carried: tuple[str, ...]
    """Settings that config.json takes over from the base, complete with the base family's defaults."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are always so."""
