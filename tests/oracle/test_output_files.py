"""The files of a merged model: shards, index, tokenizer, and a config.json that old and new readers understand."""

import json
import shutil

import pytest
from families import CASES, OUTPUTS, plain_recipe, recipes_of
from models import GRANITE_MULTIPLIERS, RECIPES, read_tensors, use_sentencepiece
from safetensors import safe_open
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
    tokenization_utils_base,
)

from moeplan.tokenizer_files import TOKENIZER_FILES

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


def test_every_file_that_tokenizers_of_language_models_read_is_copied():
    byte_level, sentencepiece = (GPT2Tokenizer, Qwen2Tokenizer), (LlamaTokenizer, GemmaTokenizer, T5Tokenizer)
    classes = *byte_level, *sentencepiece, XLMRobertaTokenizer, BertTokenizer
    files = {file for tokenizer in classes for file in tokenizer.vocab_files_names.values()}
    for name, value in vars(tokenization_utils_base).items():
        if name.endswith("_FILE"):
            files.add(value)
    assert {"tokenizer.model", "merges.txt", "chat_template.jinja", "added_tokens.json"} <= files
    assert files <= {*TOKENIZER_FILES}


def test_the_tokenizer_and_what_belongs_to_it_are_copied_byte_for_byte(checkpoint, merge):
    source, other = checkpoint("llama-plain"), checkpoint("llama-plain", 1)
    out = merge(source, [other, source])
    for name in COPIED:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    text = "Ein Brötchen für den Doktor"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(source)(text)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.source in ("llama", "mistral") and case.layout == "separate"], ids=str
)
def test_a_tokenizer_that_names_no_class_is_read_as_the_base_s_is(case, checkpoint, merge, tmp_path):
    """A model's type brings a class with it, and a Qwen2 MoE's reads no tokenizer of a Llama."""
    source = shutil.copytree(checkpoint(plain_recipe(case)), tmp_path / "source")
    use_sentencepiece(source)
    AutoTokenizer.from_pretrained(source).save_pretrained(source)
    settings = read_json(source / "tokenizer_config.json")
    del settings["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out = merge(source, [source] * 2, **case.settings(source))
    text = "Ein Brötchen  für den Doktor, isn't it?\n 123"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(source)(text)


OF_FOREIGN_TOKENIZERS = [case for case in CASES if case.source in ("llama", "mistral") and case.output != "mixtral"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_class_of_a_tokenizer_that_names_none_is_named_only_where_the_family_s_own_does_not_read_it(
    case, checkpoint, plan
):
    """Of DeepSeek's own configuration class transformers 4 knows no tokenizer; tests/readers has it read one."""
    source = checkpoint(plain_recipe(case))
    config = plan(source, [source] * 2, **case.settings(source)).model_config
    assert config.get("tokenizer_class") == ("PreTrainedTokenizerFast" if case in OF_FOREIGN_TOKENIZERS else None)


@pytest.mark.parametrize("case", [case for case in OF_FOREIGN_TOKENIZERS if case.layout == "separate"], ids=str)
def test_a_sentencepiece_model_that_names_no_class_is_read_as_sentencepiece_reads_it(case, checkpoint, merge, tmp_path):
    source = shutil.copytree(checkpoint(plain_recipe(case)), tmp_path / "source")
    use_sentencepiece(source)
    (source / "tokenizer_config.json").unlink()
    out = merge(source, [source] * 2, **case.settings(source))
    text = "Ein Brötchen  für den Doktor, isn't it?\n 123"
    expected = SentencePieceProcessor(model_file=str(source / "tokenizer.model")).encode(text)
    assert AutoTokenizer.from_pretrained(out).encode(text, add_special_tokens=False) == expected


def test_no_tokenizer_is_copied_where_none_is_wanted(checkpoint, merge):
    source = checkpoint("llama-plain")
    out = merge(source, [source] * 2, copy_tokenizer=False)
    assert not [name for name in COPIED if (out / name).exists()]


def test_config_json_is_what_the_plan_says(checkpoint, merge, plan):
    source = checkpoint("llama-plain")
    assert read_json(merge(source, [source] * 2) / "config.json") == plan(source, [source] * 2).model_config


SAME_IN_EVERY_FAMILY = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
]
CONFIGS = [
    pytest.param(case, recipe, id=f"{case}-{recipe}")
    for case in CASES
    for recipe in recipes_of(case.source)
    if case.layout == next(iter(OUTPUTS[case.output].layouts))
    and (
        case.output != "deepseek"
        or recipe in ("llama-plain", "llama-old", "llama-rope-old-linear", "llama-tied", "llama-tied-own-head")
    )
]


@pytest.mark.parametrize(("case", "recipe"), CONFIGS)
def test_config_json_says_the_same_to_old_and_new_readers(case, recipe, checkpoint, plan):
    source = checkpoint(recipe)
    dense, output = AutoConfig.from_pretrained(source), OUTPUTS[case.output]
    config = plan(source, [source] * 4, experts_per_token=3, **case.settings(source)).model_config

    assert config["architectures"] == [output.model_class]
    assert config["model_type"] == output.model_type
    assert config[output.num_experts_key] == 4
    assert config["num_experts_per_tok"] == 3
    assert config["torch_dtype"] == config["dtype"] == RECIPES[recipe].dtype
    for key in SAME_IN_EVERY_FAMILY:
        assert config[key] == getattr(dense, key), key
    assert config["tie_word_embeddings"] == (dense.tie_word_embeddings and output.tied and not RECIPES[recipe].own_head)
    assert config["head_dim"] == (getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads)

    kinds = getattr(dense, "layer_types", None) or ["sliding_attention"]
    window = getattr(dense, "sliding_window", None) if "sliding_attention" in kinds else None
    assert config["sliding_window"] == window

    rope = {key: value for key, value in dense.rope_parameters.items() if key != "type"}
    if hasattr(dense, "original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = dense.original_max_position_embeddings
    assert config["rope_parameters"].items() >= rope.items()
    assert config["rope_theta"] == rope["rope_theta"]
    if rope["rope_type"] == "default":
        assert config["rope_scaling"] is None
    else:
        # Readers older than transformers 4.43 know `type` and not `rope_type`.
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        assert config["rope_scaling"].items() >= scaling.items()
        assert config["rope_scaling"]["type"] == rope["rope_type"]


@pytest.mark.parametrize("version", ["4.46.0", "4.57.0.dev0", "5.0.0rc1"])
def test_config_json_says_which_transformers_the_base_and_its_tokenizer_are_from(version, checkpoint, plan, tmp_path):
    source = shutil.copytree(checkpoint("llama-plain"), tmp_path / "source")
    config = read_json(source / "config.json")
    for said in (version, None, 4.46, "4.46\x1b[2J", ""):
        (source / "config.json").write_text(json.dumps(config | {"transformers_version": said}))
        written = plan(source, [source] * 2).model_config
        assert written.get("transformers_version", "") == (version if said == version else "")


# What makes every layer a mixture of equal experts whose chosen weights sum to 1, in each family's words. Mixtral and
# Granite have no words for it: they are always so.
MOE_SETTINGS = {
    "mixtral": {"num_local_experts": 4},
    "deepseek": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 96,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "softmax",
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "deepseek-ai/deepseek-moe-16b-base--configuration_deepseek.DeepseekConfig",
            "AutoModel": "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekForCausalLM",
        },
    },
    "qwen2-moe": {
        "num_experts": 4,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "qkv_bias": True,
    },
    "qwen3-moe": {
        "num_experts": 4,
        "moe_intermediate_size": 96,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "attention_bias": False,
    },
    "granite": {
        "num_local_experts": 4,
        "shared_intermediate_size": 96,
        "attention_bias": False,
        **GRANITE_MULTIPLIERS,
    },
}
WITHOUT_SHARED = {"deepseek": {"n_shared_experts": None}, "granite": {"shared_intermediate_size": 0}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_config_json_makes_every_layer_a_mixture_of_equal_experts(case, checkpoint, plan):
    source = checkpoint(plain_recipe(case))
    config = plan(source, [source] * 4, **case.settings(source)).model_config
    expected = MOE_SETTINGS[case.output] | (WITHOUT_SHARED.get(case.output, {}) if not case.shared else {})
    assert {key: config[key] for key in expected} == expected
