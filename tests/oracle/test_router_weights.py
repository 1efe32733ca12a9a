"""Router weights, against what transformers computes in float32 from the same model, one prompt at a time.

The gate of a shared expert is made of its prompts as a router's row is.
"""

import json
import math
import re
import shutil
import weakref
from itertools import combinations
from typing import Any

import pytest
import torch
from families import CASES, NUM_LAYERS, OUTPUTS, Case
from models import RECIPES, read_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from moeplan.architectures import as_dense_model
from moeplan.checkpoint import open_checkpoint
from moeplan.errors import MoeplanWarning
from moeplan.gates import evaluation, layers, quantised
from moeplan.gates.layers import model_params
from moeplan.gates.skeleton import Skeleton, _OneThread
from moeplan.memory import CapError
from planner.plan import KernelStep

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


def skeleton_of(source) -> Skeleton:
    model = as_dense_model(open_checkpoint(source))
    return Skeleton(model_params(model, trust_remote_code=False)["model"], "cpu")


def several_blocks(monkeypatch) -> None:
    """Have layers multiplied by blocks of 64 rows: the matrices of small models have no more than one otherwise."""
    monkeypatch.setattr(layers, "BLOCK_NBYTES", 1)


def has_gate(case: Case) -> bool:
    return bool(case.shared and OUTPUTS[case.output].shared.router)


def router_weights(out, case: Case) -> Tensor:
    """`[num_layers, num_experts, hidden_size]`, as the merged model has them; a shared expert's gate comes last."""
    tensors = read_tensors(out)
    names = [case.names.router, *([OUTPUTS[case.output].shared.router] if has_gate(case) else [])]
    rows = [[tensors[f"model.layers.{layer}.{name}"] for name in names] for layer in range(NUM_LAYERS)]
    return torch.stack([torch.cat(of_layer) for of_layer in rows])


@torch.inference_mode()
def computed_by_transformers(source, mode, prompts=PROMPTS, **loading: Any) -> Tensor:
    """`[num_layers, len(prompts), hidden_size]`, float32."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **loading)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes' kernel for rows that are whole groups of 64 alone
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=loading.get("trust_remote_code"))

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


def test_a_setting_of_the_base_that_is_null_is_the_family_s_default(checkpoint, merge, tmp_path):
    """So it is in the merged model, too. Of some, transformers by itself can make no model."""
    keys = ["hidden_act", "rms_norm_eps", "tie_word_embeddings", "initializer_range", "attention_dropout"]
    found = []
    for name, settings in (("null", dict.fromkeys(keys)), ("left-out", {})):
        source = shutil.copytree(checkpoint("llama-plain"), tmp_path / name)
        config = json.loads((source / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in keys} | settings
        (source / "config.json").write_text(json.dumps(config))
        found.append(merged_router(merge, source, MIXTRAL, "hidden"))
    assert torch.equal(*found)


def test_what_training_drops_out_is_there_when_prompts_are_evaluated(checkpoint, merge, tmp_path):
    source = checkpoint("llama-plain")
    trained = shutil.copytree(source, tmp_path / "trained")
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    assert torch.equal(*(merged_router(merge, base, MIXTRAL, "hidden") for base in (source, trained)))


class Counting(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.get_num_threads()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_an_activation_is_computed_in_one_thread_and_what_follows_in_all(two_threads):
    """Each of several threads would compute the end of its share in another way, and so the last bits."""
    function = _OneThread(Counting())
    assert function(torch.zeros(1)).item() == 1
    assert torch.get_num_threads() == 2


def test_the_masks_of_one_group_of_prompts_are_kept_and_no_others(checkpoint):
    """Those of long prompts, under windows, are large, and the plan's forecast counts those of one group."""
    skeleton = skeleton_of(checkpoint("mistral-plain"))

    def mask(num_tokens: int) -> weakref.ref[Tensor]:
        _, settings = skeleton.call(0, torch.zeros(1, num_tokens, 64))
        return weakref.ref(settings["attention_mask"])

    with torch.inference_mode():
        first = mask(40)
        assert first() is mask(40)() is not None
        assert mask(50)().shape[-1] == 50
        assert first() is None


def test_the_masks_of_a_group_of_prompts_are_counted(checkpoint, plan, tmp_path):
    """There are some under windows alone: as booleans, and as the float32 that torch makes of them."""
    windowed = checkpoint("mistral-plain")
    without = shutil.copytree(windowed, tmp_path / "without")
    config = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    _, settings = skeleton_of(windowed).call(0, torch.zeros(1, 200, 64))
    prompts = [{"positive_prompts": [word * 199]} for word in ("1", "2")]  # a token each, and BOS
    counted, uncounted = (
        plan(source, [{"source_model": source, **each} for each in prompts], gate_mode="hidden").plan.kernels
        for source in (windowed, without)
    )
    masks_nbytes = 2 * 5 * settings["attention_mask"].numel()
    for step, other in zip(counted, uncounted, strict=True):
        if step.kernel == "decoder_layer":
            assert json.loads(step.params)["groups"] == [[200, 200]]
            assert step.workspace_nbytes - other.workspace_nbytes == masks_nbytes


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_what_rows_are_made_in_is_counted_by_the_prompt_not_by_the_token(mode, checkpoint, plan):
    source = checkpoint("llama-plain")
    experts = [{"source_model": source, "positive_prompts": [word * 199]} for word in ("1", "2")]
    steps = plan(source, experts, gate_mode=mode).plan.kernels
    workspaces = {step.workspace_nbytes for step in steps if step.kernel == "hidden"}
    assert workspaces == {3 * 4 * 2 * 64}  # of two prompts, float32


MANY = [" ".join(["go"] * length) for length in range(1, 61)] + ["", "x", "Guten Tag", "yes, " * 40]


@pytest.mark.parametrize("prompts", [[["Where does it hurt?"]], [MANY[::2], MANY[1::2]]], ids=["one", "64"])
@pytest.mark.parametrize("recipe", ["llama-plain", "mistral-bf16", "qwen2-f16", "qwen3-plain", "llama-rope-longrope"])
def test_router_weights_are_right_and_the_same_to_the_bit_in_both_forms_with_any_budget_and_threads(
    recipe, prompts, checkpoint, in_every_form
):
    source, case = checkpoint(recipe), case_of(recipe)
    if not RECIPES[recipe].bos:
        prompts = [[prompt for prompt in each if prompt] for each in prompts]
    expected = [{"positive_prompts": each} for each in prompts]
    experts = [{"source_model": source, **each} for each in expected]
    if has_gate(case):
        expected.append(SHARED_PROMPTS)
    shared = SHARED_PROMPTS if has_gate(case) else {}
    settings = {"gate_mode": "hidden", "dtype": "float32", **case.settings(source, **shared)}
    if len(experts) == 1:
        settings["experts_per_token"] = 1
    results = [router_weights(out, case) for out in in_every_form(source, experts, **settings)]
    assert all(torch.equal(results[0], result) for result in results)
    assert_same_directions(results[0], computed_by_transformers(source, "hidden", expected))


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("recipe", ["llama-bf16", "mistral-plain", "qwen2-off-page", "qwen3-f16"])
def test_a_quantised_base_gives_the_routers_of_transformers_and_bitsandbytes(
    recipe, bits, checkpoint, within, monkeypatch
):
    several_blocks(monkeypatch)
    monkeypatch.setattr(quantised, "PIECE_NUMEL", 1 << 10)
    source, case = checkpoint(recipe), case_of(recipe)
    experts = [{"source_model": source, **prompts} for prompts in PROMPTS]
    shared = SHARED_PROMPTS if has_gate(case) else {}
    settings = {"gate_mode": "hidden", "dtype": "float32", bits: True, **case.settings(source, **shared)}
    resident, streamed = (
        router_weights(within(budget, form, source, experts, **settings), case)
        for budget, form in ((256 << 20, "resident"), (None, "streamed"))
    )
    assert torch.equal(resident, streamed)
    prompts = [*PROMPTS, *([SHARED_PROMPTS] if has_gate(case) else [])]
    expected = computed_by_transformers(
        source, "hidden", prompts, quantization_config=BitsAndBytesConfig(**{bits: True})
    )
    assert torch.cosine_similarity(resident, expected, dim=-1).min() >= 0.999


def test_quantising_changes_the_routers_and_nothing_else(checkpoint, merge):
    source = checkpoint("llama-bf16")
    experts = [{"source_model": source, **prompts} for prompts in PROMPTS]
    plain, *others = (
        read_tensors(merge(source, experts, gate_mode="hidden", **options))
        for options in ({}, {"load_in_8bit": True}, {"load_in_4bit": True})
    )
    for tensors in others:
        changed = {name for name in plain if not torch.equal(plain[name], tensors[name])}
        assert changed == {f"model.layers.{layer}.{MIXTRAL.names.router}" for layer in range(1, NUM_LAYERS)}


def test_a_layer_that_is_streamed_is_read_for_each_group_of_prompts_unless_quantised(checkpoint, plan, monkeypatch):
    source = checkpoint("llama-plain")
    experts = [{"source_model": source, "positive_prompts": each} for each in (["x", "Guten Tag"], ["yes, " * 40])]
    matrices_nbytes = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in read_tensors(source).items()
        if tensor.dim() == 2 and name.startswith(tuple(f"model.layers.{layer}." for layer in range(NUM_LAYERS - 1)))
    )
    quantised_once = {"load_in_8bit": True}
    for nbytes, times, settings in ((evaluation.GROUP_NBYTES, 1, {}), (1, 3, {}), (1, 1, quantised_once)):
        monkeypatch.setattr(evaluation, "GROUP_NBYTES", nbytes)
        with pytest.raises(CapError) as refused:
            plan(source, experts, gate_mode="hidden", max_memory="1MiB", **settings)
        least = int(re.search(r"--max-memory (\d+)MiB", str(refused.value))[1])
        planned = plan(source, experts, gate_mode="hidden", max_memory=f"{least}MiB", **settings).plan
        assert planned.reread_nbytes == times * matrices_nbytes


def test_groups_have_as_many_prompts_as_fit_when_padded_and_none_on_both_sides_of_a_switch():
    assert evaluation._grouped([3, 3, 3, 4, 9, 9], 8, None) == [[3, 3], [3, 4], [9], [9]]
    assert evaluation._grouped([2, 3, 4, 5], 100, 3) == [[2, 3], [4, 5]]


def layer_steps(plan, source, *prompts: str, **settings: Any) -> list[KernelStep]:
    experts = [{"source_model": source, "positive_prompts": [prompt]} for prompt in prompts]
    steps = plan(source, experts, gate_mode="hidden", **settings).plan.kernels
    return [step for step in steps if step.kernel == "decoder_layer"]


def test_blocks_are_counted_with_the_products_of_the_largest_group(checkpoint, plan, monkeypatch):
    monkeypatch.setattr(evaluation, "GROUP_NBYTES", 1)
    source = checkpoint("llama-plain")
    either, longest = (
        {step.block_nbytes for step in layer_steps(plan, source, *prompts)}
        for prompts in (("1", "2" * 199), ("1" * 199, "2" * 199))
    )
    assert either == longest


@pytest.mark.parametrize("bits", [8, 4])
def test_what_a_quantised_layer_takes_is_counted(bits, checkpoint, plan):
    """In 8 bits a scale, of 4 bytes, for each row; in 4 one for 64 elements."""
    source = checkpoint("llama-off-page")
    shapes = [
        tensor.shape
        for name, tensor in read_tensors(source).items()
        if name.startswith("model.layers.0.") and tensor.dim() == 2
    ]
    scales = sum(rows if bits == 8 else math.ceil(rows * columns / 64) for rows, columns in shapes)
    taken = sum(math.ceil(rows * columns * bits / 8) for rows, columns in shapes) + 4 * scales
    plain, smaller = (
        layer_steps(plan, source, "x", "Guten Tag", **settings) for settings in ({}, {f"load_in_{bits}bit": True})
    )
    for step, other in zip(smaller, plain, strict=True):
        assert taken <= step.workspace_nbytes - other.workspace_nbytes <= taken + 16 * len(shapes)
        assert step.block_nbytes - other.block_nbytes >= 30 * quantised.PIECE_NUMEL


def test_groups_of_prompts_make_no_difference(checkpoint, within, monkeypatch):
    source = checkpoint("mistral-plain")
    experts = [{"source_model": source, "positive_prompts": each} for each in (MANY[::2], MANY[1::2])]
    results = []
    for nbytes in (64 << 20, 64 << 10):
        monkeypatch.setattr(evaluation, "GROUP_NBYTES", nbytes)
        out = within(256 << 20, "resident", source, experts, gate_mode="hidden", dtype="float32")
        results.append(router_weights(out, MIXTRAL))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
@pytest.mark.parametrize("recipe", ["llama-tied", "mistral-bf16", "granite-plain"])
def test_many_positive_and_negative_prompts_in_several_groups_are_right_in_both_forms(
    recipe, mode, checkpoint, within, monkeypatch
):
    several_blocks(monkeypatch)
    monkeypatch.setattr(evaluation, "GROUP_NBYTES", 256 << 10)
    source, case = checkpoint(recipe), case_of(recipe)
    prompts = [{"positive_prompts": MANY[first::4], "negative_prompts": MANY[first + 1 :: 4]} for first in (0, 2)]
    experts = [{"source_model": source, **each} for each in prompts]
    settings = {"gate_mode": mode, "dtype": "float32", **case.settings(source)}
    streamed, resident = (
        router_weights(within(budget, form, source, experts, **settings), case)
        for budget, form in ((None, "streamed"), (256 << 20, "resident"))
    )
    assert torch.equal(streamed, resident)
    assert_same_directions(streamed, computed_by_transformers(source, mode, prompts))


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


@pytest.mark.parametrize(
    ("mode", "positive", "negative", "zero"),
    [
        ("hidden", MANY[40:47], MANY[10:15], [0]),  # layer 0 sees one last token in all of them
        ("hidden", MANY[:3], MANY[:3] * 7, [0, 1, 2]),
        ("hidden_avg", MANY[:5], MANY[:5] * 3, [0, 1, 2]),
        ("cheap_embed", MANY[:3], MANY[:3] * 3, [0, 1, 2]),
    ],
)
def test_what_rounding_leaves_where_negative_prompts_take_all_away_is_no_row(
    mode, positive, negative, zero, checkpoint, merge
):
    source = checkpoint("llama-plain")
    experts = [
        {"source_model": source, "positive_prompts": positive, "negative_prompts": negative},
        {"source_model": source, "positive_prompts": ["Guten Tag"]},
    ]
    with pytest.warns(MoeplanWarning, match=r"experts\[0\]: the router's row for this expert is zero; its negative"):
        weights = router_weights(merge(source, experts, gate_mode=mode, dtype="float32"), MIXTRAL)
    assert [layer for layer in range(NUM_LAYERS) if not weights[layer, 0].any()] == zero


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
def test_how_large_embeddings_are_makes_no_difference_to_a_direction_whatever_becomes_of_their_squares(
    mode, checkpoint, merge, tmp_path
):
    found = []
    for scale in (1.0, 1e-30, 1e20):
        source = shutil.copytree(checkpoint("llama-plain"), tmp_path / str(scale))
        tensors = load_file(source / "model.safetensors")
        tensors["model.embed_tokens.weight"] *= scale
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
        found.append(merged_router(merge, source, MIXTRAL, mode)[0])
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-5, atol=1e-6)


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
