"""The newest transformers 4 loads the classic layouts strictly, and computes the dense model's logits."""

import pytest
from families import OUTPUTS, READABLE_CASES, recipes_of
from matrix import merge_copies
from reading import ReaderError, error_of, logits_here, relative_error, some_tokens

TOLERANCE = 1e-5
NOT_READ = [case for case in READABLE_CASES if case.layout == "packed" and "separate" in OUTPUTS[case.output].layouts]
READ = [case for case in READABLE_CASES if case not in NOT_READ]
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
