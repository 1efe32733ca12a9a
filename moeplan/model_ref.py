"""What a YAML file calls a model: `MODEL`, or `MODEL+ADAPTER` for a model with a LoRA adapter on it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A model, and the adapter on it if there is one."""

    model: str
    adapter: str | None = None

    @property
    def is_of_several_adapters(self) -> bool:
        """Whether what should be an adapter is none that is here, and looks like more than one."""
        return self.adapter is not None and "+" in self.adapter.partition("@")[0] and not os.path.lexists(self.adapter)

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


def parse_model_ref(text: str) -> ModelRef:
    """What `text` names. A path that exists is a model, also where there is a plus in it.

    Of several pluses, the one that parts two paths that exist counts, else the first.
    """
    if os.path.lexists(text):
        return ModelRef(text)
    splits = [(text[:at], text[at + 1 :]) for at, letter in enumerate(text) if letter == "+"]
    splits = [(model, adapter) for model, adapter in splits if model and adapter]
    if not splits:
        return ModelRef(text)
    both_exist = [split for split in splits if all(map(os.path.lexists, split))]
    return ModelRef(*(both_exist or splits)[0])
