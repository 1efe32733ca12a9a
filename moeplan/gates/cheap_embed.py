"""`cheap_embed`: routers from the prompts' token embeddings alone, the same for every layer.

An expert's row is the sum of the embeddings of all tokens of its positive prompts, L2-normalised; minus the same of its
negative prompts, if it has any; L2-normalised (mergekit, mergekit/moe/router.py, `get_cheap_embedding`). Only the
embedding rows of these tokens are read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeplan.gates import GateMode, GateRequest
from moeplan.gates.directions import normalized, without
from moeplan.gates.folds import kept
from moeplan.gates.prompts import embedding_rows
from moeplan.tensor_names import EMBEDDING
from planner.expr import DType, Opaque

if TYPE_CHECKING:
    import torch


def routers(request: GateRequest) -> list[Opaque]:
    """One expression, as many times as there are layers."""
    prompts = request.prompts
    vocabulary = prompts.vocabulary()
    row = {token: index for index, token in enumerate(vocabulary)}

    def counts(indices: Sequence[int]) -> list[list[int]]:
        """[row, times] for each token of the prompts with these indices."""
        tokens = Counter(row[token] for index in indices for token in prompts.tokens[index])
        return [[token, times] for token, times in sorted(tokens.items())]

    positive, negative = (
        kept(of_rows, prompts.positive, prompts.lengths, len(prompts.start), request.without)
        for of_rows in (prompts.positive, prompts.negative)
    )
    params = {
        "positive": [counts(indices) for indices in positive],
        "negative": [counts(indices) for indices in negative],
    }
    rows = embedding_rows(request.base.weight(EMBEDDING), vocabulary)
    workspace = 2 * 4 * rows.numel
    router = Opaque("cheap_embed", json.dumps(params), (rows,), DType.F32, request.router_shape, workspace)
    return [router] * request.base.model.num_layers


def cheap_embed(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """From the embedding rows `[num_tokens, hidden_size]` to a router `[num_rows, hidden_size]`."""
    import torch

    rows = inputs[0].float()

    def direction(counts: list[list[int]]) -> torch.Tensor:
        if not counts:
            return rows.new_zeros(rows.shape[1])
        index, times = torch.tensor(counts).T
        return normalized(times.float() @ rows[index])

    for expert, (positive, negative) in enumerate(zip(params["positive"], params["negative"], strict=True)):
        output[expert] = normalized(without(direction(positive), direction(negative)))


MODE = GateMode(routers, {"cheap_embed": cheap_embed})
