"""`backbone: average`: all that is no MLP is the float32 mean over the experts, rounded once, and gates see it so."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from commands import moeplan, snapshot, write_config
from families import CASES, Case, expected_tensors, plain_recipe
from models import RECIPES, read_tensors
from safetensors.torch import save_file
from test_expert_bytes import assert_same_bits, merged_tensors
from test_router_weights import (
    PROMPTS,
    SHARED_PROMPTS,
    assert_same_directions,
    case_of,
    computed_by_transformers,
    has_gate,
    router_weights,
)
from torch import Tensor

import moeplan as api
from moeplan.memory import memory_cap

MIXTRAL = Case("mixtral", "llama", "separate", 0)
QWEN2_OF_LLAMA = Case("qwen2-moe", "llama", "separate", 1)

RECIPES_AVERAGED = [
    *((case, plain_recipe(case)) for case in CASES),
    *((MIXTRAL, f"llama-{name}") for name in ("sharded", "off-page", "f16", "bf16", "tied", "old")),
    *((QWEN2_OF_LLAMA, f"llama-{name}") for name in ("wide-heads", "tied")),
    (Case("mixtral", "mistral", "packed", 0), "mistral-sharded"),
    (Case("qwen2-moe", "qwen2", "packed", 1), "qwen2-tied"),
    (Case("qwen3-moe", "qwen3", "separate", 0), "qwen3-tied"),
    (Case("granite", "granite", "packed", 1), "granite-bf16"),
]


def float32_mean(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return total / len(tensors)


def is_of_backbone(name: str) -> bool:
    return not any(part in name for part in (".mlp.", ".block_sparse_moe.", ".shared_mlp."))


def averaged(case: Case, base: Path, experts: Sequence[Path], shared: Path | None = None) -> dict[str, Tensor]:
    """As `expected_tensors`; what is no MLP is in float32. Models that stand several times are added up together."""
    tensors = expected_tensors(case, base, experts, shared)
    together = sorted(experts, key=list(experts).index)
    each = [expected_tensors(case, expert, experts, shared) for expert in together]
    for of in each:  # what is tied to the embeddings is the embeddings
        of.setdefault("lm_head.weight", of["model.embed_tokens.weight"])
    means = {name: float32_mean([of[name] for of in each]) for name in tensors if is_of_backbone(name)}
    return tensors | means


@pytest.mark.parametrize(("case", "recipe"), RECIPES_AVERAGED, ids=lambda value: str(value))
def test_the_backbone_is_the_float32_mean_over_the_experts_rounded(case, recipe, checkpoint, merge):
    base, shared, *experts = (checkpoint(recipe, seed) for seed in range(5))
    out = merge(base, experts, backbone="average", **case.settings(shared))
    dtype = getattr(torch, RECIPES[recipe].dtype)
    expected = {name: tensor.to(dtype) for name, tensor in averaged(case, base, experts, shared).items()}
    assert_same_bits(merged_tensors(out, case), expected)
    base_s = read_tensors(base)
    assert not any(torch.equal(t, base_s[name]) for name, t in expected.items() if name in base_s and t.any())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_experts_of_other_dtypes_and_several_of_one_model_are_averaged_in_float32(dtype, checkpoint, merge):
    base = checkpoint("llama-plain")
    names = [("llama-sharded", 1), ("llama-f16", 2), ("llama-bf16", 3), ("llama-sharded", 1)]
    experts = [checkpoint(*name) for name in names]
    tensors = merged_tensors(merge(base, experts, backbone="average", dtype=dtype))
    expected = averaged(MIXTRAL, base, experts)
    assert_same_bits(tensors, {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()})
    together = [read_tensors(experts[number]) for number in (0, 3, 1, 2)]
    for name in filter(is_of_backbone, expected):
        assert torch.equal(expected[name], torch.stack([of[name].float() for of in together]).mean(dim=0))


@pytest.mark.parametrize(
    ("case", "base", "experts"),
    [
        (MIXTRAL, "llama-plain", ("llama-plain", "llama-tied")),
        (MIXTRAL, "llama-plain", ("llama-tied", "llama-tied")),
        (QWEN2_OF_LLAMA, "llama-tied", ("llama-plain", "llama-tied")),
        (QWEN2_OF_LLAMA, "llama-plain", ("llama-tied", "llama-tied")),
    ],
    ids=str,
)
def test_the_output_matrix_of_an_expert_that_ties_it_is_its_embeddings(case, base, experts, checkpoint, merge):
    base, *experts = (checkpoint(recipe, seed) for seed, recipe in enumerate((base, *experts)))
    out = merge(base, experts, backbone="average", **case.settings(base))
    assert_same_bits(merged_tensors(out, case), averaged(case, base, experts, base))


@pytest.mark.parametrize("recipe", ["llama-plain", "llama-tied-own-head"])
def test_an_output_matrix_that_is_stored_is_averaged_though_the_base_ties_its_own(recipe, checkpoint, merge):
    """And though the expert's config ties it: transformers 5 takes it for the model's own, unless it equals the
    embeddings."""
    expert, tied = checkpoint(recipe, 1), checkpoint("llama-tied", 2)
    out = merge(checkpoint("llama-tied"), [expert, tied], backbone="average")
    own, embeddings = read_tensors(expert)["lm_head.weight"], read_tensors(tied)["model.embed_tokens.weight"]
    assert torch.equal(read_tensors(out)["lm_head.weight"], float32_mean([own, embeddings]))
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("recipe", ["llama-plain", "llama-tied", "mistral-sharded", "qwen2-bf16", "granite-off-page"])
def test_the_mean_over_one_model_is_that_model_byte_for_byte(recipe, checkpoint, merge):
    base, case = checkpoint(recipe), case_of(recipe)
    outs = [merge(base, [base] * 3, backbone=backbone, **case.settings(base)) for backbone in ("base", "average")]
    shards = [{file.name: file.read_bytes() for file in out.glob("*.safetensors*")} for out in outs]
    assert shards[0] == shards[1]


def test_by_default_the_backbone_is_the_base_s(checkpoint, plan):
    base, expert = checkpoint("llama-plain"), checkpoint("llama-plain", 1)
    assert plan(base, [base, expert]).plan == plan(base, [base, expert], backbone="base").plan


@pytest.mark.parametrize("mode", ["random", "hidden"])
def test_each_expert_is_read_once_and_the_base_for_gates_alone(mode, checkpoint, plan):
    base, *experts = (checkpoint("llama-bf16", seed) for seed in range(4))
    entries = [{"source_model": path, "positive_prompts": [path.name]} for path in experts]
    planned = plan(base, entries, gate_mode=mode, backbone="average").plan
    evaluated = [t for name, t in read_tensors(base).items() if ".mlp." in name and ".layers.2." not in name]
    wanted = [tensor for expert in experts for tensor in read_tensors(expert).values()]
    wanted += evaluated if mode == "hidden" else []
    assert planned.read_nbytes == sum(tensor.nbytes for tensor in wanted)
    assert planned.reread_nbytes == 0


def test_a_merge_is_the_same_under_any_memory_cap_and_in_shards(checkpoint, merge):
    base, *experts = (checkpoint("llama-bf16", seed) for seed in range(5))
    entries = [{"source_model": path, **prompts} for path, prompts in zip(experts, PROMPTS, strict=True)]
    process = memory_cap(None, ("torch", "moeplan.gates.skeleton")).process_nbytes
    outs = [
        merge(base, entries, gate_mode="hidden_avg", backbone="average", max_memory=process + (mib << 20))
        for mib in (24, 64, 1024)
    ]
    first, *others = ((out / "model.safetensors").read_bytes() for out in outs)
    assert all(other == first for other in others)
    sharded = merge(base, entries, gate_mode="hidden_avg", backbone="average", out_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert_same_bits(read_tensors(sharded), read_tensors(outs[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_is_killed_goes_on_to_the_same_bytes_and_is_verified(dtype, checkpoint, tmp_path):
    base, *experts = (checkpoint("llama-plain", seed) for seed in range(3))
    settings = {"backbone": "average", "gate_mode": "hidden", "dtype": dtype}
    config = api.load_config(write_config(tmp_path / "config.yml", base, experts, **settings))
    api.merge(config, tmp_path / "whole")
    nbytes = api.plan(config).plan.written_nbytes

    for number, share in enumerate((0.0, 0.3, 0.6, 0.9)):

        def kill(state, share=share):
            if state.written_nbytes >= share * nbytes and not state.doing:
                os.kill(os.getpid(), signal.SIGKILL)

        out = tmp_path / f"out {number}"
        child = os.fork()
        if child == 0:
            try:
                api.merge(config, out, on_progress=kill)
            finally:
                os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not (out / "config.json").exists()
        api.merge(config, out)
        assert snapshot(out) == snapshot(tmp_path / "whole")
    assert moeplan("verify", out).status == 0


def dense_with_mean_of(case: Case, base: Path, experts: Sequence[Path], dtype: str, path: Path) -> Path:
    """A dense model, in float32, of the base's MLPs and the mean over the experts of all else, rounded to `dtype`."""
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor.float() for name, tensor in read_tensors(base).items()}
    means = averaged(case, base, experts)
    tensors |= {name: means[name].to(getattr(torch, dtype)).float() for name in tensors if is_of_backbone(name)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return path


GATED = ["llama-plain", "llama-tied", "mistral-bf16", "qwen2-f16", "qwen3-plain", "granite-off-page"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
@pytest.mark.parametrize("recipe", GATED)
def test_hidden_gates_are_the_hidden_states_of_the_base_with_the_rounded_mean_for_a_backbone_in_both_forms(
    recipe, mode, dtype, checkpoint, within, tmp_path
):
    base, *experts = (checkpoint(recipe, seed) for seed in range(len(PROMPTS) + 1))
    case = case_of(recipe)
    dense = dense_with_mean_of(case, base, experts, dtype, tmp_path / "dense")
    entries = [{"source_model": expert, **prompts} for expert, prompts in zip(experts, PROMPTS, strict=True)]
    shared = SHARED_PROMPTS if has_gate(case) else {}
    settings = {"gate_mode": mode, "dtype": dtype, **case.settings(base, **shared)}
    resident, streamed = (
        router_weights(within(budget, form, base, entries, backbone="average", **settings), case)
        for budget, form in ((256 << 20, "resident"), (None, "streamed"))
    )
    assert torch.equal(resident, streamed)
    of_dense = router_weights(within(256 << 20, "resident", dense, entries, **settings), case)
    assert torch.equal(resident, of_dense)
    expected = computed_by_transformers(dense, mode, [*PROMPTS, *([SHARED_PROMPTS] if has_gate(case) else [])])
    assert_same_directions(resident.float(), expected)
    of_base = router_weights(within(256 << 20, "resident", base, entries, **settings), case)
    assert torch.cosine_similarity(of_base.float(), expected, dim=-1).min() < 0.9


@pytest.mark.parametrize("recipe", GATED)
def test_cheap_embeddings_are_rows_of_the_rounded_mean(recipe, checkpoint, merge, tmp_path):
    base, *experts = (checkpoint(recipe, seed) for seed in range(len(PROMPTS) + 1))
    case = case_of(recipe)
    dense = dense_with_mean_of(case, base, experts, "float16", tmp_path / "dense")
    entries = [{"source_model": expert, **prompts} for expert, prompts in zip(experts, PROMPTS, strict=True)]
    shared = SHARED_PROMPTS if has_gate(case) else {}
    settings = {"gate_mode": "cheap_embed", "dtype": "float16", **case.settings(base, **shared)}
    weights = router_weights(merge(base, entries, backbone="average", **settings), case)
    assert torch.equal(weights, router_weights(merge(dense, entries, **settings), case))
    prompts = [*PROMPTS, *([SHARED_PROMPTS] if has_gate(case) else [])]
    assert_same_directions(weights.float(), computed_by_transformers(dense, "cheap_embed", prompts))


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantised_base_has_the_mean_quantised(bits, checkpoint, within, tmp_path):
    base, *experts = (checkpoint("llama-bf16", seed) for seed in range(len(PROMPTS) + 1))
    dense = dense_with_mean_of(MIXTRAL, base, experts, "bfloat16", tmp_path / "dense")
    entries = [{"source_model": expert, **prompts} for expert, prompts in zip(experts, PROMPTS, strict=True)]
    settings = {"gate_mode": "hidden", "dtype": "bfloat16", bits: True}
    resident, streamed = (
        router_weights(within(budget, form, base, entries, backbone="average", **settings), MIXTRAL)
        for budget, form in ((256 << 20, "resident"), (None, "streamed"))
    )
    assert torch.equal(resident, streamed)
    of_dense = within(256 << 20, "resident", dense, entries, **settings)
    assert torch.equal(resident, router_weights(of_dense, MIXTRAL))


def test_plan_and_card_say_what_the_backbone_is(checkpoint, tmp_path):
    base, *experts = (checkpoint("llama-plain", seed) for seed in range(3))
    config = write_config(tmp_path / "config.yml", base, experts, backbone="average")
    line = "        attention, norms and embeddings: the mean over 2 experts\n"
    assert line in moeplan(config, "--plan").stdout
    assert json.loads(moeplan(config, "--plan", "--json").stdout)["plan"]["backbone"] == "average"
    assert moeplan(config, tmp_path / "averaged").status == 0
    assert "embeddings are the mean over the experts', and" in (tmp_path / "averaged" / "README.md").read_text()
    identity = json.loads((tmp_path / "averaged" / "moeplan.json").read_text())["made_from"]
    assert identity["config"]["backbone"] == "average"

    config = write_config(tmp_path / "config.yml", base, experts)
    assert "mean" not in moeplan(config, "--plan").stdout
    assert moeplan(config, tmp_path / "plain").status == 0
    assert "embeddings are the base's, and" in (tmp_path / "plain" / "README.md").read_text()
