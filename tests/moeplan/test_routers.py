"""How well routers can tell experts apart, compared with a computation that is plain, slow and large."""

import math
import tracemalloc
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from ml_dtypes import bfloat16

from moeplan.routers import condition, cosines, router_facts


def random_routers(num_layers: int, num_experts: int, width: int, dtype: object = np.float32) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.standard_normal((num_experts, width)).astype(dtype) for _ in range(num_layers)]


def with_condition(number: float, num_experts: int = 8, width: int = 1000) -> np.ndarray:
    """A router whose rows sum to zero, with this condition number."""
    random = np.random.default_rng(0)
    centred = np.eye(num_experts) - 1 / num_experts
    left = np.linalg.svd(centred)[0][:, : num_experts - 1]
    right = np.linalg.qr(random.standard_normal((width, num_experts - 1)))[0]
    return left * np.geomspace(1, 1 / number, num_experts - 1) @ right.T


@pytest.mark.parametrize("shared", [0.0, 1.0, 50.0])
@pytest.mark.parametrize("number", [1.5, 4.99, 5.01, 200.0, 1e4])
def test_condition_numbers_are_exact_whatever_rows_share(number, shared):
    router = with_condition(number) + shared / math.sqrt(1000)
    assert condition(router) == pytest.approx(number, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, bfloat16])
@pytest.mark.parametrize("same", [(0, 1), (2, 5)])
def test_a_router_with_two_equal_rows_has_no_condition_number(dtype, same):
    [router] = random_routers(1, 6, 3000, dtype)
    assert condition(router) < 2
    router[same[0]] = router[same[1]]
    assert condition(router) == math.inf


def test_more_experts_than_directions_have_no_condition_number():
    [router] = random_routers(1, 6, 5)
    assert condition(router) < math.inf
    assert condition(router[:, :4]) == math.inf


@pytest.mark.parametrize("kept", [1 << 20, 20, 1])
@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_the_experts_most_alike_are_those_whose_cosine_is_largest_on_average(monkeypatch, dtype, kept):
    monkeypatch.setattr("moeplan.routers._COSINES", kept)
    monkeypatch.setattr("moeplan.routers._COLUMNS", 7)
    routers = random_routers(3, 9, 16, dtype)
    routers[1][2] = 0  # of which no cosine is known
    rows = [router.astype(float) for router in routers]

    def mean(pair: tuple[int, int]) -> float:
        pairs = [(router[pair[0]], router[pair[1]]) for router in rows]
        return float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))

    facts = router_facts(lambda: routers)
    assert facts.closest == max((pair for pair in combinations(range(9), 2) if 2 not in pair), key=mean)
    assert facts.cosine == pytest.approx(mean(facts.closest))
    assert facts.zero == (2,)
    assert facts.num_layers == 3
    np.testing.assert_allclose(cosines(routers[0], 4), cosines(routers[0])[:4])


def test_a_single_expert_is_like_none():
    facts = router_facts(partial(random_routers, 2, 1, 16))
    assert facts.closest is None
    assert math.isnan(facts.cosine)
    assert facts.degenerate == ()


def test_memory_does_not_grow_with_the_square_of_the_number_of_experts():
    routers = random_routers(2, 3000, 64)
    tracemalloc.start()
    assert router_facts(lambda: routers).closest is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
