"""llama.cpp's own converter takes what moeplan writes, and llama.cpp computes what transformers does.

Every expert is the base model, so the dense model's logits are expected (the oracle of `tests/oracle`). Weights of the
chosen experts must sum to 1 for that, and llama.cpp leaves those of DeepSeek and Qwen2 MoE as they are: there, all
experts are chosen. What llama.cpp cannot do stands in docs/compatibility.md; each has a test here, so that a newer
llama.cpp that can shows.
"""

import json

import matrix
import pytest
from families import CASES, OUTPUTS
from matrix import LLAMA3, Limit, Matrix, is_first, named
from reading import NUM_TOKENS, ReaderError, error_of, logits_here, relative_error, some_tokens
from transformers import AutoConfig

NUM_EXPERTS = 4
TOLERANCE = 1e-3
NOT_NORMALISED = ("deepseek", "qwen2-moe")

LIMITS = [
    Limit(tuple(OUTPUTS), ("gelu",)),  # its experts are always SiLU
    Limit(("deepseek",), ("rope-old-linear",)),
    Limit(("mixtral",), ("rope-longrope",)),
    Limit(("qwen2-moe", "qwen3-moe"), LLAMA3),
    Limit(("granite",), LLAMA3, "Missing <MODEL_TENSOR.ROPE_FREQS"),
    Limit(("qwen2-moe", "granite"), ("wide-heads",), "attn_q.weight' has wrong shape"),
]
REFUSED_LAYOUTS = [case for case in CASES if case.output == "mixtral" and case.layout == "packed"]
WITHOUT_SHARED = [case for case in CASES if case.output == "deepseek" and not case.shared]
TAKEN = [case for case in CASES if case not in REFUSED_LAYOUTS + WITHOUT_SHARED]
MATRIX = Matrix(TAKEN, LIMITS)


def merge_copies(merge, source, case, **settings):
    """`matrix.merge_copies`, so that the weights of the chosen experts sum to 1."""
    settings.setdefault("experts_per_token", NUM_EXPERTS if case.output in NOT_NORMALISED else 2)
    return matrix.merge_copies(merge, source, case, NUM_EXPERTS, **settings)


@pytest.mark.parametrize(("case", "recipe"), MATRIX.right)
def test_llama_cpp_computes_the_dense_model_s_logits(case, recipe, gpt2_checkpoint, merge, llama_cpp):
    source = gpt2_checkpoint(recipe)
    window = getattr(AutoConfig.from_pretrained(source), "sliding_window", None)
    error = error_of(llama_cpp, merge_copies(merge, source, case), source, min(window or NUM_TOKENS, NUM_TOKENS))
    assert error <= TOLERANCE


@pytest.mark.parametrize("case", [case for case in TAKEN if case.output != "deepseek"], ids=str)
def test_llama_cpp_mixes_distinct_experts_as_transformers_does(case, gpt2_checkpoint, merge, llama_cpp):
    recipe = "mistral-no-window" if case.source == "mistral" else f"{case.source}-plain"
    base, shared, *experts = (gpt2_checkpoint(recipe, seed) for seed in range(NUM_EXPERTS + 2))
    experts_per_token = NUM_EXPERTS if case.output in NOT_NORMALISED else 2
    out = merge(base, experts, experts_per_token=experts_per_token, **case.settings(shared))
    tokens = some_tokens(base)
    assert relative_error(llama_cpp.logits(out, tokens), logits_here(out, tokens)) <= TOLERANCE


@pytest.mark.parametrize(("case", "recipe", "limit"), MATRIX.limited)
def test_what_llama_cpp_cannot_do_is_refused_or_wrong(case, recipe, limit, gpt2_checkpoint, merge, llama_cpp):
    source = gpt2_checkpoint(recipe)
    limit.check(llama_cpp, merge_copies(merge, source, case), source, 10 * TOLERANCE)


@pytest.mark.parametrize("case", WITHOUT_SHARED, ids=str)
def test_llama_cpp_s_converter_refuses_a_deepseek_moe_without_shared_expert(case, gpt2_checkpoint, merge, llama_cpp):
    source = gpt2_checkpoint("mistral-no-window" if case.source == "mistral" else "llama-plain")
    with pytest.raises(ReaderError, match="required argument is not an integer"):
        llama_cpp.logits(merge_copies(merge, source, case), some_tokens(source))


@pytest.mark.parametrize("case", REFUSED_LAYOUTS, ids=str)
def test_llama_cpp_s_converter_refuses_the_packed_layout_of_mixtral(case, gpt2_checkpoint, merge, llama_cpp):
    source = gpt2_checkpoint(f"{case.source}-plain")
    with pytest.raises(ReaderError, match=r"Can not map tensor 'model.layers.0.mlp.experts"):
        llama_cpp.logits(merge_copies(merge, source, case), some_tokens(source))


@pytest.mark.parametrize("case", [case for case in TAKEN if is_first(case) and case.output in NOT_NORMALISED], ids=str)
def test_llama_cpp_does_not_normalise_the_weights_of_the_chosen_experts(case, gpt2_checkpoint, merge, llama_cpp):
    source = gpt2_checkpoint("mistral-no-window" if case.source == "mistral" else f"{case.source}-plain")
    assert error_of(llama_cpp, merge_copies(merge, source, case, experts_per_token=2), source) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "recipe"),
    [
        named(case, f"{case.source}-{variant}")
        for case in TAKEN
        for source, variant in (("mistral", "plain"), ("qwen2", "window"), ("qwen3", "window"))
        if is_first(case) and case.source == source and case.output != "deepseek"
    ],
)
def test_llama_cpp_ignores_sliding_windows(case, recipe, gpt2_checkpoint, merge, llama_cpp):
    source = gpt2_checkpoint(recipe)
    assert error_of(llama_cpp, merge_copies(merge, source, case), source) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "case", [case for case in TAKEN if is_first(case) and case.source in ("llama", "granite")], ids=str
)
def test_llama_cpp_s_converter_takes_sentencepiece_tokenizers_but_not_in_qwen2_moe(
    case, sentencepiece_checkpoint, merge, llama_cpp
):
    source = sentencepiece_checkpoint(f"{case.source}-plain")
    out = merge_copies(merge, source, case)
    if case.output == "qwen2-moe":
        with pytest.raises(ReaderError, match="BPE pre-tokenizer was not recognized"):
            llama_cpp.logits(out, some_tokens(source))
    else:
        assert error_of(llama_cpp, out, source) <= TOLERANCE


def test_llama_cpp_s_converter_refuses_a_byte_level_tokenizer_that_it_does_not_know(gpt2_checkpoint, merge, llama_cpp):
    out = merge_copies(merge, gpt2_checkpoint("llama-plain"), TAKEN[0])
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ReaderError, match="BPE pre-tokenizer was not recognized"):
        llama_cpp.logits(out, some_tokens(out))
