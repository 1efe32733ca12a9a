"""Routes to test with: scores drawn at random, higher for the expert that a token belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moeplan.routes.statistics import Layer, Routes, Text, routes

HIDDEN_SIZE = 1024


def texts_of(experts: Sequence[str], tokens: int = 200, *, held_out: bool = True) -> list[Text]:
    return [Text(name, index, tokens, held_out) for index, name in enumerate(experts)]


def layers_of(
    texts: Sequence[Text], num_experts: int, num_layers: int, preference: float, seed: int
) -> Iterator[Layer]:
    """Layers that prefer a token's own expert by so much, the more the later they are."""
    random = np.random.default_rng(seed)
    own = np.repeat([-1 if text.expert is None else text.expert for text in texts], [text.tokens for text in texts])
    for layer in range(num_layers):
        logits = random.normal(size=(len(own), num_experts)).astype(np.float32)
        logits[own >= 0, own[own >= 0]] += preference * (layer + 1) / num_layers
        yield Layer(logits, random.normal(size=(num_experts, HIDDEN_SIZE)).astype(np.float32))


def example(
    num_experts: int = 4,
    num_layers: int = 4,
    experts_per_token: int = 2,
    *,
    preference: float = 3.0,
    names: Sequence[str] | None = None,
    more_texts: Sequence[Text] = (),
    subject: str = "clown-car.yml",
    seed: int = 0,
) -> Routes:
    """Routes in which nothing is wrong."""
    experts = names or [f"models/{index}" for index in range(num_experts)]
    texts = [*texts_of(experts), *more_texts]
    layers = layers_of(texts, num_experts, num_layers, preference, seed)
    return routes(experts, texts, layers, experts_per_token, subject=subject, gate_mode="hidden")
