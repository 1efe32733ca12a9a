"""vLLM takes what moeplan writes, and computes what transformers does.

Every expert is the base model, so the dense model's logits are expected (the oracle of `tests/oracle`). What vLLM
cannot do stands in docs/compatibility.md; each has a test here, so that a newer vLLM that can shows.
"""

import pytest
from families import CASES, plain_recipe
from matrix import Limit, Matrix, merge_copies
from reading import ReaderError, error_of, logits_here, relative_error, some_tokens

TOLERANCE = 1e-4

LIMITS = [
    Limit(("mixtral", "qwen3-moe"), ("gelu",)),  # their experts are always SiLU
    Limit(("deepseek", "qwen2-moe", "granite"), ("gelu",), "Unsupported activation: gelu"),
    Limit(("qwen2-moe", "granite"), ("wide-heads",)),
    Limit(("mixtral",), ("rope-longrope",), "maximum context length is 24 tokens"),  # its original one
]
REFUSED_LAYOUTS = [case for case in CASES if case.output == "mixtral" and case.layout == "packed"]
TAKEN = [case for case in CASES if case not in REFUSED_LAYOUTS]
WINDOWED = [case for case in TAKEN if case.source == "mistral" and case.output != "deepseek"]
MATRIX = Matrix(TAKEN, LIMITS)


@pytest.mark.parametrize(("case", "recipe"), MATRIX.right)
def test_vllm_computes_the_dense_model_s_logits(case, recipe, wide_checkpoint, merge, vllm):
    source = wide_checkpoint(recipe)
    assert error_of(vllm, merge_copies(merge, source, case), source) <= TOLERANCE


@pytest.mark.parametrize("case", [case for case in TAKEN if case.output != "deepseek"], ids=str)
def test_vllm_mixes_distinct_experts_as_transformers_does(case, wide_checkpoint, merge, vllm):
    base, shared, *experts = (wide_checkpoint(plain_recipe(case), seed) for seed in range(6))
    out = merge(base, experts, **case.settings(shared))
    tokens = some_tokens(base)
    assert relative_error(vllm.logits(out, tokens), logits_here(out, tokens)) <= TOLERANCE


@pytest.mark.parametrize("case", WINDOWED, ids=str)
def test_vllm_heeds_the_sliding_window(case, wide_checkpoint, merge, vllm):
    source = wide_checkpoint("mistral-plain")
    out = merge_copies(merge, source, case)
    assert error_of(vllm, out, source) <= TOLERANCE
    assert error_of(vllm, out, wide_checkpoint("mistral-no-window")) > 10 * TOLERANCE


@pytest.mark.parametrize("case", [case for case in TAKEN if case.output == "deepseek"], ids=str)
def test_vllm_normalises_the_weight_of_a_single_expert_of_deepseek_moe(case, wide_checkpoint, merge, vllm):
    source = wide_checkpoint(plain_recipe(case))
    assert error_of(vllm, merge_copies(merge, source, case, experts_per_token=1), source) <= TOLERANCE


@pytest.mark.parametrize(("case", "recipe", "limit"), MATRIX.limited)
def test_what_vllm_cannot_do_is_refused_or_wrong(case, recipe, limit, wide_checkpoint, merge, vllm):
    source = wide_checkpoint(recipe)
    limit.check(vllm, merge_copies(merge, source, case), source, 100 * TOLERANCE)


def test_vllm_computes_the_experts_of_a_granite_moe_without_shared_expert_with_silu(wide_checkpoint, merge, vllm):
    (case,) = (case for case in TAKEN if case.output == "granite" and not case.shared)
    source = wide_checkpoint("granite-gelu")
    assert error_of(vllm, merge_copies(merge, source, case), source) > 100 * TOLERANCE


def test_vllm_computes_longrope_within_the_original_context(wide_checkpoint, merge, vllm):
    source = wide_checkpoint("llama-rope-longrope")
    assert error_of(vllm, merge_copies(merge, source, TAKEN[0]), source, num_tokens=23) <= TOLERANCE


@pytest.mark.parametrize("case", REFUSED_LAYOUTS, ids=str)
def test_vllm_refuses_the_packed_layout_of_mixtral(case, wide_checkpoint, merge, vllm):
    source = wide_checkpoint(f"{case.source}-plain")
    with pytest.raises(ReaderError, match=r"There is no module or parameter named 'layers\.0\.mlp'"):
        vllm.logits(merge_copies(merge, source, case), some_tokens(source))
