"""Small real checkpoints, written by transformers: seeded, quick, and awkward in every way that real ones are.

A recipe is data: the family, what its config says otherwise than `SIZES`, how it is saved. `RECIPES` holds every family
times every variant, so that a new family is one entry in `FAMILIES`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make_models import VOCAB_SIZE, save_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

ABSENT = object()  # in a recipe's config: the key is left out, so the family's default holds

# No value here that has a default is that default, of any family: one that gets lost on the way shows in the logits.
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Recipe:
    """How to make a checkpoint. `terse`: its config.json says what the recipe says, and no defaults beside it."""

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    terse: bool = False
    dtype: str = "float32"
    max_shard_size: str = "1GB"
    extra_tensors: Mapping[str, Tensor] = field(default_factory=dict)


def _old_rope(**scaling: Any) -> dict[str, Any]:
    return {
        "config": {"rope_parameters": ABSENT, "rope_theta": 700.0, "rope_scaling": scaling or None},
        "terse": True,
    }


# What sets the family apart from the others.
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": 8}}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"max_shard_size": "100KB"},
    "tied": {"config": {"tie_word_embeddings": True}},
    "f16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "gelu": {"config": {"hidden_act": "gelu"}},
    "wide-heads": {"config": {"head_dim": 24}},
    "off-page": {"config": {"hidden_size": 56, "intermediate_size": 90, "head_dim": ABSENT}},
    "rope-old": _old_rope(),
    "rope-old-linear": _old_rope(type="linear", factor=2.0),
    "rope-old-llama3": _old_rope(**LLAMA3_SCALING),
    "rope-new-llama3": {"config": {"rope_parameters": {"rope_theta": 700.0, **LLAMA3_SCALING}}},
}

# Nothing in config.json but what nobody can guess. 16 heads, because Mistral's default is 8 key-value heads.
_ERA_OF_LLAMA_1 = {
    "config": {
        "num_attention_heads": 16,
        **dict.fromkeys(("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters"), ABSENT),
    },
    "terse": True,
    "extra_tensors": {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(2) for n in range(3)},
}


def _recipes() -> dict[str, Recipe]:
    own = {
        "llama": {"old": _ERA_OF_LLAMA_1},
        "mistral": {
            "old": _ERA_OF_LLAMA_1,
            "default-window": {"config": {"sliding_window": ABSENT}, "terse": True},
            "no-window": {"config": {"sliding_window": None}},
        },
    }
    return {
        f"{family}-{name}": Recipe(family, **{**variant, "config": {**common, **variant.get("config", {})}})
        for family, common in FAMILIES.items()
        for name, variant in {**VARIANTS, **own.get(family, {})}.items()
    }


RECIPES = _recipes()


def save_checkpoint(recipe: Recipe, path: Path, seed: int) -> None:
    """Save the checkpoint of `recipe`, its weights drawn from `seed`, with a tokenizer, to the directory `path`."""
    config = {key: value for key, value in (SIZES | recipe.config).items() if value is not ABSENT}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(recipe.family, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1
    model.to(getattr(torch, recipe.dtype)).save_pretrained(path, max_shard_size=recipe.max_shard_size)
    if recipe.extra_tensors:
        file = path / "model.safetensors"
        save_file({**load_file(file), **recipe.extra_tensors}, file, metadata={"format": "pt"})
    if recipe.terse:
        saved = json.loads((path / "config.json").read_text())
        kept = {key: saved[key] for key in ("architectures", "model_type")}
        (path / "config.json").write_text(json.dumps({**kept, "torch_dtype": recipe.dtype, **config}, indent=2))
    save_tokenizer(path)
    # transformers 5 no longer writes this file; the checkpoints that are out there have it.
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint at `path`, by name."""
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
