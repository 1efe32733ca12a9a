"""Judges models by their loss on text that none of them was trained on, with transformers' own code, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from benchmarks.routing.results import Reference
from benchmarks.routing.tokens import Ids, Tokens

BATCH = 20
"""Windows that are evaluated at a time."""

disable_progress_bar()


def reference(base: Path, experts: Sequence[Path], tokens: Sequence[Tokens]) -> Reference:
    """The ends of the scale: the base, and each domain's expert alone, as a whole and as nothing but its MLPs."""
    dense = _loaded(base)
    own, oracle = [], []
    for path, domain in zip(experts, tokens, strict=True):
        expert = _loaded(path)
        own.append(_loss(expert, domain.windows))
        weights = dense.state_dict() | {name: weight for name, weight in expert.state_dict().items() if ".mlp." in name}
        expert.load_state_dict(weights)
        oracle.append(_loss(expert, domain.windows))
    return Reference(_losses(dense, tokens), tuple(oracle), tuple(own))


def losses(model: Path, tokens: Sequence[Tokens]) -> tuple[float, ...]:
    """The merged model's loss on each domain, in nats per token."""
    return _losses(_loaded(model), tokens)


def losses_at_equal_weight(model: Path, tokens: Sequence[Tokens]) -> tuple[float, ...]:
    """The same of the model with routers of zeros and all experts at work: each gets the same weight."""
    config = AutoConfig.from_pretrained(model)
    config.num_experts_per_tok = config.num_local_experts
    loaded = _loaded(model, config=config)
    routers = [weight for name, weight in loaded.named_parameters() if name.endswith(".gate.weight")]
    if len(routers) != config.num_hidden_layers:
        raise ValueError(f"{model} has {len(routers)} routers in {config.num_hidden_layers} layers")
    for router in routers:
        torch.nn.init.zeros_(router)
    return _losses(loaded, tokens)


def _loaded(path: Path, **settings: Any) -> PreTrainedModel:
    """The model, whole. Raises ValueError where a tensor is amiss: transformers would draw it at random."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    model: PreTrainedModel
    model, found = loaded
    for how in ("missing", "unexpected", "mismatched"):
        if amiss := found[f"{how}_keys"]:
            raise ValueError(f"{how} in {path.name}: {min(map(str, amiss))}")
    return model


def _losses(model: PreTrainedModel, tokens: Sequence[Tokens]) -> tuple[float, ...]:
    return tuple(_loss(model, domain.windows) for domain in tokens)


@torch.inference_mode()
def _loss(model: PreTrainedModel, windows: Ids) -> float:
    """The mean loss of all tokens but the first, BOS, of `windows` [num_windows, window], in nats."""
    model.eval()
    total = 0.0
    for batch in torch.from_numpy(windows).split(BATCH):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].size


def num_parameters(path: Path) -> int:
    """The distinct parameters of a model; what is tied counts once."""
    return sum(parameter.numel() for parameter in _loaded(path).parameters())
