"""The settings of attention, as an output family holds them: RoPE, sliding windows, the heads' width.

RoPE is written in both spellings: `rope_theta` and `rope_scaling`; `rope_parameters`, which transformers 5 prefers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import ROPE_TYPES, Family
from moeplan.checkpoint import CheckpointError

ORIGINAL_CONTEXT = "original_max_position_embeddings"


class CannotHoldError(CheckpointError):
    """A model has something that an output family lacks, and another one may have."""


def attention_settings(family: Family, base: DenseModel) -> dict[str, Any]:
    """What the merged model's config.json says of the base's attention.

    Raises CannotHoldError for what `family` lacks, CheckpointError for what no family could hold.
    """
    if not family.free_head_dim and base.sizes["q_size"] != base.hidden_size:
        raise CannotHoldError(
            f"{_path(base)}: heads are {base.sizes['head_dim']} wide, and those of {family.name} are always "
            f"hidden_size / num_attention_heads = {base.hidden_size // base.sizes['num_attention_heads']}"
        )
    theta, scaling = _rope(base)
    if scaling["rope_type"] not in family.rope_types:
        raise CannotHoldError(
            f"{_path(base)}: RoPE scaling is of type {scaling['rope_type']!r}, and {family.name} has only "
            f"{', '.join(family.rope_types)}"
        )
    # For longrope transformers 4 looks for it beside the scaling.
    is_beside = scaling["rope_type"] == "longrope" and ORIGINAL_CONTEXT in scaling
    return {
        "rope_theta": theta,
        "rope_scaling": {"type": scaling["rope_type"], **scaling} if scaling["rope_type"] != "default" else None,
        "rope_parameters": {"rope_theta": theta, **scaling},
        **({ORIGINAL_CONTEXT: scaling[ORIGINAL_CONTEXT]} if is_beside else {}),
        **_sliding_window(family, base),
    }


def _sliding_window(family: Family, base: DenseModel) -> dict[str, Any]:
    windows = set(base.windows())
    if windows == {None}:
        return {"sliding_window": None}
    if family.windowed is None:
        raise CannotHoldError(
            f"{_path(base)}: attention has a sliding window of {base.settings['sliding_window']} tokens, and "
            f"{family.name} has none; set sliding_window to null there if the model is used without it"
        )
    if len(windows) > 1:
        raise CannotHoldError(
            f"{_path(base)}: some layers have a sliding window and some have none, and {family.name} has one for all"
        )
    every_layer = ["sliding_attention"] * base.num_layers
    return {"sliding_window": base.settings["sliding_window"], "layer_types": every_layer, **family.windowed}


def _rope(model: DenseModel) -> tuple[float, dict[str, Any]]:
    """RoPE's base and its scaling parameters, from either spelling, as transformers 5 reads them.

    The scaling has a `rope_type`, `default` where there is none. Raises CheckpointError for what no merged model could
    hold: an unknown type, types that differ between layers, rotation of a part of each head.
    """
    config, path = model.checkpoint.config, _path(model)
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"{path}: rope parameters that differ between layers cannot be carried over")
    scaling = dict(given)
    rope_type = scaling.pop("type", "default")
    scaling = {"rope_type": scaling.pop("rope_type", rope_type), **scaling}
    if scaling["rope_type"] not in ROPE_TYPES:
        raise CheckpointError(
            f"{path}: RoPE scaling of type {scaling['rope_type']!r} cannot be held by the merged model; "
            f"moeplan knows {', '.join(ROPE_TYPES)}"
        )
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is {partial!r}; the merged model rotates whole heads")
    # Beside the scaling it counts for more than in it, in transformers 5.
    if scaling["rope_type"] != "default" and config.get(ORIGINAL_CONTEXT) is not None:
        scaling[ORIGINAL_CONTEXT] = config[ORIGINAL_CONTEXT]
    theta = scaling.pop("rope_theta", None) or model.settings["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise CheckpointError(f"{path}: rope_theta is {theta!r}; it must be a positive number")
    return float(theta), scaling


def rope_switch(model: DenseModel) -> int | None:
    """The number of tokens beyond which longrope rotates all tokens in another way; None for other kinds of RoPE."""
    _, scaling = _rope(model)
    tokens = scaling.get(ORIGINAL_CONTEXT)
    return tokens if scaling["rope_type"] == "longrope" and type(tokens) is int else None


def _path(model: DenseModel) -> Path:
    return model.checkpoint.path / "config.json"
