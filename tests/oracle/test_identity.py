"""The oracle: where every expert is the base model, the MoE computes what the dense model does.

An error in a name, a transposition, a RoPE setting or a default that a config leaves out shows in the logits. A shared
expert adds nothing here (`residual_scale: 0`); what it adds otherwise is checked in test_mixture.py.
"""

import pytest
import torch
from families import OUTPUTS, READABLE_CASES, Case, recipes_of
from models import VOCAB_SIZE
from transformers import AutoModelForCausalLM

# What a second layout, or a missing shared expert, could still get wrong where the first gets it right.
FEW = ("plain", "sharded", "tied", "f16", "wide-heads", "off-page")


def is_first(case: Case) -> bool:
    """Whether the case has the layout and the shared expert that its family's others differ from."""
    output = OUTPUTS[case.output]
    return case.layout == next(iter(output.layouts)) and case.shared == output.shared_experts[0]


ORACLE = [
    pytest.param(case, recipe, id=f"{case}-{recipe.removeprefix(case.source + '-')}")
    for case in READABLE_CASES
    for recipe in recipes_of(case.source)
    if is_first(case) or recipe.removeprefix(case.source + "-") in FEW
]


@pytest.mark.parametrize(("case", "recipe"), ORACLE)
def test_a_moe_of_copies_computes_what_the_dense_model_does(case, recipe, checkpoint, merge):
    source = checkpoint(recipe)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    moe, loading = AutoModelForCausalLM.from_pretrained(
        merge(source, [source] * 4, experts_per_token=2, **case.settings(source, residual_scale=0)),
        output_loading_info=True,
        dtype=torch.float32,
        experts_implementation="eager",  # the default, a grouped product, wants sizes that are multiples of 16 bytes
    )

    assert type(moe).__name__ == OUTPUTS[case.output].model_class
    assert not any(loading.values()), loading

    beyond_any_window_or_context = (getattr(dense.config, "sliding_window", None) or 0) + 80
    tokens = torch.randint(VOCAB_SIZE, (1, beyond_any_window_or_context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, logits = dense(tokens).logits, moe(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
