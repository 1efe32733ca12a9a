"""`hidden`, `hidden_last`, `hidden_avg`: routers from the base model's own view of the prompts.

An expert's row in layer l is the residual stream that enters layer l, at the last token of a prompt (`hidden_avg`: the
mean over its tokens), averaged over the positive prompts; minus the same of the negative prompts; L2-normalised
(mergekit, mergekit/moe/router.py, `get_hidden_states`). What enters layer l needs the layers below it alone, so neither
the last layer nor the output head is ever evaluated::

    embedding rows ─▶ hidden states 0 ─▶ layer 0 ─▶ hidden states 1 ─▶ layer 1 ─▶ …
                            ▼                             ▼
                         router 0                      router 1

Each layer's weights are whole in memory while it is evaluated, as they lie in the file; the planner reads them once for
this and for the copy into the output.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moeplan.architectures.attention import rope_switch
from moeplan.architectures.dense import LAYER, DenseModel
from moeplan.gates import GateMode, GateRequest
from moeplan.gates.cheap_embed import normalized
from moeplan.gates.prompts import embedding_rows, tokenize
from planner.expr import DType, Opaque

if TYPE_CHECKING:
    import torch

GROUP_TOKENS = 1024
"""Prompts are evaluated in groups of at most so many tokens, padding counted (one prompt at the least)."""

BLOCK_NBYTES = 8 << 20
"""Linear layers turn so many bytes of their weight into float32 at a time."""


def routers(request: GateRequest) -> list[Opaque]:
    """A router for each layer, each from the hidden states that enter it."""
    base = request.base
    prompts = tokenize(request.experts, base)
    vocabulary = prompts.vocabulary()
    row = {token: index for index, token in enumerate(vocabulary)}
    stream_shape = (sum(prompts.lengths), base.hidden_size)
    router_params = json.dumps(
        {
            "lengths": prompts.lengths,
            "mean": request.mode == "hidden_avg",
            "positive": prompts.positive,
            "negative": prompts.negative,
        }
    )
    router_shape = (len(request.experts), base.hidden_size)
    groups = _groups(prompts.lengths, rope_switch(base))
    workspace = _workspace_nbytes(base, groups)

    embed_params = {
        "model": str(base.checkpoint.path.resolve()),
        "groups": groups,
        "rows": [row[token] for ids in prompts.tokens for token in ids],
    }
    rows = embedding_rows(base, vocabulary)
    stream = Opaque("embed", json.dumps(embed_params), (rows,), DType.F32, stream_shape, 4 * rows.numel + workspace)
    result: list[Opaque] = []
    for layer in range(base.num_layers):
        if layer > 0:
            prefix = LAYER.format(layer=layer - 1)
            weights = {
                n: t for n, t in base.checkpoint.tensors.items() if n.startswith(prefix) and "rotary_emb" not in n
            }
            params = {
                "model": str(base.checkpoint.path.resolve()),
                "layer": layer - 1,
                "groups": groups,
                "weights": [name.removeprefix(prefix) for name in weights],
            }
            stream = Opaque(
                "decoder_layer",
                json.dumps(params),
                (stream, *weights.values()),
                DType.F32,
                stream_shape,
                workspace,
            )
        result.append(Opaque("hidden", router_params, (stream,), DType.F32, router_shape, 2 * stream.nbytes))
    return result


def embed(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """The residual stream that enters the first layer, `[num_tokens, hidden_size]`: prompt after prompt."""
    import torch

    from moeplan.gates.skeleton import skeleton

    torch.index_select(inputs[0].float(), 0, torch.tensor(params["rows"]), out=output)
    _evaluate(skeleton(params["model"]).entering, params["groups"], output, output)


def hidden(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """From the residual stream `[num_tokens, hidden_size]` to a router `[num_experts, hidden_size]`."""
    import torch

    prompts = torch.split(inputs[0], params["lengths"])
    views = torch.stack([prompt.mean(dim=0) if params["mean"] else prompt[-1] for prompt in prompts])
    for expert, (positive, negative) in enumerate(zip(params["positive"], params["negative"], strict=True)):
        direction = views[positive].mean(dim=0)
        if negative:
            direction = direction - views[negative].mean(dim=0)
        output[expert] = normalized(direction)


def decoder_layer(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """The residual stream after one decoder layer, whose weights are `inputs[1:]`, in the order of `weights`."""
    from moeplan.gates.skeleton import skeleton

    stream, weights = inputs[0], dict(zip(params["weights"], inputs[1:], strict=True))
    _evaluate(skeleton(params["model"]).layer(params["layer"], weights), params["groups"], stream, output)


def _evaluate(
    function: Callable[[torch.Tensor], torch.Tensor],
    groups: Sequence[Sequence[int]],
    stream: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Fill `output` with `function`, on `[batch, tokens, hidden_size]`, of the prompts that `stream` holds one by one.

    `groups` has their lengths. Prompts are padded on the right to the longest of their group: under causal attention no
    token sees what follows it, so padding changes nothing and needs no mask, and its own results are dropped. `output`
    may be `stream`.
    """
    import torch

    with torch.inference_mode():
        begin = 0
        for group in groups:
            size = sum(group)
            prompts = torch.split(stream[begin : begin + size], list(group))
            padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
            result = function(padded)
            torch.cat(
                [row[:length] for row, length in zip(result, group, strict=True)], out=output[begin : begin + size]
            )
            begin += size


def _groups(lengths: Sequence[int], switch: int | None) -> list[list[int]]:
    """Consecutive prompts, shortest first, that are evaluated together; none across `rope_switch`."""
    groups: list[list[int]] = [[]]
    for length in lengths:
        is_full = (len(groups[-1]) + 1) * length > GROUP_TOKENS
        is_across = switch is not None and groups[-1] and groups[-1][-1] <= switch < length
        if groups[-1] and (is_full or is_across):
            groups.append([])
        groups[-1].append(length)
    return groups


def _workspace_nbytes(base: DenseModel, groups: Sequence[Sequence[int]]) -> int:
    """The most memory that a layer's evaluation takes beside its weights and the residual stream, in float32."""
    tokens = max(len(group) * max(group) for group in groups)
    longest = max(max(group) for group in groups)
    sizes = base.sizes
    wide = 6 * sizes["hidden_size"] + 4 * sizes["intermediate_size"] + 4 * sizes["q_size"] + 4 * sizes["kv_size"]
    mask = longest * longest * math.ceil(tokens / longest)
    return 4 * (tokens * wide + mask) + 2 * BLOCK_NBYTES


MODE = GateMode(
    routers,
    {"embed": embed, "decoder_layer": decoder_layer, "hidden": hidden},
    imports=("torch", "moeplan.gates.skeleton"),
)
