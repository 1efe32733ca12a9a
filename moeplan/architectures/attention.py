"""The settings of attention, as an output family holds them: RoPE, sliding windows, the heads' width.

RoPE is written in both spellings: `rope_theta` and `rope_scaling`; `rope_parameters`, which transformers 5 prefers.
"""

from __future__ import annotations

import math
from typing import Any

from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import ROPE_TYPES, Family
from moeplan.architectures.setting_values import MAX_NUMBER, is_number
from moeplan.places import CheckpointError
from moeplan.untrusted_json import show

ORIGINAL_CONTEXT = "original_max_position_embeddings"

_SCALING_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT),
}
"""The parameters without which a kind of RoPE scaling cannot be computed (transformers/modeling_rope_utils.py)."""


class CannotHoldError(CheckpointError):
    """A model has something that an output family lacks, and another one may have."""


def attention_settings(family: Family, base: DenseModel) -> dict[str, Any]:
    """What the merged model's config.json says of the base's attention.

    Raises CannotHoldError for what `family` lacks, CheckpointError for what no family could hold.
    """
    path = base.checkpoint.config_file
    if not family.free_head_dim and base.sizes["q_size"] != base.hidden_size:
        raise CannotHoldError(
            f"{path}: heads are {base.sizes['head_dim']} wide, and those of {family.name} are always "
            f"hidden_size / num_attention_heads = {base.hidden_size // base.sizes['num_attention_heads']}"
        )
    theta, scaling = rope(base)
    if scaling["rope_type"] not in family.rope_types:
        raise CannotHoldError(
            f"{path}: RoPE scaling is of type {scaling['rope_type']!r}, and {family.name} has only "
            f"{', '.join(family.rope_types)}"
        )
    return {
        "rope_theta": theta,
        "rope_scaling": {"type": scaling["rope_type"], **scaling} if scaling["rope_type"] != "default" else None,
        **rope_parameters(base),
        **_sliding_window(family, base),
    }


def _sliding_window(family: Family, base: DenseModel) -> dict[str, Any]:
    base.check_windows()
    path, windows = base.checkpoint.config_file, set(base.windows())
    if windows == {None}:
        return {"sliding_window": None}
    if family.windowed is None:
        beside = " and remove layer_types" if base.settings.get("layer_types") is not None else ""
        raise CannotHoldError(
            f"{path}: attention has a sliding window of {base.settings['sliding_window']} tokens, and "
            f"{family.name} has none; set sliding_window to null{beside} there if the model is used without it"
        )
    if len(windows) > 1:
        raise CannotHoldError(
            f"{path}: some layers have a sliding window and some have none, and {family.name} has one for all"
        )
    every_layer = ["sliding_attention"] * base.num_layers
    return {"sliding_window": base.settings["sliding_window"], "layer_types": every_layer, **family.windowed}


def rope(model: DenseModel) -> tuple[float, dict[str, Any]]:
    """RoPE's base and its scaling parameters, from either spelling, as transformers 5 reads them.

    The scaling has a `rope_type`, `default` where there is none, and nothing that is null: transformers takes some
    nulls for no value, one for false, and stumbles over others. Raises CheckpointError for what no merged model could
    hold: an unknown type, types that differ between layers, rotation of a part of each head.
    """
    config, path = model.checkpoint.config, model.checkpoint.config_file
    given = given_rope(model)
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"{path}: rope parameters that differ between layers cannot be carried over")
    scaling = {key: value for key, value in given.items() if value is not None}
    if given.get("truncate", True) is None:
        scaling["truncate"] = False
    rope_type = scaling.pop("type", "default")
    scaling = {"rope_type": scaling.pop("rope_type", rope_type), **scaling}
    if scaling["rope_type"] not in ROPE_TYPES:
        raise CheckpointError(
            f"{path}: RoPE scaling of type {show(scaling['rope_type'])} cannot be held by the merged model; "
            f"moeplan knows {', '.join(ROPE_TYPES)}"
        )
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise CheckpointError(f"{path}: partial_rotary_factor is {show(partial)}; the merged model rotates whole heads")
    # Beside the scaling it counts for more than in it, in transformers 5.
    if scaling["rope_type"] != "default" and config.get(ORIGINAL_CONTEXT) is not None:
        scaling[ORIGINAL_CONTEXT] = config[ORIGINAL_CONTEXT]
    theta = scaling.pop("rope_theta", model.settings["rope_theta"])
    if not is_number(theta, 0) or theta == 0:
        raise CheckpointError(f"{path}: rope_theta is {show(theta)}; it must be a number above 0, up to {MAX_NUMBER:g}")
    _check_scaling(model, scaling)
    if scaling["rope_type"] == "longrope":
        _complete_longrope(model, scaling)
    return float(theta), scaling


def _complete_longrope(model: DenseModel, scaling: dict[str, Any]) -> None:
    """Say what transformers 5 makes of what is not said, since 4 makes something else of it, or stumbles."""
    context = model.settings["max_position_embeddings"]
    original = scaling.setdefault(ORIGINAL_CONTEXT, context)
    factor = scaling.get("factor", context / original)
    scaling.setdefault("attention_factor", math.sqrt(1 + math.log(max(factor, 1)) / math.log(max(original, 2))))


def rope_parameters(model: DenseModel) -> dict[str, Any]:
    """The settings that give RoPE in the spelling of transformers 5. Raises what `rope` does."""
    theta, scaling = rope(model)
    # For longrope transformers 4 looks for it beside the scaling.
    beside = {ORIGINAL_CONTEXT: scaling[ORIGINAL_CONTEXT]} if scaling["rope_type"] == "longrope" else {}
    return {"rope_parameters": {"rope_theta": theta, **scaling}, **beside}


def given_rope(model: DenseModel) -> Any:
    """RoPE's parameters, in the spelling that counts, as `config.json` has them: a dict, or what no model can have."""
    config = model.checkpoint.config
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _check_scaling(model: DenseModel, scaling: dict[str, Any]) -> None:
    path, rope_type = model.checkpoint.config_file, scaling["rope_type"]
    missing = [key for key in _SCALING_NEEDS[rope_type] if key not in scaling]
    if missing:
        raise CheckpointError(f"{path}: RoPE scaling of type {rope_type!r} has no {missing[0]}")
    for key, value in scaling.items():
        if key == "rope_type":
            continue
        if key in ("short_factor", "long_factor"):
            count = model.sizes["head_dim"] // 2
            is_right = isinstance(value, list) and len(value) == count and all(_is_positive(item) for item in value)
            expected = f"a list of head_dim / 2 = {count} numbers above 0"
        elif key == ORIGINAL_CONTEXT:
            is_right = type(value) is int and 0 < value < 2**31
            expected = "a whole number above 0"
        elif key.endswith("factor"):
            is_right, expected = _is_positive(value), "a number above 0"
        else:
            is_right, expected = is_number(value) or isinstance(value, str | bool), "a number, text, or true or false"
        if not is_right:
            raise CheckpointError(f"{path}: the RoPE parameter {show(key)} is {show(value)}; it must be {expected}")


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def rope_switch(model: DenseModel) -> int | None:
    """The number of tokens beyond which longrope rotates all tokens in another way; None for other kinds of RoPE."""
    _, scaling = rope(model)
    return scaling[ORIGINAL_CONTEXT] if scaling["rope_type"] == "longrope" else None
