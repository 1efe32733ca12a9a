"""The newest transformers 4 loads the classic layouts strictly, and computes the dense model's logits."""

import json
import shutil
import subprocess

import pytest
from families import CASES, OUTPUTS, READABLE_CASES, plain_recipe, recipes_of
from matrix import merge_copies
from models import use_sentencepiece
from reading import ReaderError, error_of, logits_here, reader_python, relative_error, some_tokens
from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer

TOLERANCE = 1e-5
NOT_READ = [case for case in READABLE_CASES if case.layout == "packed" and "separate" in OUTPUTS[case.output].layouts]
READ = [case for case in READABLE_CASES if case not in NOT_READ]
OF_LLAMAS = [c for c in CASES if c.source in ("llama", "mistral") and c.layout == "separate"]
FIXED_HEADS = ("qwen2-moe", "granite")  # their heads are always hidden_size / num_attention_heads wide


def ids(value: object) -> str:
    return str(value)


def recipes_for(case, *, wide_heads):
    recipes = recipes_of(case.source)
    refused = [r for r in recipes if r.endswith("wide-heads") and case.output in FIXED_HEADS]
    return refused if wide_heads else [recipe for recipe in recipes if recipe not in refused]


@pytest.mark.parametrize(("case", "recipe"), [(c, r) for c in READ for r in recipes_for(c, wide_heads=False)], ids=ids)
def test_transformers_4_computes_the_dense_model_s_logits(case, recipe, checkpoint, merge, transformers4):
    source = checkpoint(recipe)
    out = merge_copies(merge, source, case)
    assert error_of(transformers4, out, source) <= TOLERANCE


@pytest.mark.parametrize("case", READ, ids=ids)
def test_transformers_4_mixes_distinct_experts_as_transformers_5_does(case, checkpoint, merge, transformers4):
    base, shared, *experts = (checkpoint(f"{case.source}-plain", seed) for seed in range(6))
    out = merge(base, experts, **case.settings(shared))
    tokens = some_tokens(out)
    assert relative_error(transformers4.logits(out, tokens), logits_here(out, tokens)) <= TOLERANCE


@pytest.mark.parametrize(("case", "recipe"), [(c, r) for c in READ for r in recipes_for(c, wide_heads=True)], ids=ids)
def test_transformers_4_refuses_heads_of_another_width_than_the_hidden_size_makes_them(
    case, recipe, checkpoint, merge, transformers4
):
    source = checkpoint(recipe)
    with pytest.raises(ReaderError, match=r"must be divisible by num_heads|size mismatch"):
        transformers4.logits(merge_copies(merge, source, case), some_tokens(source))


@pytest.mark.parametrize("case", NOT_READ, ids=ids)
def test_transformers_4_does_not_know_the_packed_layout(case, checkpoint, merge, transformers4):
    source = checkpoint(f"{case.source}-plain")
    with pytest.raises(ReaderError, match="missing_keys"):
        transformers4.logits(merge_copies(merge, source, case), some_tokens(source))


DEEPSEEK_CONFIG = """from transformers import PretrainedConfig
class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"
"""
ENCODE = """import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(tokenizer.encode(sys.argv[2], add_special_tokens=False))
"""


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("case", OF_LLAMAS, ids=ids)
def test_transformers_4_reads_the_tokenizer_of_a_base_that_names_no_class(case, kind, checkpoint, merge, tmp_path):
    source = shutil.copytree(checkpoint(plain_recipe(case)), tmp_path / "source")
    use_sentencepiece(source)
    expected = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    if kind == "tokenizer.json":
        LlamaTokenizer.from_pretrained(source).backend_tokenizer.save(str(source / kind))
        (source / "tokenizer.model").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out = merge(source, [source] * 2, **case.settings(source))
    if case.output == "deepseek":  # whose own configuration class is on the Hub
        config = json.loads((out / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
        (out / "config.json").write_text(json.dumps(config))
        (out / "configuration_deepseek.py").write_text(DEEPSEEK_CONFIG)
    text = "Ein Doktor  für den Brötchenbäcker"
    ran = subprocess.run([reader_python(), "-c", ENCODE, out, text], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == expected.encode(text)
