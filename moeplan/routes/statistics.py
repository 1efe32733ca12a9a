"""Where tokens go: numbers from the scores that each layer's router gives to the tokens of texts.

docs/routes.md has the formulas. Layers come one after the other, and of their scores only sums are kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moeplan.errors import UserError
from moeplan.routers import MAX_CONDITION, condition, cosines
from moeplan.routes.advice import advice

BLOCK_TOKENS = 16384
"""How many tokens are counted at a time: 64 experts' scores of so many take 8 MiB in float64."""


@dataclass(frozen=True)
class Text:
    """A group of tokens with one label."""

    name: str
    """What it is called: by the name of the expert's model, or of the file."""
    expert: int | None
    """The expert that its tokens belong to; None where there is none, as for a file of `--text`."""
    tokens: int
    """How many there are."""
    held_out: bool
    """Whether the router that scored them was made without them."""


@dataclass(frozen=True)
class Layer:
    """What a layer's router is, and what it says."""

    logits: np.ndarray
    """`[tokens, num_experts]`, float32: its scores of all texts' tokens, text after text."""
    router: np.ndarray
    """`[num_experts, hidden_size]`, float32: the final router's rows."""


@dataclass(frozen=True)
class Numbers:
    """What is known of a layer, or of all on average. What there is nothing to know of is NaN.

    Over all texts, each expert's text counts the same, whatever its length, and texts that are no expert's do not
    count, unless there are no others. Shares are between 0 and 1.
    """

    top1: np.ndarray
    """`[num_experts]`: the share of tokens whose best expert this is."""
    topk: np.ndarray
    """`[num_experts]`: the share of tokens that it works on, as one of `experts_per_token`."""
    text_top1: np.ndarray
    """`[texts, num_experts]`: `top1` of each text by itself."""
    text_topk: np.ndarray
    """`[texts, num_experts]`: `topk` of each text by itself."""
    agreement_top1: float
    """The share of tokens whose best expert is the one that their text belongs to."""
    agreement_topk: float
    """The share of tokens on which that expert works."""
    entropy: float
    """The mean entropy of the softmax over all experts, as a share of the largest possible."""
    first_weight: float
    """The mean weight of a token's best expert, where those of its `experts_per_token` best sum to 1."""
    load_balance: float
    """Switch Transformer's auxiliary loss: 1 is even, num_experts the worst."""
    unrouted: float
    """The share of tokens with a score that is not finite. They go nowhere."""
    cosine: np.ndarray
    """`[num_experts, num_experts]`: between the router's rows."""


@dataclass(frozen=True)
class LayerRoutes:
    """A layer: where its tokens go, and whether its router can tell the experts apart."""

    numbers: Numbers
    condition: float
    degenerate: bool


@dataclass(frozen=True)
class Routes:
    """Where the tokens of `texts` go."""

    subject: str
    finished: bool
    """Whether that is a model, rather than the YAML file of a merge."""
    gate_mode: str | None
    experts_per_token: int
    experts: tuple[str, ...]
    texts: tuple[Text, ...]
    layers: tuple[LayerRoutes, ...]
    overall: Numbers

    def to_data(self) -> dict[str, Any]:
        """Everything for machines, advice included, in what JSON has: a number that it has not is None."""
        data = {
            "subject": self.subject,
            "finished": self.finished,
            "gate_mode": self.gate_mode,
            "experts_per_token": self.experts_per_token,
            "experts": list(self.experts),
            "texts": [
                {"name": text.name, "expert": text.expert, "tokens": text.tokens, "held_out": text.held_out}
                for text in self.texts
            ],
            "overall": _numbers_data(self.overall),
            "layers": [
                {
                    **_numbers_data(layer.numbers),
                    "condition": _plain(layer.condition),
                    "degenerate": layer.degenerate,
                }
                for layer in self.layers
            ],
        }
        return {**data, "advice": advice(data)}


def routes(
    experts: Sequence[str],
    texts: Sequence[Text],
    layers: Iterable[Layer],
    experts_per_token: int,
    *,
    subject: str,
    gate_mode: str | None,
    finished: bool = False,
) -> Routes:
    """Where the tokens of `texts` go in each of `layers`, of a model that is `finished` or not.

    Raises UserError where there are no tokens.
    """
    if not any(text.tokens for text in texts):
        raise UserError(f"{subject}: there is no text to route; give the experts prompts, or a text file with --text")

    def of_layer(layer: Layer) -> LayerRoutes:
        return _layer_routes(layer, texts, len(experts), experts_per_token)

    # Unlike a loop, whose variable would, this keeps no layer while the next one is being made.
    found = tuple(map(of_layer, layers))
    return Routes(
        subject=subject,
        finished=finished,
        gate_mode=gate_mode,
        experts_per_token=experts_per_token,
        experts=tuple(experts),
        texts=tuple(texts),
        layers=found,
        overall=_mean([layer.numbers for layer in found]),
    )


@dataclass(frozen=True)
class _Sums:
    """Over the tokens of each text."""

    top1: np.ndarray  # [texts, num_experts]
    topk: np.ndarray  # [texts, num_experts]
    probability: np.ndarray  # [texts, num_experts]
    entropy: np.ndarray  # [texts], in nats
    first_weight: np.ndarray  # [texts]
    routed: np.ndarray  # [texts]: tokens whose scores are finite


def _layer_routes(layer: Layer, texts: Sequence[Text], num_experts: int, k: int) -> LayerRoutes:
    tokens = sum(text.tokens for text in texts)
    if layer.logits.shape != (tokens, num_experts) or layer.router.shape[:1] != (num_experts,):
        raise ValueError(
            f"scores {layer.logits.shape} and router {layer.router.shape} of {tokens} tokens and {num_experts} experts"
        )
    sums = _sums(layer.logits, texts, k)
    conditioned = condition(layer.router)
    return LayerRoutes(_numbers(sums, texts, k, cosines(layer.router)), conditioned, not conditioned <= MAX_CONDITION)


def _sums(logits: np.ndarray, texts: Sequence[Text], k: int) -> _Sums:
    shape = (len(texts), logits.shape[1])
    sums = _Sums(*(np.zeros(shape) for _ in range(3)), *(np.zeros(len(texts)) for _ in range(3)))
    begin = 0
    for index, text in enumerate(texts):
        for start in range(begin, begin + text.tokens, BLOCK_TOKENS):
            _add(sums, index, logits[start : min(start + BLOCK_TOKENS, begin + text.tokens)], k)
        begin += text.tokens
    return sums


def _add(sums: _Sums, text: int, logits: np.ndarray, k: int) -> None:
    """Count `logits`, `[tokens, num_experts]`. Of equal scores the first expert's counts as the best."""
    left = logits[np.isfinite(logits).all(axis=1)].astype(np.float64)
    every = np.arange(len(left))
    relative = left - left.max(axis=1, keepdims=True)
    weights = np.exp(relative)
    totals = weights.sum(axis=1)
    chosen_weights = np.zeros(len(left))
    for place in range(k):
        best = left.argmax(axis=1)
        counts = np.bincount(best, minlength=left.shape[1])
        sums.topk[text] += counts
        if place == 0:
            sums.top1[text] += counts
        chosen_weights += weights[every, best]
        left[every, best] = -np.inf
    sums.probability[text] += (weights / totals[:, np.newaxis]).sum(axis=0)
    sums.entropy[text] += (np.log(totals) - (weights * relative).sum(axis=1) / totals).sum()
    sums.first_weight[text] += (1 / chosen_weights).sum()  # the best expert's weight is e⁰
    sums.routed[text] += len(left)


def _numbers(sums: _Sums, texts: Sequence[Text], k: int, cosine: np.ndarray) -> Numbers:
    num_experts = sums.top1.shape[1]
    tokens = np.array([text.tokens for text in texts], dtype=np.float64)
    weights = _weights(texts) / np.maximum(tokens, 1)  # of a token of each text
    with np.errstate(divide="ignore", invalid="ignore"):  # what there is none of is NaN
        text_top1, text_topk = sums.top1 / tokens[:, np.newaxis], sums.topk / tokens[:, np.newaxis]
        routed = weights @ sums.routed
        load, probability = weights @ sums.topk / (routed * k), weights @ sums.probability / routed
        entropy = weights @ sums.entropy / routed / math.log(max(num_experts, 2))
        first_weight = weights @ sums.first_weight / routed
    labelled = [(index, text.expert) for index, text in enumerate(texts) if text.expert is not None and text.tokens]
    return Numbers(
        top1=weights @ sums.top1,
        topk=weights @ sums.topk,
        text_top1=text_top1,
        text_topk=text_topk,
        agreement_top1=_agreement(weights, sums.top1, labelled),
        agreement_topk=_agreement(weights, sums.topk, labelled),
        entropy=float(entropy),
        first_weight=float(first_weight),
        load_balance=float(num_experts * load @ probability),
        unrouted=max(0.0, float(1 - routed)),
        cosine=cosine,
    )


def _weights(texts: Sequence[Text]) -> np.ndarray:
    """`[texts]`, summing to 1: what each text counts. Experts count equally, tokens of one expert's texts, too."""
    labels = [text.expert for text in texts if text.expert is not None and text.tokens]
    if not labels:
        counted = np.array([bool(text.tokens) for text in texts], dtype=np.float64)
        return np.asarray(counted / counted.sum())
    of_label = {label: sum(text.tokens for text in texts if text.expert == label) for label in labels}
    return np.array(
        [0.0 if text.expert not in of_label else text.tokens / of_label[text.expert] / len(of_label) for text in texts]
    )


def _agreement(weights: np.ndarray, counts: np.ndarray, labelled: list[tuple[int, int]]) -> float:
    if not labelled:
        return math.nan
    return float(sum(weights[text] * counts[text, expert] for text, expert in labelled))


def _mean(numbers: Sequence[Numbers]) -> Numbers:
    """The mean over layers of everything; what is NaN in a layer does not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what is NaN in all layers
        means = {of.name: np.nanmean([getattr(each, of.name) for each in numbers], axis=0) for of in fields(Numbers)}
    plain: dict[str, Any] = {name: mean if mean.ndim else float(mean) for name, mean in means.items()}
    return Numbers(**plain)


def _numbers_data(numbers: Numbers) -> dict[str, Any]:
    return {of.name: _plain(getattr(numbers, of.name)) for of in fields(Numbers)}


def _plain(value: Any) -> Any:
    """Numbers and arrays as JSON has them, to six decimals."""
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value.tolist()]
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return round(float(value), 6) if math.isfinite(value) else None
