"""Small real checkpoints, written by transformers: seeded, quick, and awkward in every way that real ones are.

A recipe is data: the family, what its config says otherwise than `SIZES`, how it is saved. `RECIPES` holds every family
times every variant, and what is awkward in one family alone, so that a new family is one entry in `FAMILIES`.
"""

import io
import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from make_models import TEXT, VOCAB_SIZE, save_tokenizer
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

YARN_SCALING = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Recipe:
    """How to make a checkpoint.

    `terse`: its config.json says what the recipe says, and no defaults beside it. `bos`: its tokenizer has a BOS token.
    `own_head`: the output matrix that it stores is not its embeddings, whatever its config says.
    """

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    terse: bool = False
    bos: bool = True
    own_head: bool = False
    dtype: str = "float32"
    max_shard_size: str = "1GB"
    extra_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


def _old_rope(**scaling: Any) -> dict[str, Any]:
    return {
        "config": {"rope_parameters": ABSENT, "rope_theta": 700.0, "rope_scaling": scaling or None},
        "terse": True,
    }


GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}

# What sets the family apart from the others. Qwen's tokenizers have no BOS token, though its configs name one.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"config": {"sliding_window": 8}},
    "qwen2": {"bos": False},
    "qwen3": {"bos": False},
    "granite": {"config": GRANITE_MULTIPLIERS},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"max_shard_size": "100KB"},
    "tied": {"config": {"tie_word_embeddings": True}},
    "tied-head": {
        "config": {"tie_word_embeddings": True},
        "renamed": {"model.embed_tokens.weight": "lm_head.weight"},
    },
    "tied-own-head": {"config": {"tie_word_embeddings": True}, "own_head": True},
    "f16": {"dtype": "float16"},
    "bf16": {"dtype": "bfloat16"},
    "gelu": {"config": {"hidden_act": "gelu"}},
    "wide-heads": {"config": {"head_dim": 24}},
    "off-page": {"config": {"hidden_size": 56, "intermediate_size": 90, "head_dim": ABSENT}},
    "rope-old": _old_rope(),
    "rope-old-linear": _old_rope(type="linear", factor=2.0),
    "rope-old-yarn": _old_rope(type="yarn", factor=4.0, original_max_position_embeddings=64),
    "rope-old-llama3": _old_rope(**LLAMA3_SCALING),
    "rope-new-llama3": {"config": {"rope_parameters": {"rope_theta": 700.0, **LLAMA3_SCALING}}},
    "rope-new-dynamic": {
        "config": {
            "max_position_embeddings": 72,  # beyond which it scales
            "rope_parameters": {"rope_theta": 700.0, "rope_type": "dynamic", "factor": 2.0},
        }
    },
    "rope-new-yarn": {"config": {"rope_parameters": {"rope_theta": 700.0, **YARN_SCALING}}},
}


def _silent(num_attention_heads: int, *keys: str) -> dict[str, Any]:
    """A config.json with nothing but what nobody can guess: not these keys, nor any that transformers adds."""
    silent = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", *keys)
    return {"config": {"num_attention_heads": num_attention_heads, **dict.fromkeys(silent, ABSENT)}, "terse": True}


def _window(**config: Any) -> dict[str, Any]:
    return {"config": {"use_sliding_window": True, "sliding_window": 8, **config}, "terse": True}


def _rope_with_context_outside(tokens: int, **scaling: Any) -> dict[str, Any]:
    """As Phi's configs have it: the context that the model was made for stands beside the scaling, and counts."""
    recipe = _old_rope(**scaling)
    recipe["config"]["original_max_position_embeddings"] = tokens
    return recipe


_ROTARY_BUFFERS = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(2) for n in range(3)}
_QWEN = {
    "silent": _silent(32),  # as many heads as the family has key-value heads by default
    "window": _window(max_window_layers=0),
    "window-by-layer": _window(layer_types=["sliding_attention"] * 3),
    "window-above-all-layers": _window(),
    "window-in-no-layer": _window(max_window_layers=0, layer_types=["full_attention"] * 3),
    "window-off": _window(use_sliding_window=False, max_window_layers=0),
}

# 16 heads, because Mistral's default is 8 key-value heads.
OWN_VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "old": {**_silent(16), "extra_tensors": _ROTARY_BUFFERS},
        "rope-yarn-in-two-places": _rope_with_context_outside(
            16, type="yarn", factor=4.0, original_max_position_embeddings=64
        ),
        # Some prompts are shorter than these 24 tokens, some longer, and are rotated in another way.
        "rope-longrope": _rope_with_context_outside(
            24, type="longrope", short_factor=[1 + n / 10 for n in range(8)], long_factor=[2 + n / 3 for n in range(8)]
        ),
    },
    "mistral": {
        "old": {**_silent(16), "extra_tensors": _ROTARY_BUFFERS},
        "default-window": {"config": {"sliding_window": ABSENT}, "terse": True},
        "no-window": {"config": {"sliding_window": None}},
        "window-by-layer": {"config": {"layer_types": ["sliding_attention"] * 3}},
        "window-in-no-layer": {"config": {"layer_types": ["full_attention"] * 3}},
        "window-with-qwen-s-key": {"config": {"max_window_layers": 2}},
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "granite": {"silent": _silent(16, *GRANITE_MULTIPLIERS)},
}

# What no MoE family that takes the source, or not every one, can hold.
MISFITS: dict[str, Recipe] = {
    "llama-attention-bias": Recipe("llama", {"attention_bias": True}),
    "llama-mlp-bias": Recipe("llama", {"mlp_bias": True}),
    "qwen3-attention-bias": Recipe("qwen3", {"attention_bias": True}),
    "granite-attention-bias": Recipe("granite", {"attention_bias": True}),
    "granite-mlp-bias": Recipe("granite", {"mlp_bias": True}),
    "mistral-mixed-window": Recipe(
        "mistral", {"sliding_window": 8, "layer_types": ["full_attention", *["sliding_attention"] * 2]}
    ),
    "qwen2-mixed-window": Recipe("qwen2", **_window(max_window_layers=1)),
    "qwen3-mixed-window": Recipe("qwen3", **_window(layer_types=["full_attention", *["sliding_attention"] * 2])),
}


def _recipes() -> dict[str, Recipe]:
    return {
        f"{family}-{name}": Recipe(
            family, **{**common, **variant, "config": {**common.get("config", {}), **variant.get("config", {})}}
        )
        for family, common in FAMILIES.items()
        for name, variant in {**VARIANTS, **OWN_VARIANTS[family]}.items()
    }


RECIPES = _recipes()


def save_checkpoint(recipe: Recipe, path: Path, seed: int) -> None:
    """Save the checkpoint of `recipe`, its weights drawn from `seed`, with a tokenizer, to the directory `path`."""
    config = {key: value for key, value in (SIZES | recipe.config).items() if value is not ABSENT}
    # A copy, because transformers 5 adds to the RoPE parameters that it is given.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(recipe.family, **deepcopy(config)))
    generator = torch.Generator().manual_seed(seed)
    std = 0.2 * min(1, 64 / config["hidden_size"]) ** 0.5  # so that wide models do not drown in their own rounding
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1
    model.to(getattr(torch, recipe.dtype)).save_pretrained(path, max_shard_size=recipe.max_shard_size)
    if recipe.extra_tensors or recipe.renamed or recipe.own_head:
        file = path / "model.safetensors"
        saved = {recipe.renamed.get(name, name): tensor for name, tensor in load_file(file).items()}
        if recipe.own_head:
            saved["lm_head.weight"] = saved["model.embed_tokens.weight"].flip(0)
        save_file({**saved, **recipe.extra_tensors}, file, metadata={"format": "pt"})
    if recipe.terse:
        saved = json.loads((path / "config.json").read_text())
        kept = {key: saved[key] for key in ("architectures", "model_type")}
        (path / "config.json").write_text(json.dumps({**kept, "torch_dtype": recipe.dtype, **config}, indent=2))
    save_tokenizer(path)
    # transformers 5 no longer writes this file; the checkpoints that are out there have it.
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if not recipe.bos:
        del special["bos_token"]
        file = path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "bos_token": None}, indent=2))
    (path / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint at `path`, by name."""
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def as_bin(source: Path, path: Path, num_shards: int = 1) -> Path:
    """A copy of the checkpoint `source` as transformers 4 saved it without safetensors.

    What is tied is named twice, and shares its storage; buffers that old files hold are there, too.
    """
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = dict(AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict())
    tensors |= {name: tensor for name, tensor in read_tensors(source).items() if name not in tensors}
    if num_shards == 1:
        torch.save(tensors, path / "pytorch_model.bin")
        return path
    storages = list(dict.fromkeys(tensor.data_ptr() for tensor in tensors.values()))  # one of two tensors stays whole
    shard_of = {storage: n % num_shards + 1 for n, storage in enumerate(storages)}
    weight_map = {
        name: f"pytorch_model-{shard_of[tensor.data_ptr()]:05}-of-{num_shards:05}.bin"
        for name, tensor in tensors.items()
    }
    for shard in set(weight_map.values()):
        torch.save({name: tensors[name] for name, s in weight_map.items() if s == shard}, path / shard)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def use_sentencepiece(path: Path) -> None:
    """Give the checkpoint at `path` a tokenizer such as Llama 2's, as a sentencepiece model and nothing else."""
    from sentencepiece import SentencePieceTrainer

    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=trained,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(trained.getvalue())
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
