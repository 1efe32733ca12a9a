"""`ridge`: routers that tell the experts' texts apart as well as a linear map can, in the sense of least squares.

X is what a layer's router will see: what the MLP in its place is given, for every token but BOS of all prompts, through
the dense base. y is the expert whose prompt a token is from. With E experts, n_e tokens of expert e, and weights
w_i = 1/(E · n_y(i)), so that every expert counts the same,

    S = Σ w_i x_i x_iᵀ        C = Σ w_i (onehot(y_i) − 1/E) x_iᵀ        W = s · C (S + λ (tr S / d) I)⁻¹

is ridge regression (Hoerl & Kennard, Technometrics 12, 1970; Hastie et al., The Elements of Statistical Learning, 2nd
ed., 3.4.1 and, of indicators, 4.2), uncentred, since routers have no bias. Tokens of negative prompts count as those of
a class that no expert wants, unless another expert does. With fewer tokens than dimensions the same comes out of n × n
products, W = s · Yᵀ (A Aᵀ + λ (tr S / d) I)⁻¹ A, where A has the rows √w_i x_i (ibid., 18.3.5).

A softmax has a temperature, which least squares does not know of. s is the one at which the cross-entropy of held-out
tokens is least (Guo et al., On Calibration of Modern Neural Networks, ICML 2017): each half of the prompts is scored by
a router that was made from the other half.

The sigmoid gate of a shared expert is made of two classes, its own prompts and all others: a softmax over two is the
sigmoid of their difference.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from moeplan.gates import GateMode, GateRequest
from moeplan.gates.evaluation import Evaluation
from moeplan.gates.prompts import PromptError
from planner.expr import DType, Opaque

if TYPE_CHECKING:
    import numpy as np
    import torch

PANEL_ROWS = 1024
TILE = 512
"""Products are computed in tiles of so many rows and columns, from so many tokens at a time, each in one thread: so it
makes no difference how many threads there are."""

MOST_THREADS = 4
PANELS_NBYTES = 8 * MOST_THREADS * (2 * PANEL_ROWS * TILE + TILE * TILE)

LEAST_SCALE, MOST_SCALE = 0.01, 100.0
"""Where held-out tokens tell nothing, experts get nearly equal weights; where they are told apart without an error, the
first one gets nearly all."""

USUAL_SCALE = 5.0
"""Where no tokens can be held out: what they ask for with the models that docs/routing.md is about."""


@dataclass(frozen=True)
class Problem:
    """Which prompts are of which class, by their indices, and which are of none of them."""

    classes: list[list[int]]
    none: list[int]

    def num_tokens(self, lengths: Sequence[int], bos: int) -> int:
        """How many tokens its prompts have beside BOS, which is left out."""
        return sum(lengths[prompt] - bos for prompt in {*chain(*self.classes), *self.none})


def problems(positive: Sequence[Sequence[int]], negative: Sequence[Sequence[int]], num_experts: int) -> list[Problem]:
    """Telling the experts' prompts apart; after that, for each shared expert, which stand behind, telling its prompts
    (the second class) from all others."""
    of_shared = list(zip(positive[num_experts:], negative[num_experts:], strict=True))
    positive, negative = positive[:num_experts], negative[:num_experts]
    wanted = {prompt for of_expert in positive for prompt in of_expert}
    unwanted = [prompt for of_expert in negative for prompt in of_expert if prompt not in wanted]
    found = [Problem([list(of_expert) for of_expert in positive], unwanted)]
    for own, others in of_shared:
        rest = [prompt for of_expert in positive for prompt in of_expert]
        found.append(Problem([[*rest, *(prompt for prompt in others if prompt not in own)], list(own)], []))
    return found


def routers(request: GateRequest) -> list[Opaque]:
    """A router for each layer, each from what the layer's MLP is given."""
    evaluation = Evaluation.of(request)
    lengths, bos = evaluation.lengths, len(evaluation.prompts.start)
    for number, own in enumerate(evaluation.positive):
        if all(lengths[prompt] == bos for prompt in own):
            raise PromptError(
                (number, "positive_prompts"), "there is no token beside BOS, which gate_mode ridge leaves out"
            )
    positive, negative = evaluation.used(evaluation.positive), evaluation.used(evaluation.prompts.negative)
    wanted = problems(positive, negative, len(request.experts))
    params = json.dumps(
        {
            "ridge": request.ridge,
            "lengths": lengths,
            "bos": bos,
            "problems": [[problem.classes, problem.none] for problem in wanted],
        }
    )
    workspace = max(
        workspace_nbytes(problem.num_tokens(lengths, bos), request.base.model.hidden_size, len(request.rows))
        for problem in wanted
    )
    return [
        Opaque("ridge", params, (seen,), DType.F32, request.router_shape, workspace) for seen in evaluation.mlp_inputs()
    ]


def workspace_nbytes(num_tokens: int, hidden_size: int, num_rows: int) -> int:
    """What it takes to fit so many tokens: a matrix of products and its factor, in float64; the tokens' rows, where
    they are fewer than dimensions, and as they are gathered; their scores and targets."""
    size = min(num_tokens, hidden_size)
    matrices = 2 * size * size + (3 * num_tokens * hidden_size // 2 if num_tokens < hidden_size else 0)
    return 8 * (matrices + 12 * num_tokens * (num_rows + 1)) + PANELS_NBYTES


def ridge(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """From what the MLP is given, `[num_tokens, hidden_size]`, to a router, `[num_rows, hidden_size]`."""
    import torch

    threads = min(torch.get_num_threads(), MOST_THREADS)
    torch.set_num_threads(1)
    row = 0
    for classes, none in params["problems"]:
        tokens = _Tokens.of(Problem(classes, none), params["lengths"], params["bos"])
        router = _router(inputs[0], tokens, params["ridge"], threads)
        rows = router if row == 0 else router[1:] - router[:1]
        output[row : row + len(rows)] = rows
        row += len(rows)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a problem: their `rows` among all, and of which classes they are, and in which of two `folds`.

    `member` `[num_tokens, num_classes + 1]` counts how often a token is of a class, or, in the last column, of none.
    `folds` is None where they cannot be parted so that each fold has tokens of each class.
    """

    rows: np.ndarray
    member: np.ndarray
    folds: np.ndarray | None

    @staticmethod
    def of(problem: Problem, lengths: Sequence[int], bos: int) -> _Tokens:
        import numpy as np

        member = np.zeros((len(lengths), len(problem.classes) + 1))
        for number, prompts in enumerate((*problem.classes, problem.none)):
            np.add.at(member[:, number], prompts, 1)
        begins = np.cumsum([0, *lengths])
        used = [prompt for prompt in range(len(lengths)) if member[prompt].any() and lengths[prompt] > bos]
        spans = [np.arange(begins[prompt] + bos, begins[prompt + 1]) for prompt in used]
        of_token = np.repeat(used, [len(span) for span in spans])
        return _Tokens(np.concatenate(spans), member[of_token], _folds(of_token, member))

    @property
    def num_classes(self) -> int:
        return int(self.member.shape[1]) - 1

    def within(self, chosen: np.ndarray) -> _Tokens:
        return _Tokens(self.rows[chosen], self.member[chosen], None)

    def weights(self) -> np.ndarray:
        """`[num_tokens, num_classes + 1]`: a token's weight as one of each class. Classes weigh the same."""
        import numpy as np

        weights: np.ndarray = self.member / np.maximum(self.member.sum(axis=0), 1) / self.num_classes
        return weights


def _folds(of_token: np.ndarray, member: np.ndarray) -> np.ndarray | None:
    """The fold of each token, `of_token` being its prompt: whole prompts, so many tokens of each class in either.

    The only prompt of a class is cut in half. None where a class has too few tokens for that.
    """
    import numpy as np

    folds = np.full(len(of_token), -1)
    tokens_of = {prompt: np.flatnonzero(of_token == prompt) for prompt in dict.fromkeys(of_token.tolist())}
    classes = [np.flatnonzero(member[of_token, number]) for number in range(member.shape[1])]
    for own in classes:
        for prompt in dict.fromkeys(of_token[own].tolist()):
            if folds[tokens_of[prompt][0]] < 0:
                folds[tokens_of[prompt]] = (folds[own] == 0).sum() > (folds[own] == 1).sum()
    for own in classes[:-1]:
        if len(set(folds[own].tolist())) == 1:
            last = tokens_of[of_token[own[-1]]]
            folds[last[len(last) // 2 :]] = 1 - folds[own[0]]
    return folds if all(len(set(folds[own].tolist())) == 2 for own in classes[:-1]) else None


def _router(seen: torch.Tensor, tokens: _Tokens, ridge: float, threads: int) -> torch.Tensor:
    """W, `[num_classes, hidden_size]`, in float64."""
    form = _Form(ridge, len(tokens.rows) < seen.shape[1], threads)
    return scale(seen, tokens, form) * fit(seen, tokens, form)


@dataclass(frozen=True)
class _Form:
    """How to fit: λ, whether by the dual form, and in how many threads.

    Of a half of the tokens, too, the form is that of all: so the memory for one is enough for the other.
    """

    ridge: float
    is_dual: bool
    threads: int


def scale(seen: torch.Tensor, tokens: _Tokens, form: _Form) -> float:
    """s, by tokens that are held out."""
    import numpy as np
    import torch

    if tokens.folds is None:
        return USUAL_SCALE
    scores, weights = [], []
    for fold in (0, 1):
        held_out = tokens.within(tokens.folds == fold)
        router = fit(seen, tokens.within(tokens.folds != fold), form)
        scores.append(_scores(seen, torch.from_numpy(held_out.rows), router))
        weights.append(held_out.weights()[:, :-1])
    return best_scale(np.concatenate(scores), np.concatenate(weights))


def best_scale(scores: np.ndarray, weights: np.ndarray) -> float:
    """The s at which the cross-entropy of softmax(s · `scores`) is least, both `[num_tokens, num_classes]`.

    It is a convex function of s: where its slope turns is found by halving an interval.
    """
    import numpy as np

    own = (weights * scores).sum()

    def rises(s: float) -> bool:
        exponents = s * (scores - scores.max(axis=1, keepdims=True))
        chances = np.exp(exponents)
        chances /= chances.sum(axis=1, keepdims=True)
        return bool((weights.sum(axis=1) * (chances * scores).sum(axis=1)).sum() > own)

    low, high = LEAST_SCALE, MOST_SCALE
    if rises(low) or not rises(high):
        return low if rises(low) else high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    return (low + high) / 2


def _scores(seen: torch.Tensor, rows: torch.Tensor, router: torch.Tensor) -> np.ndarray:
    import torch

    scores = [seen[rows[part]].double() @ router.T for part in _parts(len(rows), PANEL_ROWS)]
    return torch.cat(scores).numpy()


def fit(seen: torch.Tensor, tokens: _Tokens, form: _Form) -> torch.Tensor:
    """C (S + λ (tr S / d) I)⁻¹, `[num_classes, hidden_size]`, in float64."""
    import torch

    weights = tokens.weights()
    of_token = weights.sum(axis=1, keepdims=True)
    roots = torch.from_numpy(of_token**0.5)
    targets = torch.from_numpy((weights[:, :-1] - of_token / tokens.num_classes) / of_token**0.5)
    rows = torch.from_numpy(tokens.rows)

    def panel(part: slice, tile: slice) -> torch.Tensor:
        return seen[rows[part], tile].double().mul_(roots[part])

    if form.is_dual:
        scaled = seen[rows].double().mul_(roots)
        products = _products(lambda part, tile: scaled[tile, part].T, len(rows), seen.shape[1], form.threads)
    else:
        products = _products(panel, seen.shape[1], len(rows), form.threads)
    trace = products.trace()
    if not 0 < trace < math.inf:  # of a layer that sees nothing, or no numbers
        return (0 * trace).expand(tokens.num_classes, seen.shape[1])
    products.diagonal().add_(form.ridge * trace / seen.shape[1])
    factor = torch.linalg.cholesky(products)
    del products  # before the factor is copied, as torch does to solve
    if form.is_dual:
        return torch.cholesky_solve(targets, factor).T @ scaled
    right = torch.zeros(seen.shape[1], tokens.num_classes, dtype=torch.float64)
    for part in _parts(len(rows), PANEL_ROWS):
        right.addmm_(panel(part, slice(None)).T, targets[part])
    return torch.cholesky_solve(right, factor).T


def _products(panel: Callable[[slice, slice], torch.Tensor], size: int, length: int, threads: int) -> torch.Tensor:
    """PᵀP, `[size, size]`, of which the part on and below the diagonal, `panel(rows, columns)` being a part of P
    `[length, size]`."""
    import torch

    products = torch.zeros(size, size, dtype=torch.float64)
    tiles = list(_parts(size, TILE))

    def multiply(tile: tuple[slice, slice]) -> None:
        to = products[tile]
        for part in _parts(length, PANEL_ROWS):
            to.addmm_(panel(part, tile[0]).T, panel(part, tile[1]))

    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        wanted = [(left, right) for number, left in enumerate(tiles) for right in tiles[: number + 1]]
        for _ in workers.map(multiply, wanted):
            pass
    return products


def _parts(size: int, step: int) -> Iterator[slice]:
    return (slice(begin, min(begin + step, size)) for begin in range(0, size, step))


MODE = GateMode(routers, {"ridge": ridge}, evaluates=True)
