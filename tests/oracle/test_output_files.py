"""The files of a merged model: shards, index, tokenizer, and a config.json that old and new readers understand."""

import json

import pytest
from models import RECIPES, read_tensors
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

COPIED = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
]


def read_json(path):
    return json.loads(path.read_text())


def test_small_shards_have_the_names_and_the_index_that_readers_look_for(checkpoint, merge):
    source = checkpoint("llama-off-page")
    out = merge(source, [source] * 4, out_shard_size="100KB")

    files = sorted(out.glob("*.safetensors"))
    count = len(files)
    assert count > 10
    assert [file.name for file in files] == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]

    index = read_json(out / "model.safetensors.index.json")
    nbytes = 0
    weight_map = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            names = shard.keys()
            tensors = {name: shard.get_tensor(name) for name in names}
        shard_nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert shard_nbytes <= 100_000
        assert not weight_map.keys() & tensors.keys()
        weight_map |= dict.fromkeys(tensors, file.name)
        nbytes += shard_nbytes
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == nbytes


def test_bytes_of_the_tensors_do_not_depend_on_the_shard_size(checkpoint, merge):
    source = checkpoint("llama-bf16")
    one, many = (read_tensors(merge(source, [source] * 2, out_shard_size=size)) for size in ("5B", "64KiB"))
    assert one.keys() == many.keys()
    assert all(one[name].equal(many[name]) for name in one)


def test_the_tokenizer_and_what_belongs_to_it_are_copied_byte_for_byte(checkpoint, merge):
    source, other = checkpoint("llama-plain"), checkpoint("llama-plain", 1)
    out = merge(source, [other, source])
    for name in COPIED:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    text = "Ein Brötchen für den Doktor"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(source)(text)


def test_no_tokenizer_is_copied_where_none_is_wanted(checkpoint, merge):
    source = checkpoint("llama-plain")
    out = merge(source, [source] * 2, copy_tokenizer=False)
    assert not [name for name in COPIED if (out / name).exists()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_config_json_says_the_same_to_old_and_new_readers(recipe, checkpoint, merge):
    source = checkpoint(recipe)
    out = merge(source, [source] * 4, experts_per_token=3)
    dense, config = AutoConfig.from_pretrained(source), read_json(out / "config.json")

    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["model_type"] == "mixtral"
    assert config["num_local_experts"] == 4
    assert config["num_experts_per_tok"] == 3
    assert config["torch_dtype"] == config["dtype"] == RECIPES[recipe].dtype
    for key in (
        "hidden_act",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
    ):
        assert config[key] == getattr(dense, key), key
    assert config["sliding_window"] == getattr(dense, "sliding_window", None)

    rope = dense.rope_parameters
    assert config["rope_parameters"].items() >= rope.items() - {("type", "linear")}
    assert config["rope_theta"] == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert config["rope_scaling"] is None
    else:
        # Readers older than transformers 4.43 know `type` and not `rope_type`.
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        assert config["rope_scaling"].items() >= scaling.items()
