"""Passages that are drawn from an expert's own model: what it would write shows what it is for.

Each begins with BOS and is drawn a token at a time at temperature 1, all passages of a model in one batch; EOS is never
drawn, so that they are all of one length. Every token takes the whole model: where it does not fit the memory budget,
it is read again for each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from moeplan.architectures.dense import DenseModel
from moeplan.gates import GateRequest
from moeplan.gates.layers import layer_weights, matrix_block_nbytes, model_params, skeleton_of, token_nbytes
from moeplan.gates.prompts import PromptError, PromptPlace, Prompts
from moeplan.places import CheckpointError
from moeplan.tensor_names import EMBEDDING, NORM, OUTPUT_MATRIX
from moeplan.untrusted_json import show
from planner.expr import DType, Expr, Opaque

if TYPE_CHECKING:
    import numpy as np
    import torch

    from executor.weights import Weights

TOKENS = 128
"""Of a passage, beside BOS."""

RUNS_NO_CODE = "--trust-remote-code is for the base's alone"


def samples(request: GateRequest) -> tuple[Opaque | None, ...]:
    """For each of the request's rows its passages, `[number, TOKENS]`, token ids as float32; None where there are none.

    Raises PromptError for a model that cannot be drawn from.
    """
    return tuple(
        _passages(number, expert.positive_samples, request) if expert.positive_samples else None
        for number, expert in enumerate(request.rows)
    )


def _passages(number: int, count: int, request: GateRequest) -> Opaque:
    model = request.models[number]
    place = (number, "positive_samples")
    if model.adapter is not None:
        raise PromptError(place, f"{model.label} has an adapter on it, and passages are drawn from whole models alone")
    if model.sizes["vocab_size"] > request.base.model.sizes["vocab_size"]:
        raise PromptError(place, f"{model.label} has a larger vocabulary than the base, which must read its passages")
    if model.settings["max_position_embeddings"] <= TOKENS:
        raise PromptError(place, f"{model.label} has a context of no more than {TOKENS} tokens, which passages have")
    try:
        model.check_tensors()
        model.check_windows()
    except CheckpointError as error:
        raise PromptError(place, f"{error}; passages are drawn from the whole model") from error
    if unknown := model.unknown_tensors():
        raise PromptError(
            place,
            f"{model.label}: transformers' {model.model_type} has no {show(unknown[0])}, so passages drawn from it "
            "would be another model's",
        )
    matrices, tensors = _weights(model)
    sizes = model.sizes
    kv_cache_nbytes = 4 * 2 * (model.num_layers + 2) * count * (TOKENS + 1) * sizes["kv_size"]
    params = {
        **model_params(model, trust_remote_code=False, otherwise=RUNS_NO_CODE),
        "seed": [request.seed, number],
        "start": _start(model, request.prompts, place),
        "never": _token_ids(model, "eos_token_id"),
        "num_layers": model.num_layers,
        "matrices": list(matrices),
        "tensors": list(tensors),
    }
    return Opaque(
        "sample",
        json.dumps(params),
        tuple(tensors.values()),
        DType.F32,
        (count, TOKENS),
        kv_cache_nbytes + count * (2 * token_nbytes(model) + 6 * 8 * sizes["vocab_size"]),
        weights=tuple(matrices.values()),
        block_nbytes=max(matrix_block_nbytes(matrix, count) for matrix in matrices.values()),
        passes=TOKENS,
    )


def _weights(model: DenseModel) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """All matrices of a model, and its other tensors: those of layers under `LAYER NAME`."""
    stored = model.checkpoint.tensors
    matrices: dict[str, Expr] = {EMBEDDING: stored[EMBEDDING]}
    if model.output_matrix is not stored[EMBEDDING]:
        matrices[OUTPUT_MATRIX] = model.output_matrix
    tensors: dict[str, Expr] = {NORM: stored[NORM]}
    for layer in range(model.num_layers):
        of_layer = layer_weights(model, layer, stored.__getitem__)
        for all_named, named in zip((matrices, tensors), of_layer, strict=True):
            all_named |= {f"{layer} {name}": read for name, read in named.items()}
    return matrices, tensors


def _start(model: DenseModel, prompts: Prompts, place: PromptPlace) -> int:
    """What a text begins with: the base's BOS, or what the model has for it where there is none, or none of its own."""
    of_base = [token for token in prompts.start if token < model.sizes["vocab_size"]]
    found = [*of_base, *_token_ids(model, "bos_token_id"), *_token_ids(model, "eos_token_id")]
    if not found:
        raise PromptError(place, f"{model.label} has neither a BOS nor an EOS token for a text to begin with")
    return found[0]


def _token_ids(model: DenseModel, key: str) -> list[int]:
    """What config.json says of a special token: one, several or none."""
    given = model.settings.get(key)
    listed = given if isinstance(given, list) else [given]
    return [token for token in listed if type(token) is int and 0 <= token < model.sizes["vocab_size"]]


def sample(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
    """Draw `output`, `[number, TOKENS]`, from a model's matrices and other tensors.

    Raises CheckpointError where these give no numbers.
    """
    import numpy as np
    import torch

    tensors = dict(zip(params["tensors"], inputs, strict=True))
    matrices = dict(zip(params["matrices"], weights.matrices, strict=True))
    head = matrices[OUTPUT_MATRIX if OUTPUT_MATRIX in matrices else EMBEDDING]
    skeleton = skeleton_of(params)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(params["seed"])))
    cache = skeleton.cache()
    with torch.inference_mode(), ExitStack() as served:
        layers = [
            served.enter_context(skeleton.layer(layer, _of(layer, tensors), _of(layer, matrices), weights))
            for layer in range(params["num_layers"])
        ]
        tokens = [params["start"]] * len(output)
        for step in range(output.shape[1]):
            states, calls = skeleton.going_on(weights.gather(matrices[EMBEDDING], tokens)[:, None], cache)
            for layer, call in zip(layers, calls, strict=True):
                states = layer(states, call)
            logits = skeleton.logits(states[:, -1], tensors[NORM], head, weights)
            logits[:, params["never"]] = -torch.inf
            if not logits.amax(dim=1).isfinite().all():
                raise CheckpointError(
                    f"{params['model']['path']}: no passages can be drawn from it: what it expects next is NaN or "
                    "infinite; do its weights hold such numbers? Download it again"
                )
            tokens = _draw(logits.double().numpy(), random.random(len(output)))
            output[:, step] = torch.tensor(tokens)


def _of(layer: int, named: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{layer} "
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _draw(logits: np.ndarray, chances: np.ndarray) -> list[int]:
    """A token for each row of `logits`, by a number from 0 to 1 each: where that falls in the distribution function."""
    import numpy as np

    density = np.exp(logits - logits.max(axis=1, keepdims=True))
    reached = density.cumsum(axis=1)
    return [
        int(np.searchsorted(row, chance * row[-1], side="right")) for row, chance in zip(reached, chances, strict=True)
    ]
