"""`hidden`, `hidden_last`, `hidden_avg`: routers from the base model's own view of the prompts.

An expert's row in layer l is the residual stream that enters layer l, at the last token of a prompt (`hidden_avg`: the
mean over its tokens), averaged over the positive prompts; minus the same of the negative prompts; L2-normalised
(mergekit, mergekit/moe/router.py, `get_hidden_states`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeplan.gates import GateMode, GateRequest
from moeplan.gates.directions import normalized, without
from moeplan.gates.evaluation import Evaluation
from planner.expr import DType, Opaque

if TYPE_CHECKING:
    import torch


def routers(request: GateRequest) -> list[Opaque]:
    """A router for each layer, each from the hidden states that enter it."""
    evaluation = Evaluation.of(request)
    positive, negative = evaluation.used(evaluation.positive), evaluation.used(evaluation.prompts.negative)
    params = json.dumps(
        {
            "lengths": evaluation.prompts.lengths,
            "mean": request.mode == "hidden_avg",
            "positive": positive,
            "negative": negative,
        }
    )
    most_prompts = max(map(len, (evaluation.lengths, *positive, *negative)))
    workspace = 3 * 4 * most_prompts * request.base.model.hidden_size
    return [
        Opaque("hidden", params, (stream,), DType.F32, request.router_shape, workspace)
        for stream in evaluation.entering()
    ]


def hidden(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    """From the residual stream `[num_tokens, hidden_size]` to a router `[num_rows, hidden_size]`."""
    import torch

    prompts = torch.split(inputs[0], params["lengths"])
    views = torch.stack([prompt.mean(dim=0) if params["mean"] else prompt[-1] for prompt in prompts])
    for expert, (positive, negative) in enumerate(zip(params["positive"], params["negative"], strict=True)):
        direction = views[positive].mean(dim=0)
        if negative:
            direction = without(direction, views[negative].mean(dim=0))
        output[expert] = normalized(direction)


MODE = GateMode(routers, {"hidden": hidden}, evaluates=True)
