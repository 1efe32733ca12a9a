"""The merged model's config.json, written so that old and new readers understand it alike.

RoPE is written in both spellings (`rope_theta` and `rope_scaling`; `rope_parameters`, which transformers 5 prefers),
the dtype too (`torch_dtype`, `dtype`), and every carried setting stands there even where the source left it to a
default, because another family's default is another value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeplan.architectures.dense import DenseModel
from moeplan.architectures.family import Family
from moeplan.checkpoint import CheckpointError
from planner.expr import DType

DTYPE_NAMES = {DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16"}


def model_config(
    family: Family, base: DenseModel, *, num_experts: int, with_shared: bool, experts_per_token: int, dtype: DType
) -> dict[str, Any]:
    """The contents of config.json. Raises CheckpointError for settings of the base that `family` cannot hold."""
    theta, scaling = rope(base, family.rope_types)
    if not family.free_head_dim and base.sizes["q_size"] != base.hidden_size:
        raise CheckpointError(
            f"{_path(base)}: heads are {base.sizes['head_dim']} wide, and those of {family.name} are always "
            f"hidden_size / num_attention_heads = {base.hidden_size // base.sizes['num_attention_heads']}"
        )
    config = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        **{key: base.settings.get(key) for key in family.carried},
        "rope_theta": theta,
        "rope_scaling": {"type": scaling["rope_type"], **scaling} if scaling["rope_type"] != "default" else None,
        "rope_parameters": {"rope_theta": theta, **scaling},
        family.num_experts_key: num_experts,
        "num_experts_per_tok": experts_per_token,
        **{key: base.settings[other] for key, other in family.derived.items()},
        **family.constants,
        **sliding_window(family, base),
        "torch_dtype": DTYPE_NAMES[dtype],
        "dtype": DTYPE_NAMES[dtype],
    }
    if family.shared is not None:
        present = {key: base.settings[other] for key, other in family.shared.derived.items()}
        config |= {**family.shared.present, **present} if with_shared else family.shared.absent
    if not family.tied:
        config["tie_word_embeddings"] = False
    return config


def sliding_window(family: Family, base: DenseModel) -> dict[str, Any]:
    """The settings for the base's sliding window.

    Raises CheckpointError where `family` cannot hold it: it has none, or the window differs between layers.
    """
    windows = set(base.windows())
    if windows == {None}:
        return {"sliding_window": None}
    if family.windowed is None:
        raise CheckpointError(
            f"{_path(base)}: attention has a sliding window of {base.settings['sliding_window']} tokens, and "
            f"{family.name} has none; set sliding_window to null there if the model is used without it"
        )
    if len(windows) > 1:
        raise CheckpointError(
            f"{_path(base)}: some layers have a sliding window and some have none, and {family.name} has one for all"
        )
    every_layer = ["sliding_attention"] * base.num_layers
    return {"sliding_window": base.settings["sliding_window"], "layer_types": every_layer, **family.windowed}


def rope(model: DenseModel, known_types: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """RoPE's base and its scaling parameters, from either spelling, as transformers 5 reads them.

    The scaling has a `rope_type`, `default` where there is none. Raises CheckpointError for what the merged model could
    not hold: an unknown type, types that differ between layers, rotation of a part of each head.
    """
    config, path = model.checkpoint.config, _path(model)
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"{path}: rope parameters that differ between layers cannot be carried over")
    scaling = dict(given)
    rope_type = scaling.pop("type", "default")
    scaling = {"rope_type": scaling.pop("rope_type", rope_type), **scaling}
    if scaling["rope_type"] not in known_types:
        raise CheckpointError(
            f"{path}: RoPE scaling of type {scaling['rope_type']!r} cannot be held by the merged model; "
            f"it can hold {', '.join(known_types)}"
        )
    partial = scaling.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor is {partial!r}; the merged model rotates whole heads")
    theta = scaling.pop("rope_theta", None) or model.settings["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
        raise CheckpointError(f"{path}: rope_theta is {theta!r}; it must be a positive number")
    return float(theta), scaling


def _path(model: DenseModel) -> Path:
    return model.checkpoint.path / "config.json"


def stored_dtype(model: DenseModel) -> DType:
    """The dtype a model is in: what config.json says, else that of its embeddings."""
    named = model.checkpoint.config.get("dtype") or model.checkpoint.config.get("torch_dtype")
    by_name = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    if isinstance(named, str) and named.removeprefix("torch.") in by_name:
        return by_name[named.removeprefix("torch.")]
    return model.checkpoint.tensors["model.embed_tokens.weight"].dtype
