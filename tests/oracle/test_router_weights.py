"""Router weights, against what transformers computes in float32 from the same model, one prompt at a time.

The gate of a shared expert is made of its prompts as a router's row is.
"""

from itertools import combinations

import pytest
import torch
from families import CASES, NUM_LAYERS, OUTPUTS, Case
from models import RECIPES, read_tensors
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    {"positive_prompts": ["Where does it hurt, and since when?"], "negative_prompts": ["a sword"]},
    {"positive_prompts": ["x", "You draw your sword, light a torch and go down into the dragon's cave"]},
    {"positive_prompts": ["I can help with that."], "negative_prompts": ["I cannot", "As I said before, no"]},
    {
        "positive_prompts": ["Der Zug fährt bald ab", "Ich möchte gern ein Brötchen kaufen.", "Guten Tag"],
        "negative_prompts": ["Good evening", "I would like to buy a bread roll; does this train go to Munich"],
    },
]
MIXTRAL = Case("mixtral", "llama", "separate", 0)

SHARED_PROMPTS = {
    "positive_prompts": ["As a doctor of medicine,", "Listen."],
    "negative_prompts": ["The adventurer drew a sword, and the dragon was asleep"],
}


def case_of(recipe: str) -> Case:
    """The first way to merge models of this recipe."""
    return next(case for case in CASES if case.source == RECIPES[recipe].family)


def has_gate(case: Case) -> bool:
    return bool(case.shared and OUTPUTS[case.output].shared.router)


def router_weights(out, case: Case) -> Tensor:
    """`[num_layers, num_experts, hidden_size]`, as the merged model has them; a shared expert's gate comes last."""
    tensors = read_tensors(out)
    names = [case.names.router, *([OUTPUTS[case.output].shared.router] if has_gate(case) else [])]
    rows = [[tensors[f"model.layers.{layer}.{name}"] for name in names] for layer in range(NUM_LAYERS)]
    return torch.stack([torch.cat(of_layer) for of_layer in rows])


@torch.inference_mode()
def computed_by_transformers(source, mode, prompts=PROMPTS) -> Tensor:
    """`[num_layers, len(prompts), hidden_size]`, float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)

    def tokens(prompt: str) -> Tensor:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return torch.tensor([[*bos, *ids]])

    def vector(prompt: str) -> Tensor:
        if mode == "cheap_embed":
            embedded = model.get_input_embeddings()(tokens(prompt))[0].sum(dim=0)
            return embedded.expand(model.config.num_hidden_layers, -1)
        *entering, _ = model(tokens(prompt), output_hidden_states=True).hidden_states
        entering = torch.cat(entering)  # [num_layers, num_tokens, hidden_size]
        return entering.mean(dim=1) if mode == "hidden_avg" else entering[:, -1]

    def over(prompts: list[str]) -> Tensor:
        mean = torch.stack([vector(prompt) for prompt in prompts]).mean(dim=0)
        return normalize(mean, dim=-1) if mode == "cheap_embed" else mean

    rows = []
    for expert in prompts:
        row = over(expert["positive_prompts"])
        if "negative_prompts" in expert:
            row = row - over(expert["negative_prompts"])
        rows.append(normalize(row, dim=-1))
    return torch.stack(rows, dim=1)


def assert_same_directions(weights: Tensor, expected: Tensor) -> None:
    assert weights.shape == expected.shape
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(weights.shape[:2]), rtol=0, atol=1e-3)
    assert torch.cosine_similarity(weights, expected, dim=-1).min() >= 0.9999


def merged_router(merge, source, case, mode, **settings) -> Tensor:
    """`[num_layers, num_experts, hidden_size]`, the shared expert's gate last where the family has one."""
    experts = [{"source_model": source, **prompts} for prompts in PROMPTS]
    shared = SHARED_PROMPTS if has_gate(case) else {}
    return router_weights(merge(source, experts, gate_mode=mode, **case.settings(source, **shared), **settings), case)


def expected_router(source, case, mode) -> Tensor:
    return computed_by_transformers(source, mode, [*PROMPTS, *([SHARED_PROMPTS] if has_gate(case) else [])])


@pytest.mark.parametrize("recipe", RECIPES)
def test_hidden_gates_are_the_hidden_states_of_the_base_model(recipe, checkpoint, merge):
    source, case = checkpoint(recipe), case_of(recipe)
    weights = merged_router(merge, source, case, "hidden", dtype="float32")
    assert_same_directions(weights, expected_router(source, case, "hidden"))


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
@pytest.mark.parametrize("case", [case for case in CASES if has_gate(case)], ids=str)
def test_the_gate_of_a_shared_expert_is_made_of_its_prompts(case, mode, checkpoint, merge):
    source = checkpoint(f"{case.source}-plain")
    weights = merged_router(merge, source, case, mode)
    assert weights.shape[1] == len(PROMPTS) + 1
    assert_same_directions(weights, expected_router(source, case, mode))


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden_last", "hidden_avg"])
@pytest.mark.parametrize(
    "recipe",
    [
        *("llama-sharded", "llama-tied", "llama-bf16", "mistral-plain", "mistral-f16"),
        *("qwen2-window", "qwen3-silent", "granite-plain", "granite-bf16"),
    ],
)
def test_gates_of_the_other_modes_are_what_transformers_computes(recipe, mode, checkpoint, merge):
    source, case = checkpoint(recipe), case_of(recipe)
    weights = merged_router(merge, source, case, mode, dtype="float32")
    assert_same_directions(weights, expected_router(source, case, mode))


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
@pytest.mark.parametrize(("recipe", "half_ulp"), [("llama-bf16", 2**-8), ("llama-f16", 2**-11)])
def test_gates_of_a_half_precision_model_are_float32_results_rounded(recipe, half_ulp, mode, checkpoint, merge):
    source = checkpoint(recipe)
    weights = merged_router(merge, source, MIXTRAL, mode).float()
    expected = computed_by_transformers(source, mode)
    torch.testing.assert_close(weights, expected, rtol=half_ulp, atol=1e-5)


def test_gates_come_from_the_base_model_whatever_the_experts_are(checkpoint, merge):
    base = checkpoint("llama-plain")
    experts = [{"source_model": checkpoint("llama-plain", seed), **prompts} for seed, prompts in enumerate(PROMPTS, 1)]
    weights = router_weights(merge(base, experts, gate_mode="hidden"), MIXTRAL)
    assert_same_directions(weights, computed_by_transformers(base, "hidden"))


def test_random_gates_are_standard_normal(checkpoint, merge):
    source = checkpoint("llama-plain")
    weights = router_weights(merge(source, [source] * 8, gate_mode="random"), MIXTRAL)
    assert weights.shape == (3, 8, 64)
    assert abs(weights.mean()) < 0.1
    assert abs(weights.std() - 1) < 0.1
    assert abs((weights.abs() < 1).float().mean() - 0.683) < 0.05  # a uniform distribution has 0.577 there


def test_uniform_random_gates_are_what_a_new_linear_layer_has(checkpoint, merge):
    source = checkpoint("llama-plain")
    weights = router_weights(merge(source, [source] * 8, gate_mode="uniform_random"), MIXTRAL)
    bound = 64**-0.5
    assert 0.99 * bound < weights.abs().max() <= bound
    assert abs(weights.mean()) < 0.1 * bound
    assert abs(weights.std() - bound / 3**0.5) < 0.03 * bound


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_random_gates_depend_on_the_seed_the_layer_and_the_expert(mode, checkpoint, merge):
    source = checkpoint("llama-plain")
    first, again, other = (
        router_weights(merge(source, [source] * 4, gate_mode=mode, random_seed=seed), MIXTRAL) for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    rows = torch.cat([first.flatten(0, 1), other.flatten(0, 1)])
    likeness = [torch.cosine_similarity(*pair, dim=0).abs() for pair in combinations(rows, 2)]
    assert max(likeness) < 0.6  # of 64 dimensions: independent rows are far from it
