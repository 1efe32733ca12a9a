"""The gate modes that a config may name: what the rest of moeplan must know of each, and where its routers are made.

Every command reads this, so it imports nothing. A new mode is an entry here, and the module that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModeSpec:
    """A mode: the `module` of `moeplan.gates` that makes its routers, whether it `reads_text` of the experts', and
    whether that may be passages that are drawn from their models (`positive_samples`)."""

    module: str
    reads_text: bool = True
    takes_samples: bool = False


MODES: Mapping[str, ModeSpec] = {
    "hidden": ModeSpec("hidden"),
    "hidden_avg": ModeSpec("hidden"),
    "hidden_last": ModeSpec("hidden"),
    "ridge": ModeSpec("ridge", takes_samples=True),
    "cheap_embed": ModeSpec("cheap_embed"),
    "random": ModeSpec("random", reads_text=False),
    "uniform_random": ModeSpec("random", reads_text=False),
}
