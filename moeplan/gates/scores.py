"""What routers say of the tokens that they could be given, for `moeplan routes`: as far as can be, each token is scored
by a router that was made without its prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moeplan.errors import UserError
from moeplan.gate_modes import MODES
from moeplan.gates import GateMode, GateRequest
from moeplan.gates.evaluation import KERNELS, Evaluation
from moeplan.gates.folds import folds
from planner.expr import DType, Opaque

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text: the rows where they are among all, and whether their scores are by routers made without."""

    rows: tuple[range, ...]
    held_out: bool


@dataclass(frozen=True)
class Scored:
    """The routers of a request, `[num_rows, hidden_size]`, and their scores of all tokens, `[num_tokens, num_experts]`,
    both layer by layer; where the tokens of each expert's prompts are, and those of each of `texts`.

    BOS is no token of a text. Scores leave out a shared expert's gate, which is the last of a router's rows.
    """

    routers: tuple[Opaque, ...]
    scores: tuple[Opaque, ...]
    experts: tuple[Tokens, ...]
    texts: tuple[Tokens, ...]


def scored(request: GateRequest, mode: GateMode, subject: str) -> Scored:
    """Have `mode` make the routers of `request`, and score all of its text. Raises what both do, and UserError, which
    names the `subject`, where there is no text."""
    evaluation = Evaluation.of(request)
    if not evaluation.lengths:
        raise UserError(f"{subject}: there is no text to route; give the experts prompts, or a text file with --text")
    lengths, positive = evaluation.lengths, evaluation.positive
    fold = folds(positive, lengths, len(evaluation.prompts.start))
    reads_text = MODES[request.mode].reads_text
    read = {prompt for prompts in (*positive, *evaluation.prompts.negative) for prompt in prompts if reads_text}
    params = json.dumps({"lengths": lengths, "folds": [fold.get(prompt, 2) for prompt in range(len(lengths))]})
    routers = mode.routers(request)
    by_fold = [mode.routers(replace(request, without=number)) for number in (0, 1)]
    shape = (sum(lengths), len(request.experts))
    begins = [sum(lengths[:prompt]) for prompt in range(len(lengths))]

    def tokens(prompts: Sequence[int]) -> Tokens:
        first = len(evaluation.prompts.start)
        rows = (range(begins[prompt] + first, begins[prompt] + lengths[prompt]) for prompt in prompts)
        return Tokens(tuple(rows), all(prompt in fold or prompt not in read for prompt in prompts))

    return Scored(
        routers=tuple(routers),
        scores=tuple(
            Opaque("scores", params, (seen, *of_layer), DType.F32, shape, 4 * 2 * shape[0] * len(request.rows))
            for seen, *of_layer in zip(evaluation.mlp_inputs(), *by_fold, routers, strict=True)
        ),
        experts=tuple(map(tokens, positive[: len(request.experts)])),
        texts=tuple(map(tokens, evaluation.prompts.texts)),
    )


def scores(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """From what an MLP is given, `[num_tokens, hidden_size]`, and three routers, `[num_rows, hidden_size]`: made
    without the prompts of fold 0, without those of fold 1, and of all."""
    import torch

    seen, *routers = inputs
    begin = 0
    for prompt, fold in zip(torch.split(seen, params["lengths"]), params["folds"], strict=True):
        output[begin : begin + len(prompt)] = prompt @ routers[fold][: output.shape[1]].T
        begin += len(prompt)


def kernels(mode: GateMode) -> dict[str, Any]:
    """What computes what `scored` gives for that mode."""
    return {**KERNELS, **mode.kernels, "scores": scores}
