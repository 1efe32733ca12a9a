"""How well routers can tell experts apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from planner.layout import Shard

if TYPE_CHECKING:
    import numpy as np

MAX_CONDITION = 5.0
"""Routers with a larger condition number are called degenerate, as in mergekit (`warn_degenerate_gates`)."""

EQUAL = 2.0**-8
"""Rows that differ by less than this share of their length are equal to what bfloat16 rounds."""


@dataclass(frozen=True)
class RouterFacts:
    """What a model's routers are like: the layers where they are degenerate, of how many; the two experts whose rows
    are most alike, and the mean over all layers of the cosine between those; the experts, of several, whose rows are
    zero somewhere, so that nothing is like them; the layers where not all numbers are finite."""

    degenerate: tuple[int, ...]
    num_layers: int
    closest: tuple[int, int] | None
    cosine: float
    zero: tuple[int, ...] = ()
    not_finite: tuple[int, ...] = ()


def condition(router: np.ndarray) -> float:
    """How much better a router `[num_experts, hidden_size]` tells some experts apart than others: 1 is equally well.

    It is the condition number of what sets the rows apart, their differences from their mean, for a vector that is
    added to all rows changes no softmax and no choice. (Rows that a fit without a bias gives sum to zero, so the
    condition number of the router as it is would be infinite.) Infinite, where some experts cannot be told apart.
    """
    import numpy as np

    num_experts = len(router)
    if num_experts == 1:
        return 1.0
    rows = np.asarray(router, dtype=np.float64)
    if not np.isfinite(rows).all():
        return math.inf
    sizes = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    if len(sizes) < num_experts - 1 or sizes[0] <= EQUAL * np.linalg.norm(rows):
        return math.inf
    smallest = float(sizes[num_experts - 2])
    return float(sizes[0]) / smallest if smallest > 0 else math.inf


def cosines(router: np.ndarray) -> np.ndarray:
    """Between a router's rows, `[num_experts, num_experts]`; NaN where a row is zero or not finite."""
    import numpy as np

    rows = np.asarray(router, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(np.clip(rows @ rows.T, -1, 1))


def router_facts(routers: Iterable[np.ndarray]) -> RouterFacts:
    """What `routers`, those of a model's layers, are like."""
    import numpy as np

    degenerate, not_finite, alike, zero = [], [], [], set[int]()
    for layer, router in enumerate(routers):
        if not condition(router) <= MAX_CONDITION:
            degenerate.append(layer)
        if not np.isfinite(router).all():
            not_finite.append(layer)
        alike.append(cosines(router))
        if len(router) > 1:
            zero.update(row for row, values in enumerate(router) if not values.any())
    mean = np.mean(alike, axis=0)
    pairs = [(float(mean[pair]), pair) for pair in combinations(range(len(mean)), 2) if np.isfinite(mean[pair])]
    cosine, closest = max(pairs, default=(math.nan, None))
    return RouterFacts(tuple(degenerate), len(alike), closest, cosine, tuple(sorted(zero)), tuple(not_finite))


def stored_routers(directory: Path, shards: Iterable[Shard], names: Sequence[str]) -> Iterator[np.ndarray]:
    """The routers of these `names`, in float32, as they stand in the `shards` in `directory`."""
    import ml_dtypes  # noqa: F401 - with which numpy knows bfloat16
    from safetensors import safe_open

    places = {tensor.name: shard.filename for shard in shards for tensor in shard.tensors}
    for name in names:
        with safe_open(directory / places[name], framework="np") as tensors:
            yield tensors.get_tensor(name).astype("float32")
