"""How well routers can tell experts apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from planner.expr import DType, Shape
from planner.layout import Shard

if TYPE_CHECKING:
    import numpy as np

MAX_CONDITION = 5.0
"""Routers with a larger condition number are called degenerate, as in mergekit (`warn_degenerate_gates`)."""

EQUAL = 2.0**-8
"""Rows that differ by less than this share of their length are equal to what bfloat16 rounds."""

_COLUMNS = 256
"""So many columns of a router are in float64 at a time."""
_COSINES = 1 << 20
"""So many cosines between rows are kept at a time."""


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

    num_experts, width = router.shape
    if num_experts == 1:
        return 1.0
    if num_experts - 1 > width or not np.isfinite(router).all():
        return math.inf
    length, products = 0.0, np.zeros((num_experts, num_experts))
    for part in _parts(router):
        length += float((part**2).sum())
        part -= part.mean(axis=0)
        products += part @ part.T
    # The squares of singular values, from the least, which is that of the mean: zero. What rounding may leave is none.
    squares = np.linalg.eigvalsh(products)
    least, largest = float(squares[1]), float(squares[-1])
    if largest <= EQUAL**2 * length or least <= max(router.shape) * np.finfo(np.float64).eps * largest:
        return math.inf
    return math.sqrt(largest / least)


def cosines(router: np.ndarray, most: int | None = None) -> np.ndarray:
    """Between a router's rows, the first `most` of them, and all: `[most, num_experts]`; NaN where a row is zero or not
    finite."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.sqrt(sum((part**2).sum(axis=1) for part in _parts(router)))
        found = np.asarray(sum(part[:most] @ part.T for part in _parts(router)))
        found /= lengths[:most, np.newaxis]
        found /= lengths
        return np.clip(found, -1, 1, out=found)


def _parts(router: np.ndarray) -> Iterator[np.ndarray]:
    """A router's columns, some at a time, in float64."""
    return (router[:, begin : begin + _COLUMNS].astype("float64") for begin in range(0, router.shape[1], _COLUMNS))


def router_facts(read: Callable[[], Iterable[np.ndarray]]) -> RouterFacts:
    """What the routers that `read` gives, those of a model's layers, are like. They are read several times."""
    import numpy as np

    degenerate, not_finite, zero = [], [], set[int]()
    num_layers = num_experts = 0
    for layer, router in enumerate(read()):
        num_layers, num_experts = layer + 1, len(router)
        if not condition(router) <= MAX_CONDITION:
            degenerate.append(layer)
        if not np.isfinite(router).all():
            not_finite.append(layer)
        if num_experts > 1:
            zero.update(np.flatnonzero(~router.any(axis=1)).tolist())
    closest, cosine = _most_alike(read, num_layers, num_experts)
    return RouterFacts(tuple(degenerate), num_layers, closest, cosine, tuple(sorted(zero)), tuple(not_finite))


def _most_alike(
    read: Callable[[], Iterable[np.ndarray]], num_layers: int, num_experts: int
) -> tuple[tuple[int, int] | None, float]:
    """The two experts whose rows are most alike, and the mean of the cosine between these, if any is known.

    Where experts are many, some of them are compared with all that follow, and then the next.
    """
    import numpy as np

    closest, cosine = None, -math.inf
    most = max(1, _COSINES // num_experts)
    for begin in range(0, num_experts, most):
        mean = np.asarray(sum(cosines(router[begin:], most) for router in read())) / num_layers
        mean[~np.triu(np.isfinite(mean), 1)] = -math.inf
        first, second = map(int, np.unravel_index(mean.argmax(), mean.shape))
        if mean[first, second] > cosine:
            closest, cosine = (begin + first, begin + second), float(mean[first, second])
    return closest, cosine if closest else math.nan


def stored(path: Path, offset: int, dtype: DType, shape: Shape) -> np.ndarray:
    """A router at byte `offset` of a file."""
    from executor.chunk_ops import as_array

    numel = math.prod(shape)
    with open(path, "rb") as file:
        file.seek(offset)
        return as_array(memoryview(file.read(numel * dtype.itemsize)), dtype, numel).reshape(shape)


def stored_routers(directory: Path, shards: Iterable[Shard], names: Sequence[str]) -> Iterator[np.ndarray]:
    """The routers of these `names`, as they stand in the `shards` in `directory`."""
    places = {tensor.name: (directory / shard.filename, tensor) for shard in shards for tensor in shard.tensors}
    for path, tensor in map(places.__getitem__, names):
        yield stored(path, tensor.offset, tensor.dtype, tensor.shape)
