"""The numbers of `moeplan routes`."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from routes_cases import HIDDEN_SIZE, example, layers_of, texts_of

from moeplan.errors import UserError
from moeplan.routers import condition
from moeplan.routes import statistics
from moeplan.routes.statistics import Layer, LayerRoutes, Numbers, Routes, Text, routes

EXPERTS = ("a", "b", "c")
ORTHOGONAL = np.eye(3, 8, dtype=np.float32)


def routed(
    logits: Sequence[Sequence[float]] | np.ndarray, texts: Sequence[Text], k: int = 2, router: np.ndarray = ORTHOGONAL
) -> LayerRoutes:
    layer = Layer(np.array(logits, dtype=np.float32), router)
    return routes(EXPERTS, texts, [layer], k, subject="x", gate_mode=None).layers[0]


def equal(ours: Numbers, theirs: Numbers) -> None:
    for of in fields(Numbers):
        np.testing.assert_allclose(getattr(ours, of.name), getattr(theirs, of.name), atol=1e-6, err_msg=of.name)


def test_numbers_are_those_computed_by_hand() -> None:
    logits = np.log([[2, 1, 1], [1, 2, 1], [1, 6, 5]])
    found = routed(logits, [Text("a", 0, 2, True), Text("b", 1, 1, True)]).numbers
    np.testing.assert_allclose(found.text_top1, [[0.5, 0.5, 0], [0, 1, 0]])
    np.testing.assert_allclose(found.text_topk, [[1, 1, 0], [0, 1, 1]])
    np.testing.assert_allclose(found.top1, [0.25, 0.75, 0])
    np.testing.assert_allclose(found.topk, [0.5, 1, 0.5])
    assert found.agreement_top1 == pytest.approx(0.75)
    assert found.agreement_topk == pytest.approx(1)
    last = math.log(12) / 12 + math.log(2) / 2 + math.log(12 / 5) * 5 / 12
    assert found.entropy == pytest.approx((1.5 * math.log(2) + last) / 2 / math.log(3), rel=1e-6)
    assert found.first_weight == pytest.approx((2 / 3 + 6 / 11) / 2, rel=1e-6)
    # f = [1/4, 1/2, 1/4], P = [11/48, 7/16, 1/3]
    assert found.load_balance == pytest.approx(3 * (11 / 192 + 7 / 32 + 1 / 12), rel=1e-6)
    assert found.unrouted == 0


def test_an_expert_counts_the_same_whatever_the_length_of_its_text() -> None:
    found = routed([[1, 0, 0]] * 9 + [[0, 1, 0]], [Text("a", 0, 9, True), Text("b", 1, 1, True)], k=1).numbers
    np.testing.assert_allclose(found.top1, [0.5, 0.5, 0])


def test_a_text_that_is_no_experts_counts_by_itself_only() -> None:
    found = routed([[1, 0, 0], [0, 0, 1]], [Text("a", 0, 1, True), Text("file", None, 1, True)], k=1).numbers
    np.testing.assert_allclose(found.top1, [1, 0, 0])
    np.testing.assert_allclose(found.text_top1[1], [0, 0, 1])
    assert found.agreement_top1 == 1


def test_texts_count_the_same_where_none_is_an_experts() -> None:
    texts = [Text("one", None, 3, True), Text("two", None, 1, True), Text("empty", None, 0, True)]
    found = routed([[1, 0, 0]] * 3 + [[0, 0, 1]], texts, k=1).numbers
    np.testing.assert_allclose(found.top1, [0.5, 0, 0.5])
    assert math.isnan(found.agreement_top1)
    assert np.isnan(found.text_top1[2]).all()


def test_load_is_what_experts_work_on_not_who_comes_first() -> None:
    """As in Switch Transformer's loss, where only the first expert works, `experts_per_token: 1`."""
    scores = [[9, 8.99, 0]] * 2 + [[8.99, 9, 0]] * 2
    one, two = (routed(scores, [Text("a", 0, 4, True)], k=k).numbers.load_balance for k in (1, 2))
    assert one == pytest.approx(1.5, rel=1e-3)
    assert two == pytest.approx(1.5, rel=1e-3)
    assert routed([[9, 8.99, 0]], [Text("a", 0, 1, True)], k=2).numbers.load_balance == pytest.approx(1.5, rel=1e-3)


def test_tokens_with_scores_that_are_not_finite_go_nowhere() -> None:
    scores = [[1, 0, 0], [math.nan, 0, 1], [0, math.inf, 0], [1, 0, 0]]
    found = routed(scores, [Text("a", 0, 4, True)], k=1).numbers
    assert found.unrouted == pytest.approx(0.5)
    np.testing.assert_allclose(found.top1, [0.5, 0, 0])
    only_finite = routed([[1, 0, 0]], [Text("a", 0, 1, True)], k=1).numbers
    assert found.load_balance == pytest.approx(only_finite.load_balance)
    assert found.entropy == pytest.approx(only_finite.entropy)


def test_of_equal_scores_the_first_experts_counts() -> None:
    found = routed([[0, 0, 0]] * 4, [Text("a", 0, 4, True)]).numbers
    np.testing.assert_allclose(found.top1, [1, 0, 0])
    np.testing.assert_allclose(found.topk, [1, 1, 0])
    assert found.entropy == pytest.approx(1)


def test_what_is_not_as_many_tokens_as_the_texts_have_is_a_bug() -> None:
    with pytest.raises(ValueError, match="of 2 tokens and 3 experts"):
        routed([[1, 0, 0]], [Text("a", 0, 2, True)])


def test_where_there_is_no_text_there_is_nothing_to_say() -> None:
    with pytest.raises(UserError, match="no text to route"):
        routed(np.empty((0, 3)), [Text("a", 0, 0, True)])


@given(
    seed=st.integers(0, 2**32),
    num_experts=st.integers(1, 9),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    data=st.data(),
)
def test_numbers_are_within_their_bounds_and_follow_the_experts_when_those_change_places(
    seed: int, num_experts: int, lengths: list[int], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, num_experts), label="experts_per_token")
    labels = st.none() | st.integers(0, num_experts - 1)
    texts = [Text(str(index), data.draw(labels), tokens, True) for index, tokens in enumerate(lengths)]
    [layer] = layers_of(texts, num_experts, 1, 1.0, seed)
    order = data.draw(st.permutations(range(num_experts)))

    def numbers_of(layer: Layer, texts: Sequence[Text]) -> Numbers:
        found = routes([""] * num_experts, texts, [layer], k, subject="", gate_mode=None)
        equal(found.overall, found.layers[0].numbers)
        return found.overall

    found = numbers_of(layer, texts)
    assert found.top1.sum() == pytest.approx(1)
    assert found.topk.sum() == pytest.approx(k)
    assert (found.topk >= found.top1 - 1e-9).all()
    assert 0 <= found.entropy <= 1 + 1e-9
    assert 1 / k - 1e-9 <= found.first_weight <= 1 + 1e-9
    assert -1e-9 <= found.load_balance <= num_experts + 1e-9
    assert (np.abs(found.cosine) <= 1).all()

    moved = numbers_of(
        Layer(layer.logits[:, order], layer.router[order]),
        [replace(text, expert=None if text.expert is None else order.index(text.expert)) for text in texts],
    )
    equal(
        moved,
        replace(
            found,
            top1=found.top1[order],
            topk=found.topk[order],
            text_top1=found.text_top1[:, order],
            text_topk=found.text_topk[:, order],
            cosine=found.cosine[order][:, order],
        ),
    )
    # What is added to all scores of a token changes nothing.
    equal(numbers_of(Layer(layer.logits.astype(np.float64) + 7, layer.router), texts), found)


def test_a_text_may_be_cut_in_two_and_counted_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, halves = texts_of(EXPERTS, 40), [half for text in texts_of(EXPERTS, 20) for half in (text, text)]
    [layer] = layers_of(whole, 3, 1, 2.0, seed=1)
    expected = routed(layer.logits, whole).numbers
    monkeypatch.setattr(statistics, "BLOCK_TOKENS", 7)
    equal(routed(layer.logits, whole).numbers, expected)
    cut = routed(layer.logits, halves).numbers
    for name in ("top1", "topk", "agreement_top1", "agreement_topk", "entropy", "first_weight", "load_balance"):
        np.testing.assert_allclose(getattr(cut, name), getattr(expected, name), err_msg=name)


def test_numbers_of_all_layers_are_means() -> None:
    found = example(num_layers=3)
    np.testing.assert_allclose(found.overall.top1, np.mean([layer.numbers.top1 for layer in found.layers], axis=0))
    assert found.overall.entropy == pytest.approx(np.mean([layer.numbers.entropy for layer in found.layers]))


def test_no_scores_are_kept_while_those_of_the_next_layer_are_made() -> None:
    kept: list[weakref.ref[np.ndarray]] = []

    def made() -> Layer:
        logits = np.ones((1, 3), dtype=np.float32)
        kept.append(weakref.ref(logits))
        return Layer(logits, ORTHOGONAL)

    def layers() -> Iterator[Layer]:
        for _ in range(3):
            assert all(logits() is None for logits in kept)
            yield made()

    assert len(routes(EXPERTS, [Text("a", 0, 1, True)], layers(), 2, subject="", gate_mode=None).layers) == 3


@pytest.mark.parametrize(
    ("router", "degenerate"),
    [
        (ORTHOGONAL, False),
        (ORTHOGONAL + 10, False),  # what is added to all rows changes no choice
        (ORTHOGONAL - ORTHOGONAL.mean(axis=0), False),  # rows that a fit without a bias gives sum to zero
        (np.zeros((3, 8)), True),
        (np.ones((3, 8)), True),
        (np.full((3, 8), math.nan), True),
        (np.array([[1.0, 0, 0], [1, 0.01, 0], [0, 0, 1]]), True),  # two rows that are nearly one
        (np.array([[1.0], [0], [-1]]), True),  # three experts along one direction
    ],
)
def test_a_router_is_degenerate_where_it_cannot_tell_experts_apart(router: np.ndarray, degenerate: bool) -> None:
    assert routed([[1, 0, 0]], [Text("a", 0, 1, True)], router=router).degenerate is degenerate


def test_the_condition_number_is_that_of_what_sets_rows_apart() -> None:
    assert condition(ORTHOGONAL) == pytest.approx(1)
    assert condition(np.array([[3.0, 0], [-3, 0]])) == pytest.approx(1)
    assert condition(np.ones((1, 5))) == 1
    # With a vector added that is at right angles to all of it, the router's own condition number is the same.
    rows = np.diag([1.0, 2, 3, 4])[:, :4] - np.diag([1.0, 2, 3, 4]).mean(axis=0)
    added = np.hstack([rows, np.ones((4, 1))])
    assert condition(added) == pytest.approx(np.linalg.cond(added), rel=1e-9)


def test_cosines_are_between_rows_and_unknown_of_rows_without_a_length() -> None:
    router = np.array([[1.0, 0], [1, 1], [0, 0]])
    cosine = routed([[1, 0, 0]], [Text("a", 0, 1, True)], router=router).numbers.cosine
    assert cosine[0, 1] == pytest.approx(math.sqrt(0.5))
    assert np.isnan(cosine[2]).all()
    assert np.isnan(cosine[:, 2]).all()


def test_data_is_json_whatever_is_not_finite() -> None:
    texts = [Text("a", 0, 1, True), Text("empty", None, 0, False)]
    layer = Layer(np.full((1, 3), math.nan, dtype=np.float32), np.full((3, HIDDEN_SIZE), math.inf))
    found = routes(EXPERTS, texts, [layer], 2, subject="x", gate_mode="ridge")
    data = json.loads(json.dumps(found.to_data(), allow_nan=False))
    assert data["layers"][0]["condition"] is None
    assert data["layers"][0]["degenerate"]
    assert data["layers"][0]["entropy"] is None
    assert data["overall"]["text_top1"][1] == [None, None, None]
    assert data["texts"][1] == {"name": "empty", "expert": None, "tokens": 0, "held_out": False}
    assert data["advice"]


def test_data_has_everything_there_is() -> None:
    found: Routes = example(more_texts=[Text("notes.txt", None, 50, True)])
    data = found.to_data()
    assert list(data) == [
        "subject", "finished", "gate_mode", "experts_per_token", "experts", "texts", "overall", "layers", "advice",
    ]  # fmt: skip
    assert set(data["layers"][0]) == {*(of.name for of in fields(Numbers)), "condition", "degenerate"}
    assert data["overall"]["agreement_top1"] == pytest.approx(found.overall.agreement_top1, abs=1e-6)
    assert np.shape(data["overall"]["text_top1"]) == (5, 4)
    assert np.shape(data["layers"][3]["cosine"]) == (4, 4)
