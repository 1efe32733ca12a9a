"""The oracle: where every expert is the base model, the MoE computes what the dense model does.

An error in a name, a transposition, a RoPE setting or a default that a config leaves out shows in the logits.
"""

import pytest
import torch
from models import RECIPES, VOCAB_SIZE
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_moe_of_copies_computes_what_the_dense_model_does(recipe, checkpoint, merge):
    source = checkpoint(recipe)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    moe, loading = AutoModelForCausalLM.from_pretrained(
        merge(source, [source] * 4, experts_per_token=2),
        output_loading_info=True,
        dtype=torch.float32,
        experts_implementation="eager",  # the default, a grouped product, wants sizes that are multiples of 16 bytes
    )

    assert type(moe).__name__ == "MixtralForCausalLM"
    assert not any(loading.values()), loading

    beyond_any_window = (getattr(dense.config, "sliding_window", None) or 0) + 32
    tokens = torch.randint(VOCAB_SIZE, (1, beyond_any_window), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, logits = dense(tokens).logits, moe(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
