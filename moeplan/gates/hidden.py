"""`hidden`, `hidden_last`, `hidden_avg`: routers from the base model's own view of the prompts.

An expert's row in layer l is the residual stream that enters layer l, at the last token of a prompt (`hidden_avg`: the
mean over its tokens), averaged over the positive prompts; minus the same of the negative prompts; L2-normalised
(mergekit, mergekit/moe/router.py, `get_hidden_states`). What enters layer l needs the layers below it alone, so neither
the last layer nor the output head is ever evaluated::

    embedding rows ─▶ hidden states 0 ─▶ layer 0 ─▶ hidden states 1 ─▶ layer 1 ─▶ …
                            ▼                             ▼
                         router 0                      router 1

A layer's matrices are used a block of rows at a time, so the planner has a choice: to hold them whole in memory while
the layer is evaluated, and read them once for this and for the copy into the output; or to read each block when it is
multiplied.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.architectures.attention import rope_switch
from moeplan.architectures.dense import LAYER, DenseModel
from moeplan.checkpoint import CONFIG
from moeplan.errors import MoeplanWarning
from moeplan.gates import GateMode, GateRequest
from moeplan.gates.cheap_embed import normalized
from moeplan.gates.prompts import embedding_rows, tokenize
from moeplan.options import OptionError
from planner.expr import DType, Expr, Opaque, reads_of
from planner.schedule import block_nbytes

if TYPE_CHECKING:
    import torch

    from executor.weights import Weights
    from moeplan.gates.skeleton import Skeleton

GROUP_NBYTES = 256 << 20
"""Prompts are evaluated in groups whose activations take no more than this, padding counted (one prompt at the least).
It does not depend on the memory cap, since results depend, in their last bits, on which prompts are in a group."""

BLOCK_NBYTES = 2 << 20
"""Linear layers multiply by about so many bytes of their weight at a time, in float32: what a core's cache holds."""


QUANTISING_NBYTES = 1 << 20
"""What it takes to quantise a piece of a block, for each bit."""


def block_rows(num_columns: int) -> int:
    """How many rows of a matrix are multiplied at a time. Fewer than 64 would waste the arithmetic units."""
    return max(1, BLOCK_NBYTES // (64 * 4 * num_columns)) * 64


def routers(request: GateRequest) -> list[Opaque]:
    """A router for each layer, each from the hidden states that enter it."""
    base = request.base
    if request.bits:
        _check_bitsandbytes(request.bits)
    prompts = tokenize(request.experts, base, request.trust_remote_code)
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
    groups = _groups(prompts.lengths, GROUP_NBYTES // _token_nbytes(base), rope_switch(base))
    workspace = _workspace_nbytes(base, groups)

    model = _model(request)
    embed_params = {
        **model,
        "groups": groups,
        "rows": [row[token] for ids in prompts.tokens for token in ids],
    }
    rows = embedding_rows(request, vocabulary)
    stream = Opaque("embed", json.dumps(embed_params), (rows,), DType.F32, stream_shape, 4 * rows.numel + workspace)
    result: list[Opaque] = []
    for layer in range(base.num_layers):
        if layer > 0:
            stream = _decoder_layer(request, model, layer - 1, stream, groups, workspace)
        result.append(Opaque("hidden", router_params, (stream,), DType.F32, router_shape, 2 * stream.nbytes))
    return result


def _model(request: GateRequest) -> dict[str, Any]:
    """What the kernels know the base by. Code that it brings with it is run where the request says so, and warned
    about where it does not: transformers has a model of the same type, which need not be the same model."""
    checkpoint = request.base.checkpoint
    own = own_model_class(checkpoint.config) is not None
    if own and not request.trust_remote_code:
        warnings.warn(
            f"{checkpoint.label}/{CONFIG}: auto_map names code of the model's own, which is not run: prompts are "
            f"evaluated with transformers' {checkpoint.model_type}; --trust-remote-code runs it",
            MoeplanWarning,
            stacklevel=2,
        )
    own_code = {"own_code": True} if own and request.trust_remote_code else {}
    return {"model": str(checkpoint.path.resolve()), "config": checkpoint.config_sha256, **own_code}


def own_model_class(config: Mapping[str, Any]) -> str | None:
    """The key of `auto_map` under which a config.json names modelling code of the model's own."""
    named = config.get("auto_map")
    keys = ("AutoModel", "AutoModelForCausalLM")
    return next((key for key in keys if key in named), None) if isinstance(named, dict) else None


def _check_bitsandbytes(bits: int) -> None:
    """Raises OptionError where it cannot quantise here. It is not imported: that would import torch."""
    option = f"--load-in-{bits}bit"
    package = find_spec("bitsandbytes")
    if package is None or package.origin is None:
        raise OptionError(f"{option}: bitsandbytes is not installed; pip install bitsandbytes, or leave the option out")
    if not any(Path(package.origin).parent.glob("libbitsandbytes_cpu.*")):
        raise OptionError(
            f"{option}: the installed bitsandbytes {version('bitsandbytes')} has no library for this machine's "
            "processor; install another build, or leave the option out"
        )


def _decoder_layer(
    request: GateRequest,
    model: Mapping[str, Any],
    layer: int,
    stream: Opaque,
    groups: Sequence[Sequence[int]],
    workspace_nbytes: int,
) -> Opaque:
    """The residual stream after layer `layer`, from that before it."""
    base, bits = request.base, request.bits
    prefix = LAYER.format(layer=layer)
    weights = {
        name.removeprefix(prefix): request.weight(name)
        for name in base.checkpoint.tensors
        if name.startswith(prefix) and "rotary_emb" not in name
    }
    matrices = {name: tensor for name, tensor in weights.items() if len(tensor.shape) == 2}
    tensors = {name: tensor for name, tensor in weights.items() if name not in matrices}
    params = {
        **model,
        "layer": layer,
        "groups": groups,
        "tensors": list(tensors),
        "matrices": list(matrices),
        **({"bits": bits} if bits else {}),
    }
    most_tokens = max(len(group) * max(group) for group in groups)
    return Opaque(
        "decoder_layer",
        json.dumps(params),
        (stream, *tensors.values()),
        DType.F32,
        stream.shape,
        workspace_nbytes + sum(_quantised_nbytes(matrix, bits) for matrix in matrices.values()),
        weights=tuple(matrices.values()),
        block_nbytes=max(_block_nbytes(matrix, most_tokens) for matrix in matrices.values()) + QUANTISING_NBYTES * bits,
        passes=1 if bits else len(groups),
    )


def _quantised_nbytes(matrix: Expr, bits: int) -> int:
    """What `matrix` takes in so many bits, its scales included: see `moeplan.gates.quantised`."""
    return {0: 0, 8: matrix.numel + 4 * matrix.shape[0], 4: matrix.numel // 2 + matrix.numel // 16 + 8}[bits]


def _block_nbytes(matrix: Expr, num_tokens: int) -> int:
    """What it takes to multiply so many tokens by a block of `matrix`: the block and the product."""
    rows = min(block_rows(matrix.shape[1]), matrix.shape[0])
    widest = max((read.dtype for read in reads_of(matrix)), key=lambda dtype: dtype.itemsize)
    return block_nbytes(rows, matrix.shape[1], widest) + 4 * rows * num_tokens


def embed(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """The residual stream that enters the first layer, `[num_tokens, hidden_size]`: prompt after prompt."""
    import torch

    torch.index_select(inputs[0].float(), 0, torch.tensor(params["rows"]), out=output)
    _evaluate(_skeleton(params).entering, params["groups"], output, output)


def _skeleton(params: Any) -> Skeleton:
    from moeplan.gates.skeleton import skeleton

    return skeleton(params["model"], params["config"], params.get("own_code", False))


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


def decoder_layer(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
    """The residual stream after one decoder layer, from that before it, the layer's vectors and its matrices."""
    stream, tensors = inputs[0], dict(zip(params["tensors"], inputs[1:], strict=True))
    matrices = dict(zip(params["matrices"], weights.matrices, strict=True))
    if bits := params.get("bits"):
        from moeplan.gates.quantised import quantise

        matrices = {name: quantise(matrix, weights, bits) for name, matrix in matrices.items()}
    with _skeleton(params).layer(params["layer"], tensors, matrices, weights) as layer:
        _evaluate(layer, params["groups"], stream, output)


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


def _groups(lengths: Sequence[int], most_tokens: int, switch: int | None) -> list[list[int]]:
    """Consecutive prompts, shortest first, that are evaluated together; none across `rope_switch`."""
    groups: list[list[int]] = [[]]
    for length in lengths:
        is_full = (len(groups[-1]) + 1) * length > most_tokens
        is_across = switch is not None and groups[-1] and groups[-1][-1] <= switch < length
        if groups[-1] and (is_full or is_across):
            groups.append([])
        groups[-1].append(length)
    return groups


def _token_nbytes(base: DenseModel) -> int:
    """The most memory that a token's activations take in a layer, in float32: in its attention or in its MLP."""
    sizes = base.sizes
    attention = 4 * sizes["q_size"] + 4 * sizes["kv_size"]
    return 4 * (6 * sizes["hidden_size"] + max(attention, 4 * sizes["intermediate_size"]))


def _workspace_nbytes(base: DenseModel, groups: Sequence[Sequence[int]]) -> int:
    """The most memory that a layer's evaluation takes beside its weights and the residual stream."""
    windows = [window for window in base.windows() if window is not None]
    return max(len(group) * (max(group) * _token_nbytes(base) + _mask_nbytes(max(group), windows)) for group in groups)


def _mask_nbytes(length: int, windows: Sequence[int]) -> int:
    """A prompt's mask, as booleans and as float32. There is one where attention sees less than all tokens before."""
    return 5 * length * length if any(window <= length for window in windows) else 0


MODE = GateMode(
    routers,
    {"embed": embed, "decoder_layer": decoder_layer, "hidden": hidden},
    imports=("torch", "moeplan.gates.skeleton"),
    evaluates=True,
)
