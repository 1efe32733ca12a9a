"""The base model's view of the prompts, layer by layer, as expressions: the residual stream, and what MLPs are given.

What enters layer l needs the layers below it alone, so the output head is never evaluated; nor is the last layer where
only what enters the layers is asked for::

    embedding rows ─▶ hidden states 0 ─▶ layer 0 ─▶ hidden states 1 ─▶ layer 1 ─▶ …
                            │    attention 0             │    attention 1
                            ▼         ▼                  ▼         ▼
                         (gates)  MLP input 0         (gates)  MLP input 1

A layer's matrices are used a block of rows at a time, so the planner has a choice: to hold them whole in memory while
the layer is evaluated, and read them once for this and for the copy into the output; or to read each block when it is
multiplied. What an MLP is given takes the layer's attention only, which is computed again for the layer as a whole: so
it does not matter how a layer puts the two together, and nothing has to be held for long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.errors import RunError
from moeplan.architectures.attention import rope_switch
from moeplan.architectures.dense import DenseModel
from moeplan.gates import GateRequest
from moeplan.gates.device import BLOCKS, LIBRARIES_NBYTES
from moeplan.gates.folds import kept
from moeplan.gates.layers import (
    layer_weights,
    matrix_block_nbytes,
    model_params,
    rows_nbytes,
    skeleton_of,
    token_nbytes,
)
from moeplan.gates.prompts import Prompts, embedding_rows
from moeplan.gates.samples import sample, samples
from moeplan.options import OptionError
from moeplan.tensor_names import EMBEDDING, is_mlp
from planner.expr import DType, Expr, Opaque

if TYPE_CHECKING:
    import torch

    from executor.weights import Weights
    from moeplan.gates.skeleton import ServedLayer, Skeleton

GROUP_NBYTES = 256 << 20
"""Prompts are evaluated in groups whose activations take no more than this, padding counted (one prompt at the least).
It does not depend on the memory cap, since results depend, in their last bits, on which prompts are in a group."""

QUANTISING_NBYTES = 1 << 20
"""What it takes to quantise a piece of a block, for each bit."""


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a request's prompts by its base. Tensors are `[num_tokens, hidden_size]`, prompt by prompt.

    Raises OptionError where the base cannot be quantised as asked, PromptError where no passages can be drawn.
    """

    request: GateRequest
    samples: tuple[Opaque | None, ...] = ()
    """For each of the request's rows passages that are drawn from its model, `[number, tokens]`, or None. They stand
    behind the prompts."""

    @staticmethod
    def of(request: GateRequest) -> Evaluation:
        if request.base.bits:
            _check_bitsandbytes(request.base.bits)
        return Evaluation(request, samples(request))

    @property
    def prompts(self) -> Prompts:
        return self.request.prompts

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt and passage."""
        return [length for part in self._parts for length in part]

    @property
    def positive(self) -> list[list[int]]:
        """For each of the request's rows its prompts and passages, by their numbers."""
        positive = [list(prompts) for prompts in self.prompts.positive]
        number = len(self.prompts.tokens)
        for of_row, drawn in zip(positive, self.samples, strict=True):
            if drawn is not None:
                of_row += range(number, number + drawn.shape[0])
                number += drawn.shape[0]
        return positive

    def used(self, of_rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The prompts and passages of each row that routers are to be made of."""
        return kept(of_rows, self.positive, self.lengths, len(self.prompts.start), self.request.without)

    @cached_property
    def _parts(self) -> list[list[int]]:
        drawn = [passages for passages in self.samples if passages is not None]
        passages = [len(self.prompts.start) + tokens.shape[1] for tokens in drawn for _ in range(tokens.shape[0])]
        return [part for part in (self.prompts.lengths, passages) if part]

    def entering(self) -> Iterator[Opaque]:
        """The residual stream that enters each layer."""
        base, prompts = self.request.base, self.prompts
        drawn = tuple(passages for passages in self.samples if passages is not None)
        vocabulary = prompts.vocabulary()
        row = {token: index for index, token in enumerate(vocabulary)}
        params = {
            **self._model,
            "groups": self._groups,
            "rows": [row[token] for ids in prompts.tokens for token in ids],
            "start": prompts.start,
        }
        table = base.weight(EMBEDDING)
        rows = embedding_rows(table, vocabulary) if vocabulary else None
        shape = (sum(self.lengths), base.model.hidden_size)
        stream = Opaque(
            "embed",
            json.dumps(params),
            (*([] if rows is None else [rows]), *drawn),
            DType.F32,
            shape,
            4 * len(vocabulary) * base.model.hidden_size + self._workspace_nbytes,
            weights=(table,) if drawn else (),
            block_nbytes=rows_nbytes(1, table) if drawn else 0,
        )
        yield stream
        for layer in range(base.model.num_layers - 1):
            stream = self._layer("decoder_layer", layer, stream)
            yield stream

    def mlp_inputs(self) -> Iterator[Opaque]:
        """What the MLP of each layer is given, and so what the router in its place will see."""
        for layer, stream in enumerate(self.entering()):
            yield self._layer("mlp_input", layer, stream, with_mlp=False)

    def _layer(self, kernel: str, layer: int, stream: Opaque, with_mlp: bool = True) -> Opaque:
        """What `kernel` makes of the stream that enters `layer`, and of that layer's weights, or all but its MLP's
        matrices."""
        base, bits = self.request.base, self.request.base.bits
        matrices, tensors = layer_weights(base.model, layer, base.weight)
        if not with_mlp:
            matrices = {name: tensor for name, tensor in matrices.items() if not is_mlp(name)}
        params = {
            **self._model,
            "layer": layer,
            "groups": self._groups,
            "tensors": list(tensors),
            "matrices": list(matrices),
            **({"bits": bits} if bits else {}),
        }
        most_tokens = max(len(group) * max(group) for group in self._groups)
        block = max(matrix_block_nbytes(matrix, most_tokens) for matrix in matrices.values())
        vectors = sum(4 * tensor.numel for tensor in tensors.values())
        scores = _gpu_scores_nbytes(base.model, self._groups)
        base.device.check(self._workspace_nbytes + scores + BLOCKS * block + vectors + LIBRARIES_NBYTES)
        return Opaque(
            kernel,
            json.dumps(params),
            (stream, *tensors.values()),
            DType.F32,
            stream.shape,
            self._workspace_nbytes + sum(_quantised_nbytes(matrix, bits) for matrix in matrices.values()),
            weights=tuple(matrices.values()),
            block_nbytes=block + QUANTISING_NBYTES * bits,
            passes=1 if bits else len(self._groups),
        )

    @cached_property
    def _model(self) -> dict[str, Any]:
        base = self.request.base
        device = {"device": base.device.name} if base.device.is_gpu else {}
        return model_params(base.model, base.trust_remote_code) | device

    @cached_property
    def _groups(self) -> list[list[int]]:
        base = self.request.base.model
        most_tokens, switch = GROUP_NBYTES // token_nbytes(base), rope_switch(base)
        return [group for part in self._parts for group in _grouped(part, most_tokens, switch)]

    @cached_property
    def _workspace_nbytes(self) -> int:
        return _activations_nbytes(self.request.base.model, self._groups)


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


def _quantised_nbytes(matrix: Expr, bits: int) -> int:
    """What `matrix` takes in so many bits, its scales included: see `moeplan.gates.quantised`."""
    return {0: 0, 8: matrix.numel + 4 * matrix.shape[0], 4: matrix.numel // 2 + matrix.numel // 16 + 8}[bits]


def embed(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights | None = None) -> None:
    """The residual stream that enters the first layer, `[num_tokens, hidden_size]`: of the prompts, whose embedding
    rows are the first of `inputs`, and of passages, whose tokens are the others, by the embedding matrix."""
    import torch

    drawn = list(inputs)
    begin = len(params["rows"])
    if begin:
        torch.index_select(drawn.pop(0).float(), 0, torch.tensor(params["rows"]), out=output[:begin])
    for passage in (passage for passages in drawn for passage in passages):
        assert weights is not None  # there are passages
        tokens = [*params["start"], *map(int, passage)]
        output[begin : begin + len(tokens)] = weights.gather(weights.matrices[0], tokens)
        begin += len(tokens)
    skeleton = skeleton_of(params)
    with _within_memory_of(skeleton.device):
        _evaluate(skeleton, skeleton.entering, params["groups"], output, output)


def decoder_layer(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
    """The residual stream after one decoder layer, from that before it, the layer's vectors and its matrices."""
    _evaluate_layer(params, inputs, output, weights, lambda layer: layer)


def mlp_input(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor, weights: Weights) -> None:
    """What a decoder layer's MLP is given, from the same as for `decoder_layer`, less the MLP's matrices."""
    _evaluate_layer(params, inputs, output, weights, lambda layer: layer.mlp_input)


def _evaluate_layer(
    params: Any,
    inputs: Sequence[torch.Tensor],
    output: torch.Tensor,
    weights: Weights,
    function: Callable[[ServedLayer], Callable[[torch.Tensor], torch.Tensor]],
) -> None:
    stream, tensors = inputs[0], dict(zip(params["tensors"], inputs[1:], strict=True))
    matrices = dict(zip(params["matrices"], weights.matrices, strict=True))
    if bits := params.get("bits"):
        from moeplan.gates.quantised import quantise

        matrices = {name: quantise(matrix, weights, bits) for name, matrix in matrices.items()}
    skeleton = skeleton_of(params)
    served = skeleton.layer(params["layer"], tensors, matrices, weights)
    with _within_memory_of(skeleton.device), served as layer:
        _evaluate(skeleton, function(layer), params["groups"], stream, output)


def _evaluate(
    skeleton: Skeleton,
    function: Callable[[torch.Tensor], torch.Tensor],
    groups: Sequence[Sequence[int]],
    stream: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Fill `output` with a `function` of the skeleton's, on `[batch, tokens, hidden_size]`, of the prompts in `stream`.

    `groups` has their lengths. Prompts are padded on the right to the longest of their group: under causal attention no
    token sees what follows it, so padding changes nothing and needs no mask, and its own results are dropped. `output`
    may be `stream`.
    """
    import torch

    with torch.inference_mode():
        begin = 0
        for group in groups:
            size = sum(group)
            prompts = torch.split(stream[begin : begin + size].to(skeleton.device), list(group))
            padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
            with skeleton.padding.of(group):
                result = function(padded)
            rows = [row[:length] for row, length in zip(result.cpu(), group, strict=True)]
            torch.cat(rows, out=output[begin : begin + size])
            begin += size


@contextmanager
def _within_memory_of(device: torch.device) -> Iterator[None]:
    """Raises RunError where what is done within takes more of a GPU's memory than there is, or than may be taken."""
    from torch.cuda import OutOfMemoryError

    try:
        yield
    except OutOfMemoryError as error:
        raise RunError(
            f"{device}: its memory, or what --max-device-memory leaves of it, is used up; give more, or --device cpu"
        ) from error


def _grouped(lengths: Sequence[int], most_tokens: int, switch: int | None) -> list[list[int]]:
    """Consecutive prompts, shortest first, that are evaluated together; none across `rope_switch`."""
    groups: list[list[int]] = [[]]
    for length in lengths:
        is_full = (len(groups[-1]) + 1) * length > most_tokens
        is_across = switch is not None and groups[-1] and groups[-1][-1] <= switch < length
        if groups[-1] and (is_full or is_across):
            groups.append([])
        groups[-1].append(length)
    return groups


def _activations_nbytes(base: DenseModel, groups: Sequence[Sequence[int]]) -> int:
    """The most memory that a layer's evaluation takes beside its weights and the residual stream."""
    windows = [window for window in base.windows() if window is not None]
    return max(len(group) * (max(group) * token_nbytes(base) + _mask_nbytes(max(group), windows)) for group in groups)


def _gpu_scores_nbytes(base: DenseModel, groups: Sequence[Sequence[int]]) -> int:
    """What a GPU takes beside that where heads share keys and values: torch's kernels that hold no scores are not for
    those in float32, so it holds them all, three times over (`sdp_utils.cpp`)."""
    if base.sizes["num_key_value_heads"] == base.sizes["num_attention_heads"]:
        return 0
    return max(3 * 4 * base.sizes["num_attention_heads"] * len(group) * max(group) ** 2 for group in groups)


def _mask_nbytes(length: int, windows: Sequence[int]) -> int:
    """A prompt's mask, as booleans and as float32. There is one where attention sees less than all tokens before."""
    return 5 * length * length if any(window <= length for window in windows) else 0


KERNELS = {"sample": sample, "embed": embed, "decoder_layer": decoder_layer, "mlp_input": mlp_input}


def modules(bits: int) -> tuple[str, ...]:
    """The heavy packages that they use with a base of so many bits."""
    return ("torch", "moeplan.gates.skeleton", *(["moeplan.gates.quantised"] if bits else []))
