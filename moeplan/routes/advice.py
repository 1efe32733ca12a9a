"""What is wrong with routing, in one plain sentence for each problem, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from statistics import median_high
from typing import Any

from moeplan.gate_modes import MODES
from moeplan.routers import MAX_CONDITION
from moeplan.routes.wording import percent
from moeplan.wording import count

CHANCE = 0.1
"""Agreement that is less than this part of the way from chance to perfect, and less than 1.5 times chance, is called no
better than chance. (As a kappa, Landis and Koch, 1977, call anything below 0.2 slight.)"""

SAME_COSINE = 0.95
"""Rows that agree more than this score tokens alike: at most a third of a row's length, √(1 − 0.95²), sets it apart."""

STARVED = 0.1
"""An expert that works on less than this part of an even share is hardly there, and costs its memory all the same."""

GREEDY = 2.0
"""An expert that comes first for more than this many times an even share is called greedy, as is one that comes first
for more than what lies halfway between an even share and all tokens (which is less where experts are two)."""

SHARP = 0.99
"""Where the best expert's weight is more than this, what the others add is of the size of bfloat16's rounding."""

FLAT = 0.05
"""Where the best expert's weight is less than this part of the way from an equal weight to all, order means nothing."""

MIN_TOKENS = 64
"""A share of so many independent tokens has a standard error of up to 6 points, 1 / (2 √n); tokens of one passage are
less than independent."""

RANDOM = "the routers are random, so train them, or choose a gate_mode that reads prompts"

NAMED = 3
"""How many experts or pairs are named, rather than counted."""


def advice(data: dict[str, Any]) -> list[str]:
    """A sentence for each problem that `data` (`Routes.to_data()`) shows, what matters most first."""
    problems: tuple[Callable[[dict[str, Any]], Iterator[str]], ...] = (
        _unrouted,
        _degenerate,
        _chance,
        _same,
        _starved,
        _greedy,
        _weights,
        _seen,
        _little_text,
    )
    return [sentence for problem in problems for sentence in problem(data)]


def _unrouted(data: dict[str, Any]) -> Iterator[str]:
    layers = [index for index, layer in enumerate(data["layers"]) if layer["unrouted"]]
    if layers:
        yield (
            f"in {_layers(layers, data)} routers give scores that are not finite numbers, and so would the model: look "
            "for damaged weights in the base model, or for a dtype too small for them (float16)"
        )


def _degenerate(data: dict[str, Any]) -> Iterator[str]:
    layers = [index for index, layer in enumerate(data["layers"]) if layer["degenerate"]]
    if layers:
        yield (
            f"routing is degenerate in {_layers(layers, data)}: the router cannot tell some experts apart (the "
            f"condition number of what sets its rows apart is over {MAX_CONDITION:g}){_prompts(data)}"
        )


def _chance(data: dict[str, Any]) -> Iterator[str]:
    agreement, num_experts = data["overall"]["agreement_top1"], len(data["experts"])
    chance = 1 / num_experts
    if agreement is None or num_experts == 1 or agreement >= min(1.5 * chance, chance + CHANCE * (1 - chance)):
        return
    found = f"{percent(agreement)} of tokens go first to the expert whose text they are from, and chance is "
    if _is_random(data):
        yield f"{found}{percent(chance)}: {RANDOM}"
    else:
        yield (
            f"{found}{percent(chance)}: routing is no better than chance; give more text for each expert, or choose "
            "another gate_mode"
        )


def _same(data: dict[str, Any]) -> Iterator[str]:
    """Pairs of experts whose rows agree in at least half of the layers."""
    pairs = {}
    for a, b in combinations(range(len(data["experts"])), 2):
        cosines = [layer["cosine"][a][b] for layer in data["layers"] if layer["cosine"][a][b] is not None]
        if cosines and median_high(cosines) >= SAME_COSINE:
            pairs[a, b] = median_high(cosines)
    all_pairs = len(data["experts"]) * (len(data["experts"]) - 1) // 2
    if len(pairs) > max(all_pairs / 2, 1):
        yield (
            f"the router rows of {_of_all(len(pairs), all_pairs, 'pairs of experts')} agree by {SAME_COSINE} (cosine) "
            "or more in most layers: what all prompts share drowns what sets them apart; give prompts that differ "
            "more, or choose another gate_mode"
        )
        return
    closest = sorted(pairs, key=lambda pair: (-pairs[pair], pair))
    for a, b in closest[:NAMED]:
        yield (
            f"experts {a} and {b} have nearly the same prompts: their rows agree by {pairs[a, b]:.2f} (cosine) in most "
            "layers; give them prompts that differ more"
        )
    if len(closest) > NAMED:
        yield f"so do the rows of {count(len(closest) - NAMED, 'more pair')} of experts, by {SAME_COSINE} or more"


def _starved(data: dict[str, Any]) -> Iterator[str]:
    """Experts that get almost no tokens. Where texts have labels, an expert without a text need not get any."""
    shares, even = data["overall"]["topk"], data["experts_per_token"] / len(data["experts"])
    expected = _labels(data) or range(len(shares))
    starved = [expert for expert in expected if shares[expert] < STARVED * even]
    if starved:
        them = "them" if len(starved) > 1 else "it"
        yield (
            f"{_experts(starved)} {'get' if len(starved) > 1 else 'gets'} almost no tokens "
            f"({percent(max(shares[expert] for expert in starved))}"
            f"{' or less' * (len({percent(shares[expert]) for expert in starved}) > 1)}; an even share is "
            f"{percent(even)}): {_remedy(data, f'give {them} more and clearer prompts, or leave {them} out')}"
        )


def _greedy(data: dict[str, Any]) -> Iterator[str]:
    """Experts that come first for far too much. Text of few experts is expected to go to few."""
    shares = data["overall"]["top1"]
    even = 1 / len(_labels(data) or shares)
    limit = min(GREEDY * even, (1 + even) / 2)
    greedy = [expert for expert, share in enumerate(shares) if share > limit]
    for expert in greedy[:NAMED]:
        yield (
            f"expert {expert} gets far more than its share: it comes first for {percent(shares[expert])} of tokens, "
            f"and an even share is {percent(even)}; "
            f"{_remedy(data, 'give it prompts of its own subject only, or negative_prompts')}"
        )
    if len(greedy) > NAMED:
        yield f"so do {count(len(greedy) - NAMED, 'more expert')}"


def _weights(data: dict[str, Any]) -> Iterator[str]:
    k, weight = data["experts_per_token"], data["overall"]["first_weight"]
    if k == 1 or weight is None:
        return
    if weight > SHARP:
        yield (
            f"routers are so sharp that the first expert has {100 * weight:.1f} % of the weight: the other "
            f"{count(k - 1, 'expert')} of a token cost time and add nothing; use experts_per_token: 1, or another "
            "gate_mode"
        )
    elif weight < 1 / k + FLAT * (1 - 1 / k):
        remedy = (
            "give more text for each expert, or, where `ridge:` is large, lower it"
            if data["gate_mode"] == "ridge"
            else "choose gate_mode ridge, which fits the scale of its routers"
        )
        yield (
            f"routers are so flat that the first of {k} experts has {percent(weight)} of the weight "
            f"({percent(1 / k)} is equal): experts are averaged rather than chosen; {remedy}"
        )


def _seen(data: dict[str, Any]) -> Iterator[str]:
    labelled = [text for text in data["texts"] if text["expert"] is not None and text["tokens"]]
    seen = [text for text in labelled if not text["held_out"]]
    if seen:
        other = (
            "look at other text, too (--text), or give the YAML file of the merge"
            if data["finished"]
            else "give each expert two prompts or more, or judge by other text"
        )
        yield (
            f"the routers were made from {_of_all(len(seen), len(labelled), 'texts')} that they are judged by, so "
            f"agreement is better here than it will be: {other}"
        )


def _little_text(data: dict[str, Any]) -> Iterator[str]:
    labels = _labels(data)
    tokens = {
        label: sum(text["tokens"] for text in data["texts"] if text["expert"] == label)
        for label in (range(len(data["experts"])) if labels else ())
    }
    short = [label for label in tokens if tokens[label] < MIN_TOKENS]
    if short:
        yield (
            f"there is too little text to say much: {_experts(short)} {'have' if len(short) > 1 else 'has'} "
            f"{count(max(tokens[label] for label in short), 'token')}"
            f"{' or fewer' * (len({tokens[label] for label in short}) > 1)}, and "
            f"{MIN_TOKENS} are few"
        )


def _labels(data: dict[str, Any]) -> list[int]:
    """The experts that there is text of."""
    return sorted({text["expert"] for text in data["texts"] if text["expert"] is not None and text["tokens"]})


def _is_random(data: dict[str, Any]) -> bool:
    mode = data["gate_mode"]
    return mode is not None and not MODES[mode].reads_text


def _remedy(data: dict[str, Any], of_prompts: str) -> str:
    """What is to be done to routers that are made `of_prompts`, and to others."""
    return RANDOM if _is_random(data) else of_prompts


def _prompts(data: dict[str, Any]) -> str:
    return "" if _is_random(data) else "; give them prompts that differ more"


def _layers(layers: Sequence[int], data: dict[str, Any]) -> str:
    if len(layers) == len(data["layers"]):
        return "all layers"
    if len(layers) > NAMED:
        return f"{len(layers)} of {len(data['layers'])} layers"
    return f"layer{'s' * (len(layers) > 1)} {_listed(layers)}"


def _experts(experts: Sequence[int]) -> str:
    if len(experts) > NAMED:
        return f"{len(experts)} experts ({', '.join(map(str, experts[:NAMED]))}, …)"
    return f"expert{'s' * (len(experts) > 1)} {_listed(experts)}"


def _listed(numbers: Sequence[int]) -> str:
    """`1, 2 and 5`"""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _of_all(number: int, total: int, things: str) -> str:
    return f"all {things}" if number == total else f"{number:,} of {total:,} {things}"
