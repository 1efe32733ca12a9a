"""What `moeplan routes` says is wrong: each case is made so that one thing is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from routes_cases import HIDDEN_SIZE, example, layers_of, texts_of

from moeplan.routes.statistics import Layer, Text, routes

EXPERTS = ("a", "b", "c", "d")
ROWS = np.eye(4, HIDDEN_SIZE, dtype=np.float32)


def said(
    *,
    scores: Callable[[np.ndarray], np.ndarray] = lambda scores: scores,
    router: np.ndarray = ROWS,
    texts: Sequence[Text] | None = None,
    k: int = 2,
    preference: float = 3.0,
    gate_mode: str | None = "hidden",
    finished: bool = False,
) -> list[str]:
    """The advice on scores that prefer the right expert, as changed by `scores`, of three layers."""
    texts = texts_of(EXPERTS) if texts is None else texts
    layers = [Layer(scores(layer.logits), router) for layer in layers_of(texts, len(router), 3, preference, seed=0)]
    names = [str(expert) for expert in range(len(router))]
    found = routes(names, texts, layers, k, subject="x", gate_mode=gate_mode, finished=finished)
    return found.to_data()["advice"]


def test_where_nothing_is_wrong_nothing_is_said() -> None:
    assert said() == []
    assert example(64, 8).to_data()["advice"] == []
    assert example(2, 4).to_data()["advice"] == []


def test_scores_that_are_not_finite_are_named_first() -> None:
    def broken(scores: np.ndarray) -> np.ndarray:
        scores[0, 2] = math.nan
        return scores

    first, *_ = said(scores=broken, router=np.zeros_like(ROWS))
    assert first.startswith("in all layers routers give scores that are not finite")


@pytest.mark.parametrize(
    ("number", "which"), [(1, "layer 0"), (3, "layers 0, 1 and 2"), (4, "4 of 5 layers"), (5, "all layers")]
)
def test_degenerate_layers_are_named_or_counted(number: int, which: str) -> None:
    layers = [
        Layer(layer.logits, ROWS * (index >= number))
        for index, layer in enumerate(layers_of(texts_of(EXPERTS), 4, 5, 9.0, 0))
    ]
    advice = routes(EXPERTS, texts_of(EXPERTS), layers, 2, subject="x", gate_mode="hidden").to_data()["advice"]
    assert [line.split(":")[0] for line in advice] == [f"routing is degenerate in {which}"]


def test_random_routers_that_are_degenerate_are_not_given_prompts() -> None:
    assert "prompts" not in said(router=np.zeros_like(ROWS), gate_mode="random")[0]


@pytest.mark.parametrize(
    ("gate_mode", "what_to_do"), [("hidden", "routing is no better than chance"), ("random", "the routers are random")]
)
def test_agreement_no_better_than_chance_is_said_with_what_chance_is(gate_mode: str, what_to_do: str) -> None:
    [line] = said(preference=0.0, gate_mode=gate_mode)
    assert "of tokens go first to the expert whose text they are from, and chance is 25 %" in line
    assert what_to_do in line


def test_agreement_of_many_experts_is_judged_by_what_chance_is_for_so_many() -> None:
    found = example(64, 4, preference=1.0)
    assert 0.025 < found.overall.agreement_top1 < 0.11
    assert not [line for line in found.to_data()["advice"] if "chance" in line]


def test_experts_with_nearly_the_same_rows_are_named_with_their_cosine() -> None:
    rows = ROWS.copy()
    rows[3] = rows[1] + 0.25 * rows[3]
    lines = said(router=rows)
    assert (
        "experts 1 and 3 have nearly the same prompts: their rows agree by 0.97 (cosine) in most layers; give them "
        "prompts that differ more" in lines
    )


@pytest.mark.parametrize(("alike", "is_said"), [(2, True), (1, False)])
def test_rows_that_are_nearly_the_same_in_half_of_the_layers_are_named(alike: int, is_said: bool) -> None:
    rows = ROWS.copy()
    rows[3] = rows[1] + 0.25 * rows[3]
    texts = texts_of(EXPERTS)
    layers = [
        Layer(layer.logits, rows if number < alike else ROWS)
        for number, layer in enumerate(layers_of(texts, 4, 4, 9.0, 0))
    ]
    found = routes(EXPERTS, texts, layers, 2, subject="x", gate_mode="hidden")
    assert any("experts 1 and 3" in line for line in found.to_data()["advice"]) is is_said


def test_of_many_alike_pairs_three_are_named() -> None:
    rows = np.repeat(np.eye(8, HIDDEN_SIZE, dtype=np.float32), 2, axis=0)
    texts = texts_of([str(expert) for expert in range(16)])
    lines = [
        line
        for line in said(router=rows, texts=texts, preference=6.0)
        if ("rows" in line and "cosine" in line) or "so do" in line
    ]
    assert [line.split(" have")[0] for line in lines if "nearly" in line] == [
        "experts 0 and 1",
        "experts 2 and 3",
        "experts 4 and 5",
    ]
    assert lines[-1] == "so do the rows of 5 more pairs of experts, by 0.95 or more"


def test_where_most_pairs_are_alike_it_is_one_sentence() -> None:
    [line] = said(router=ROWS + 1)
    assert line.startswith("the router rows of all pairs of experts agree by 0.95 (cosine) or more")


def test_an_expert_that_gets_almost_no_tokens_is_named() -> None:
    [line] = said(scores=lambda scores: scores - np.array([0, 0, 99, 0], dtype=np.float32))
    assert line == (
        "expert 2 gets almost no tokens (0 %; an even share is 50 %): give it more and clearer prompts, or leave it out"
    )


@pytest.mark.parametrize(("every", "starved"), [(40, True), (10, False)])
def test_less_than_a_tenth_of_an_even_share_is_almost_nothing(every: int, starved: bool) -> None:
    """Of an even share of 50 %, an expert gets 2.5 % or 10 %."""

    def rare(scores: np.ndarray) -> np.ndarray:
        scores[:, 2] = -99
        scores[::every, 2] = 99
        return scores

    assert any("almost no tokens" in line for line in said(scores=rare)) is starved


def test_an_expert_without_text_need_not_get_tokens() -> None:
    texts = texts_of(EXPERTS)[:2]
    lines = said(texts=texts, scores=lambda scores: scores - np.array([0, 0, 99, 99], dtype=np.float32), k=1)
    assert [line.split(":")[0] for line in lines] == ["there is too little text to say much"]


def test_an_expert_that_gets_far_more_than_its_share_is_named() -> None:
    lines = said(scores=lambda scores: scores + np.array([0, 2.5, 0, 0], dtype=np.float32))
    assert lines[0].startswith("expert 1 gets far more than its share: it comes first for ")
    assert "an even share is 25 %" in lines[0]


def test_of_many_experts_that_get_far_more_than_their_share_three_are_named() -> None:
    def greedy(scores: np.ndarray) -> np.ndarray:
        scores[np.arange(len(scores)), np.arange(len(scores)) % 5] = 99
        return scores

    texts = texts_of([str(expert) for expert in range(16)])
    lines = [line for line in said(scores=greedy, router=np.eye(16, HIDDEN_SIZE), texts=texts) if "20 %" in line]
    more = [line for line in said(scores=greedy, router=np.eye(16, HIDDEN_SIZE), texts=texts) if "so do" in line]
    assert [line.split(" gets")[0] for line in lines] == ["expert 0", "expert 1", "expert 2"]
    assert more == ["so do 2 more experts"]


@pytest.mark.parametrize("gate_mode", ["random", "uniform_random"])
def test_experts_of_random_routers_are_not_given_prompts(gate_mode: str) -> None:
    def unfair(scores: np.ndarray) -> np.ndarray:
        return scores + np.array([0, 2.5, -99, 0], dtype=np.float32)

    lines = said(scores=unfair, gate_mode=gate_mode)
    assert [line.split(" gets")[0] for line in lines] == ["expert 2", "expert 1"]
    for line in lines:
        assert line.endswith("the routers are random, so train them, or choose a gate_mode that reads prompts")


@pytest.mark.parametrize(("factor", "word"), [(100.0, "so sharp"), (0.001, "so flat")])
def test_routers_whose_weights_mean_nothing_are_named(factor: float, word: str) -> None:
    [line] = said(scores=lambda scores: scores * np.float32(factor))
    assert line.startswith(f"routers are {word} that the first ")
    assert said(scores=lambda scores: scores * np.float32(factor), k=1) == []


def test_who_has_flat_routers_of_ridge_is_not_sent_to_ridge() -> None:
    def remedy(gate_mode: str) -> str:
        [line] = said(scores=lambda scores: scores * np.float32(0.001), gate_mode=gate_mode)
        return line.partition("rather than chosen; ")[2]

    assert remedy("hidden") == "choose gate_mode ridge, which fits the scale of its routers"
    assert remedy("ridge") == "give more text for each expert, or, where `ridge:` is large, lower it"


def test_what_several_experts_have_alike_is_not_said_to_be_the_most() -> None:
    def nothing(scores: np.ndarray) -> np.ndarray:
        return scores - np.array([0, 0, 99, 99], dtype=np.float32)

    starved, *_, short = said(scores=nothing, texts=texts_of(EXPERTS, 20))
    assert starved.startswith("experts 2 and 3 get almost no tokens (0 %; an even share is 50 %)")
    assert short.endswith("4 experts (0, 1, 2, …) have 20 tokens, and 64 are few")
    [line] = said(texts=[*texts_of(EXPERTS[:2]), Text("c", 2, 63, True), Text("d", 3, 1, True)])
    assert line.endswith("experts 2 and 3 have 63 tokens or fewer, and 64 are few")


def test_text_that_the_routers_were_made_from_is_named() -> None:
    texts = texts_of(EXPERTS)
    assert said(texts=[replace(texts[0], held_out=False), *texts[1:]])[0].startswith(
        "the routers were made from 1 of 4 texts that they are judged by"
    )
    [line] = said(texts=texts_of(EXPERTS, held_out=False))
    assert line.startswith("the routers were made from all texts that they are judged by")
    assert said(texts=[*texts, Text("notes.txt", None, 100, False)]) == []


def test_of_a_finished_model_other_text_is_asked_for_rather_than_prompts() -> None:
    texts = texts_of(EXPERTS, held_out=False)
    [before], [after] = said(texts=texts), said(texts=texts, finished=True)
    assert before.endswith(": give each expert two prompts or more, or judge by other text")
    assert after.endswith(": look at other text, too (--text), or give the YAML file of the merge")


def test_too_little_text_is_named() -> None:
    texts = texts_of(EXPERTS)
    lines = said(texts=[*texts[:2], Text("c", 2, 63, True), texts[3]])
    assert lines == [
        "there is too little text to say much: expert 2 has 63 tokens, and 64 are few",
    ]
    assert said(texts=[*texts[:2], Text("c", 2, 40, True), Text("c", 2, 24, True), texts[3]]) == []


def test_advice_is_ordered_by_what_matters_most() -> None:
    texts = texts_of(EXPERTS, 20, held_out=False)
    lines = said(
        texts=texts, router=np.zeros_like(ROWS), scores=lambda scores: np.float32(100) * (scores * 0 + ROWS[1, :4])
    )
    words = [
        "degenerate",
        "no better than chance",
        "almost no tokens",
        "far more",
        "so sharp",
        "made from",
        "too little text",
    ]
    assert [next(word for word in words if word in line) for line in lines] == words
