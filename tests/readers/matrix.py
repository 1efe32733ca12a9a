"""Which merges a reader is tried with, and how what it cannot do is written down.

Every recipe of one source for each output, and a few recipes of what another source or layout could still get wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from families import OUTPUTS, Case, recipes_of
from reading import Reader, ReaderError, error_of, some_tokens

LLAMA3 = ("rope-old-llama3", "rope-new-llama3")
YARN = ("rope-old-yarn", "rope-new-yarn")

# moeplan refuses them, and a sliding window.
NOT_IN_DEEPSEEK = (*LLAMA3, *YARN, "rope-yarn-in-two-places", "rope-longrope", "wide-heads")

FULLY_TESTED = {
    "mixtral": "llama",
    "deepseek": "llama",
    "qwen2-moe": "qwen2",
    "qwen3-moe": "qwen3",
    "granite": "granite",
}
FEW = ("plain", "tied", "off-page")


@dataclass(frozen=True)
class Limit:
    """What a reader cannot do: these variants of a source in these outputs. Without a message it is computed wrong."""

    outputs: Sequence[str]
    variants: Sequence[str]
    message: str | None = None

    def check(self, reader: Reader, out: Path, source: Path, least_error: float) -> None:
        """See that the reader does not give the model `out` the logits of `source`."""
        if self.message is None:
            assert error_of(reader, out, source) > least_error
        else:
            with pytest.raises(ReaderError, match=self.message):
                reader.logits(out, some_tokens(source))


def variant_of(case: Case, recipe: str) -> str:
    return recipe.removeprefix(f"{case.source}-")


def is_first(case: Case) -> bool:
    """Whether the case has the layout and the shared expert that its family's others differ from."""
    output = OUTPUTS[case.output]
    return case.layout == next(iter(output.layouts)) and case.shared == output.shared_experts[0]


def recipes_for(case: Case) -> list[str]:
    if (case.output, case.source) == ("deepseek", "mistral"):
        return ["mistral-no-window"]
    recipes = recipes_of(case.source)
    if case.output == "deepseek":
        return [recipe for recipe in recipes if variant_of(case, recipe) not in NOT_IN_DEEPSEEK]
    full = is_first(case) and FULLY_TESTED[case.output] == case.source
    return recipes if full else [f"{case.source}-{variant}" for variant in FEW]


def merge_copies(merge, source, case, num_experts=4, **settings):
    """Merge copies of `source`, with a shared expert that adds nothing where the case has one."""
    return merge(source, [source] * num_experts, **case.settings(source, residual_scale=0), **settings)


def named(*values) -> object:
    return pytest.param(*values, id="-".join(str(value) for value in values if not isinstance(value, Limit)))


class Matrix:
    """Cases and recipes, parted by what of them a reader cannot do."""

    def __init__(self, cases: Sequence[Case], limits: Sequence[Limit]) -> None:
        pairs = [(case, recipe, _limit_of(limits, case, recipe)) for case in cases for recipe in recipes_for(case)]
        self.right = [named(case, recipe) for case, recipe, limit in pairs if limit is None]
        self.limited = [named(case, recipe, limit) for case, recipe, limit in pairs if limit is not None]


def _limit_of(limits: Sequence[Limit], case: Case, recipe: str) -> Limit | None:
    variant = variant_of(case, recipe)
    return next((limit for limit in limits if case.output in limit.outputs and variant in limit.variants), None)
