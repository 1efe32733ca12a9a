"""Halves of the prompts: where routers are made without one of them, it shows what they make of text that is new."""

from __future__ import annotations

from collections.abc import Sequence


def folds(positive: Sequence[Sequence[int]], lengths: Sequence[int], bos: int) -> dict[int, int]:
    """In which of two halves, 0 or 1, each prompt is, so that routers can be made without one half and tried on it.

    `positive` are the prompts of each expert, which is left some in either half; one that has a single prompt cannot do
    without it, so that is in neither. Nor are those that have no more than `bos` tokens, which tell nothing. Halves
    have about the same number of tokens.
    """
    found: dict[int, int] = {}
    positive = [[prompt for prompt in prompts if lengths[prompt] > bos] for prompts in positive]
    for prompts in positive:
        sizes = [sum(lengths[prompt] for prompt in prompts if found.get(prompt) == fold) for fold in (0, 1)]
        for prompt in prompts:
            if prompt not in found:
                found[prompt] = int(sizes[0] > sizes[1])
                sizes[found[prompt]] += lengths[prompt]
    for prompts in positive:
        if len({found.get(prompt) for prompt in prompts} - {None}) == 1 and all(prompt in found for prompt in prompts):
            del found[prompts[-1]]
    return found


def kept(
    of_rows: Sequence[Sequence[int]],
    positive: Sequence[Sequence[int]],
    lengths: Sequence[int],
    bos: int,
    without: int | None,
) -> list[list[int]]:
    """The prompts of each row that are left `without` that fold of the `positive` ones."""
    fold = {} if without is None else folds(positive, lengths, bos)
    return [[prompt for prompt in prompts if without is None or fold.get(prompt) != without] for prompts in of_rows]
