"""Which output family a merge is written as, what a family refuses, and that nothing was left to another's defaults."""

import json
import shutil
from dataclasses import fields
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import pytest
from families import CASES, OUTPUTS, Case, plain_recipe
from models import LLAMA3_SCALING, RECIPES
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.activations import ACT2FN

from moeplan import gates
from moeplan.architectures import DENSE_FAMILIES, FAMILIES, as_dense_model, attention
from moeplan.architectures.setting_values import ACTIVATIONS
from moeplan.checkpoint import open_checkpoint
from moeplan.errors import UserError
from moeplan.lowering import Lowering
from moeplan.places import CheckpointError
from moeplan.report_data import plan_data
from planner.errors import BudgetError
from planner.schedule import compile as compile_plan

ROOT = Path(__file__).parents[2]
PROMPTS = {"positive_prompts": ["a prompt"], "negative_prompts": ["another"]}


def shared(source, **more):
    return {"shared_experts": [{"source_model": source, **more}]}


def prompted(source, count=2):
    return [{"source_model": source, "positive_prompts": [f"prompt {n}"]} for n in range(count)]


def refusal(plan, path, **settings) -> str:
    with pytest.raises(UserError) as error:
        plan(path, prompted(path), **settings)
    return str(error.value).replace(str(path), "PATH")


# ------------------------------------------------------------------------------------------- which family it will be


@pytest.mark.parametrize(
    ("source", "architecture", "family"),
    [
        ("llama", "mixtral", "Mixtral"),
        ("llama", "Mixtral", "Mixtral"),
        ("llama", "MIX", "Mixtral"),
        ("mistral", "m", "Mixtral"),
        ("llama", "deepseek", "DeepSeek MoE"),
        ("llama", "DeepSeek MoE", "DeepSeek MoE"),
        ("llama", "deep", "DeepSeek MoE"),
        ("llama", "DeepSeek_MoE", "DeepSeek MoE"),
        ("llama", "deepseek-m", "DeepSeek MoE"),
        ("qwen3", "qwen3_moe", "Qwen3 MoE"),
        ("qwen3", "qwen3", "Qwen3 MoE"),
        ("qwen3", "Qwen3 MoE", "Qwen3 MoE"),
        ("qwen3", "qwen", "Qwen3 MoE"),  # a prefix of both Qwens' names: the one that fits
        ("granite", "granite", "Granite MoE"),
    ],
)
def test_a_family_is_chosen_by_its_name_or_the_beginning_of_it(source, architecture, family, checkpoint, plan):
    path = checkpoint(f"{source}-no-window" if source == "mistral" else f"{source}-plain")
    assert plan(path, [path] * 2, architecture=architecture).family.name == family


@pytest.mark.parametrize(
    "architecture", ["qwen", "Qwen MoE", "QWEN MOE", "qwen2", "Qwen2 MoE", "qwen2_moe", "qwen-moe"]
)
@pytest.mark.parametrize("source", ["llama", "qwen2"])
def test_qwen2_moe_goes_by_the_name_that_mergekit_gives_it_too(source, architecture, checkpoint, plan):
    path = checkpoint(f"{source}-plain")
    assert plan(path, [path] * 2, architecture=architecture, **shared(path)).family.name == "Qwen2 MoE"


@pytest.mark.parametrize("architecture", ["oqwen", "moe", "mixtral 8x7b", "Mixtral_8x7B", "qwen2__moe", " "])
def test_what_is_no_beginning_of_a_name_is_refused_with_all_names(architecture, checkpoint, plan):
    path = checkpoint("llama-plain")
    message = refusal(plan, path, architecture=architecture)
    assert f"architecture: there is no output family {architecture!r}; there are Mixtral, DeepSeek MoE, " in message


def test_every_family_can_be_named_and_no_name_is_another_s():
    names = [name.lower() for family in FAMILIES for name in family.names]
    assert len(set(names)) == len(names)
    assert not [(a, b) for a in names for b in names if a != b and a.startswith(b)]


INFERRED = [
    # sources, shared expert, gate mode: the family, the others that would fit
    ("llama-plain", None, "random", "Mixtral", ["DeepSeek MoE"]),
    ("llama-plain", {}, "random", "DeepSeek MoE", ["Qwen2 MoE"]),
    ("llama-plain", {}, "cheap_embed", "DeepSeek MoE", []),
    ("llama-plain", PROMPTS, "cheap_embed", "Qwen2 MoE", []),
    ("llama-plain", PROMPTS, "uniform_random", "Qwen2 MoE", []),
    ("mistral-no-window", None, "random", "Mixtral", ["DeepSeek MoE"]),
    # What DeepSeek has not is left to those that have it.
    ("mistral-plain", None, "random", "Mixtral", []),
    ("mistral-plain", {}, "random", "Qwen2 MoE", []),
    ("llama-wide-heads", {}, "random", "Qwen2 MoE", []),
    ("llama-rope-new-llama3", {}, "random", "Qwen2 MoE", []),
    ("qwen2-plain", {}, "random", "Qwen2 MoE", []),
    ("qwen2-plain", PROMPTS, "cheap_embed", "Qwen2 MoE", []),
    ("qwen3-plain", None, "random", "Qwen3 MoE", []),
    ("granite-plain", None, "random", "Granite MoE", []),
    ("granite-plain", {}, "cheap_embed", "Granite MoE", []),
]


@pytest.mark.parametrize(("recipe", "shared_expert", "mode", "family", "others"), INFERRED)
def test_without_a_name_the_family_follows_from_sources_and_shared_expert(
    recipe, shared_expert, mode, family, others, checkpoint, plan
):
    path = checkpoint(recipe)
    settings = {} if shared_expert is None else shared(path, **shared_expert)
    merge_plan = plan(path, prompted(path), gate_mode=mode, **settings)
    assert merge_plan.family.name == family
    assert [other.name for other in merge_plan.alternatives] == others
    assert plan_data(merge_plan, None)["would_fit_too"] == others


def test_where_no_family_fits_a_table_says_what_to_change_for_each(checkpoint, plan):
    path = checkpoint("qwen3-plain")
    message = refusal(plan, path, gate_mode="cheap_embed", **shared(path))
    where, *table = message.splitlines()
    assert where.endswith("experts: no output family fits these models:")
    assert len(table) == len(FAMILIES)
    assert {
        "  Mixtral              is made of llama, mistral models, and PATH is qwen3",
        "  DeepSeek MoE         is made of llama, mistral models, and PATH is qwen3",
        "  Qwen2 MoE            is made of llama, mistral, qwen2 models, and PATH is qwen3",
        "  Qwen3 MoE            has no shared expert: remove shared_experts",
        "  Granite MoE          is made of granite models, and PATH is qwen3",
    } <= set(table)


@pytest.mark.parametrize(
    ("recipe", "shared_expert", "reasons"),
    [
        ("qwen2-plain", None, {"Qwen2 MoE": "needs a shared expert: add one under shared_experts"}),
        (
            "qwen2-plain",
            {"negative_prompts": ["x"]},
            {"Qwen2 MoE": "has a gate on its shared expert: give shared_experts[0] positive_prompts"},
        ),
        (
            "granite-plain",
            PROMPTS,
            {"Granite MoE": "has no gate on its shared expert: remove the prompts of shared_experts[0]"},
        ),
        # Each can be had by another change.
        (
            "mistral-plain",
            {},
            {
                "Mixtral": "has no shared expert: remove shared_experts",
                "DeepSeek MoE": "PATH/config.json: attention has a sliding window of 8 tokens, and DeepSeek MoE has no",
                "Qwen2 MoE": "has a gate on its shared expert: give shared_experts[0] positive_prompts",
            },
        ),
    ],
)
def test_the_table_says_what_each_family_lacks_or_needs(recipe, shared_expert, reasons, checkpoint, plan):
    path = checkpoint(recipe)
    settings = {} if shared_expert is None else shared(path, **shared_expert)
    table = refusal(plan, path, gate_mode="cheap_embed", **settings).splitlines()[1:]
    assert len(table) == len(FAMILIES)
    for name, reason in reasons.items():
        assert [line for line in table if line.startswith(f"  {name:<20} {reason}")], table


def test_only_the_named_families_are_explained(checkpoint, plan):
    path = checkpoint("llama-plain")
    table = refusal(plan, path, gate_mode="cheap_embed", architecture="qwen", **shared(path)).splitlines()[1:]
    assert [line.split("  ")[1] for line in table] == ["Qwen2 MoE", "Qwen3 MoE"]


def test_more_than_one_shared_expert_is_refused(checkpoint, plan):
    path = checkpoint("llama-plain")
    both = {"shared_experts": [{"source_model": path}, {"source_model": path}]}
    assert "shared_experts[1]: only one shared expert can be built" in refusal(plan, path, **both)


# ------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    ("case", "layout", "has"),
    [
        (Case("deepseek", "llama", "packed", 0), "packed", "DeepSeek MoE has no layout 'packed'; it has separate"),
        (Case("granite", "granite", "separate", 0), "separate", "Granite MoE has no layout 'separate'; it has packed"),
    ],
    ids=str,
)
def test_a_layout_that_the_family_lacks_is_refused_with_those_it_has(case, layout, has, checkpoint, plan):
    path = checkpoint(plain_recipe(case))
    assert refusal(plan, path, **case.settings(path)) == f"--expert-layout: {has}"


@pytest.mark.parametrize("name", OUTPUTS)
def test_without_a_layout_it_is_the_family_s_first(name, checkpoint, plan):
    output = OUTPUTS[name]
    path = checkpoint(f"{output.sources[0]}-plain")
    settings = shared(path) if output.shared_experts[0] else {}
    assert plan(path, [path] * 2, architecture=output.architecture, **settings).layout == next(iter(output.layouts))


@pytest.fixture
def large_llama(tmp_path):
    """A Llama of a billion parameters: true headers before a hole of the right size, which takes no space."""
    path = tmp_path / "large"
    path.mkdir()
    config = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    (path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    sizes = {**DENSE_FAMILIES["llama"].defaults, **config, "q_size": 2048, "kv_size": 2048}
    shapes = {
        spec.name.format(layer=layer): [sizes[size] for size in spec.shape]
        for spec in DENSE_FAMILIES["llama"].tensors
        for layer in range(16)
    }
    ends = list(accumulate((2 * prod(shape) for shape in shapes.values()), initial=0))
    header = json.dumps(
        {
            name: {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
            for (name, shape), offsets in zip(shapes.items(), pairwise(ends), strict=True)
        }
    ).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + ends[-1])
    return path


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2 moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packed_needs_no_more_memory_than_separate(architecture, dtype, large_llama, configure, plan):
    settings = {"architecture": architecture, "dtype": dtype}
    if architecture != "mixtral":
        settings |= shared(large_llama, noise_scale=0.1)
    experts = [{"source_model": large_llama, "noise_scale": 0.1 * (n % 2)} for n in range(8)]
    config, _ = configure(large_llama, experts, **settings)
    merge_plan = plan(large_llama, experts, **settings)
    base = gates.Base(merge_plan.sources.base)
    request = gates.GateRequest("random", base, config.experts, config.shared_experts)
    graphs = {
        layout: Lowering(
            config=config,
            family=merge_plan.family,
            sources=merge_plan.sources,
            routers=gates.gate_mode("random").routers(request),
            dtype=merge_plan.dtype,
            layout=layout,
            seed=0,
        ).graph()
        for layout in ("separate", "packed")
    }

    def smallest_budget(layout) -> int:
        with pytest.raises(BudgetError) as error:
            compile_plan(graphs[layout], budget_nbytes=0, shard_nbytes=10**10)
        return error.value.needed_nbytes

    smallest = smallest_budget("separate")
    assert smallest_budget("packed") == smallest
    for budget in (smallest, 64 << 20, 1 << 30):
        separate, packed = (
            compile_plan(graphs[layout], budget_nbytes=budget, shard_nbytes=10**10) for layout in graphs
        )
        assert packed.peak_nbytes == separate.peak_nbytes <= budget
        assert packed.read_nbytes == separate.read_nbytes
        assert packed.reread_nbytes == separate.reread_nbytes == 0


def test_an_output_matrix_of_its_own_is_read_once_with_the_embeddings(checkpoint, plan):
    tied, untied = checkpoint("qwen2-tied"), checkpoint("qwen2-plain")
    embedding_nbytes = 384 * 64 * 4
    plans = {path: plan(path, [path] * 2, **shared(path)).plan for path in (tied, untied)}
    assert plans[tied].read_nbytes == plans[untied].read_nbytes - embedding_nbytes
    assert plans[tied].written_nbytes == pytest.approx(plans[untied].written_nbytes, abs=8192)  # headers' padding
    assert plans[tied].reread_nbytes == 0


# --------------------------------------------------------------------------------------- what a family cannot hold

BIASES = "cannot hold .*bias.*, and without it the merged model would compute something else"
REFUSED = [
    ("mistral-plain", "deepseek", "a sliding window of 8 tokens, and DeepSeek MoE has none"),
    ("mistral-default-window", "deepseek", "a sliding window of 4096 tokens, and DeepSeek MoE has none"),
    ("llama-rope-old-llama3", "deepseek", "type 'llama3', and DeepSeek MoE has only default, linear, dynamic"),
    ("llama-rope-new-yarn", "deepseek", "type 'yarn', and DeepSeek MoE has only default, linear, dynamic"),
    ("llama-wide-heads", "deepseek", r"heads are 24 wide, .* always hidden_size / num_attention_heads = 16"),
    ("mistral-mixed-window", "mixtral", "some layers have a sliding window and some have none, and Mixtral has one"),
    (
        "mistral-mixed-window",
        "qwen2-moe",
        "some layers have a sliding window and some have none, and Qwen2 MoE has one",
    ),
    ("qwen2-mixed-window", "qwen2-moe", "some layers have a sliding window and some have none, and Qwen2 MoE has one"),
    ("qwen3-mixed-window", "qwen3-moe", "some layers have a sliding window and some have none, and Qwen3 MoE has one"),
    *(("llama-attention-bias", output, BIASES) for output in ("mixtral", "deepseek", "qwen2-moe")),
    *(("llama-mlp-bias", output, BIASES) for output in ("mixtral", "deepseek", "qwen2-moe")),
    ("qwen3-attention-bias", "qwen3-moe", BIASES),
    ("granite-attention-bias", "granite", BIASES),
    ("granite-mlp-bias", "granite", BIASES),
]


@pytest.mark.parametrize(("recipe", "output", "message"), REFUSED)
def test_what_a_family_cannot_hold_is_refused_not_dropped(recipe, output, message, checkpoint, plan):
    path = checkpoint(recipe)
    case = next(case for case in CASES if case.output == output)
    with pytest.raises(UserError, match=message):
        plan(path, [path] * 2, **case.settings(path))


@pytest.mark.parametrize(
    ("recipe", "off"),
    [
        ("mistral-window-by-layer", {"sliding_window": None}),
        ("qwen3-window-by-layer", {"sliding_window": None}),
        ("qwen3-window-by-layer", {"use_sliding_window": False}),
    ],
)
def test_layers_that_are_to_have_a_window_where_none_is_in_force_are_refused(recipe, off, checkpoint, plan, tmp_path):
    path = shutil.copytree(checkpoint(recipe), tmp_path / "source")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512, **off}))
    case = next(case for case in CASES if case.source == RECIPES[recipe].family)
    message = "config.json: layer_types names sliding_attention, and no sliding window is in force; remove layer_types"
    with pytest.raises(UserError, match=message):
        plan(path, [path] * 2, **case.settings(path))
    whole = checkpoint(recipe)
    experts = [*prompted(whole, 1), {"source_model": path, "positive_samples": 1}]
    with pytest.raises(UserError, match=f"{message}.*passages are drawn from the whole model"):
        plan(whole, experts, **case.settings(whole), gate_mode="ridge")


def test_what_turns_a_window_off_says_what_else_must_go(checkpoint, plan):
    path = checkpoint("mistral-window-by-layer")
    with pytest.raises(UserError, match="set sliding_window to null and remove layer_types there"):
        plan(path, [path] * 2, architecture="deepseek")


@pytest.mark.parametrize("output", ["deepseek", "qwen2-moe"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_biases_of_another_model_s_mlps_are_refused_wherever_it_is_used(is_shared, output, checkpoint, plan):
    path, biased = checkpoint("llama-plain"), checkpoint("llama-mlp-bias")
    case = next(case for case in CASES if case.output == output)
    expert, shared_expert = (path, biased) if is_shared else (biased, path)
    with pytest.raises(UserError, match=rf"llama-mlp-bias-0: .*{BIASES}"):
        plan(path, [path, expert], **case.settings(shared_expert))


# ---------------------------------------------------------------------------------- defaults, against transformers' own


def own_fields(model_type):
    """What a configuration class of transformers has beside what all have: each setting with its default."""
    common = {field.name for field in fields(PretrainedConfig)}
    own = fields(type(AutoConfig.for_model(model_type)))
    return {field.name: field.default for field in own if field.name not in common}


# Biases are seen in the tensors; RoPE is compared by itself; pretraining_tp splits one computation into equal ones.
NOT_DEFAULTS = {"attention_bias", "mlp_bias", "rope_parameters", "pretraining_tp"}


@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_a_dense_family_s_defaults_are_those_of_transformers(model_type):
    ours, theirs = DENSE_FAMILIES[model_type].defaults, own_fields(model_type)
    assert {key: ours[key] for key in theirs if key not in NOT_DEFAULTS} == {
        key: default for key, default in theirs.items() if key not in NOT_DEFAULTS
    }
    assert ours["rope_theta"] == AutoConfig.for_model(model_type).rope_parameters["rope_theta"]
    # A class without head_dim has heads of hidden_size / num_attention_heads, unless config.json says otherwise.
    # Mistral's has no layer_types: with them, a model is a Ministral.
    assert ours.keys() - theirs.keys() <= {"rope_theta", "head_dim", "layer_types", "tokenizer_class"}
    assert "head_dim" in theirs or ours["head_dim"] is None


# Understood by all classes, or by readers other than transformers 5. Attention layers read head_dim in every family.
WRITTEN_FOR_ALL = {
    *("architectures", "model_type", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters"),
    *("head_dim", "sliding_window", "tokenizer_class", "transformers_version"),
}
# Read only where there is a sliding window; they are written then.
OF_WINDOWS = {"max_window_layers", "layer_types"}


def settings_of(source: Path) -> tuple[object, ...]:
    model = as_dense_model(open_checkpoint(source))
    return model.settings, attention.rope(model), model.windows()


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_no_setting_of_a_source_is_taken_whatever_it_is(family, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint(f"{family}-plain"), tmp_path / "source")
    config = {"model_type": family, "use_sliding_window": True, "sliding_window": 8}
    for key in DENSE_FAMILIES[family].defaults:
        (source / "config.json").write_text(json.dumps({**config, key: {"a": 1}}))
        with pytest.raises(CheckpointError, match=f"config.json: `?{key}`? is {{'a': 1}}; it must be"):
            settings_of(source)


def test_activations_are_those_of_transformers():
    assert frozenset(ACT2FN) == ACTIVATIONS


def test_a_rope_parameter_that_is_null_is_as_one_that_is_not_there(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("llama-rope-longrope"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config[attention.ORIGINAL_CONTEXT]
    nulls = {attention.ORIGINAL_CONTEXT: None, "rope_theta": None, "factor": None}
    (source / "config.json").write_text(json.dumps(config))
    found = settings_of(source)[1]
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": config["rope_scaling"] | nulls}))
    assert settings_of(source)[1] == found


def test_a_null_that_transformers_takes_for_false_is_written_as_false(checkpoint, merge, tmp_path):
    source = shutil.copytree(checkpoint("llama-rope-new-yarn"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"]["truncate"] = None
    (source / "config.json").write_text(json.dumps(config))
    dense, moe = (
        AutoModel.from_config(AutoConfig.from_pretrained(path)) for path in (source, merge(source, [source] * 2))
    )
    assert moe.rotary_emb.inv_freq.equal(dense.rotary_emb.inv_freq)


ROPE_TAKES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    "llama3": {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_type"},
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind in ROPE_TAKES for key in ROPE_TAKES[kind]])
def test_rope_scaling_without_something_that_it_takes_is_refused(kind, key, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("llama-plain"), tmp_path / "source")
    whole = {"rope_type": kind, **ROPE_TAKES[kind]}
    config = {"model_type": "llama", "head_dim": 16, "rope_scaling": whole}
    (source / "config.json").write_text(json.dumps(config))
    assert settings_of(source)[1][1].items() >= whole.items()
    del whole[key]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"RoPE scaling of type '{kind}' has no {key}"):
        settings_of(source)


PARTIAL = "partial_rotary_factor is 0.5; the merged model rotates whole heads"
DIFFERING = "rope parameters that differ between layers cannot be carried over"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"partial_rotary_factor": 0.5}, PARTIAL),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, PARTIAL),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, PARTIAL),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}}, DIFFERING),
        ({"rope_parameters": [{"rope_theta": 1e6}]}, DIFFERING),
        ({"rope_parameters": {"rope_type": "proportional"}}, "RoPE scaling of type 'proportional' cannot be held"),
        ({"rope_scaling": {"rope_type": "su", "type": "linear", "factor": 2.0}}, "RoPE scaling of type 'su' cannot be"),
    ],
)
def test_rope_that_no_merged_model_could_hold_is_refused(said, reason, checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("llama-plain"), tmp_path / "source")
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "head_dim": 16, **said}))
    with pytest.raises(CheckpointError, match=reason):
        settings_of(source)
    for other in ("1.0", "null") if reason is PARTIAL else ():
        whole = json.loads(json.dumps(said).replace("0.5", other))
        (source / "config.json").write_text(json.dumps({"model_type": "llama", "head_dim": 16, **whole}))
        assert "partial_rotary_factor" not in settings_of(source)[1][1]


@pytest.mark.parametrize(
    "said", [{}, {"original_max_position_embeddings": 24}, {"factor": 3}, {"attention_factor": 1.5, "factor": 3.0}]
)
def test_longrope_is_written_with_what_transformers_5_makes_of_what_is_not_said(said, checkpoint, plan, tmp_path):
    """transformers 4 goes by the context beside the scaling, and by its ratio to the whole rather than by a factor."""
    source = shutil.copytree(checkpoint("llama-rope-longrope"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["original_max_position_embeddings"]
    for more in (said, {**said, "original_max_position_embeddings": 16}):
        (source / "config.json").write_text(json.dumps(config | {"rope_scaling": config["rope_scaling"] | more}))
        dense = AutoModel.from_config(AutoConfig.from_pretrained(source))
        written = plan(source, [source] * 2, architecture="mixtral").model_config
        assert written["rope_scaling"]["attention_factor"] == dense.rotary_emb.attention_scaling
        context = more.get("original_max_position_embeddings", 256)
        assert written["original_max_position_embeddings"] == context
        assert written["rope_scaling"]["original_max_position_embeddings"] == context


@pytest.mark.parametrize("case", [case for case in CASES if case.output != "deepseek"], ids=str)
def test_no_setting_of_an_output_family_is_left_to_its_default_and_none_is_misspelt(case, checkpoint, plan):
    path = checkpoint(plain_recipe(case))
    written = plan(path, [path] * 2, **case.settings(path)).model_config
    known = own_fields(written["model_type"]).keys()
    assert known - written.keys() <= OF_WINDOWS
    assert written.keys() - known <= WRITTEN_FOR_ALL | OF_WINDOWS


@pytest.mark.parametrize(
    ("said", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({}, "float16"),
        ({"dtype": "auto"}, "float16"),
        ({"dtype": ["bfloat16"]}, "float16"),
    ],
)
def test_a_model_is_in_the_dtype_that_its_config_names_else_in_that_of_its_embeddings(
    said, dtype, checkpoint, plan, tmp_path
):
    source = shutil.copytree(checkpoint("llama-f16"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (source / "config.json").write_text(json.dumps(kept | said | {"tokenizer_class": "OwnTokenizer"}))
    written = plan(source, [source] * 2, architecture="deepseek").model_config
    assert written["dtype"] == dtype
    assert written["tokenizer_class"] == "OwnTokenizer"  # nor is that left to what the family has for others


@pytest.mark.parametrize("output", ["qwen2-moe", "qwen3-moe"])
def test_a_sliding_window_is_written_for_every_layer(output, checkpoint, plan):
    case = next(case for case in CASES if case.output == output and case.source in ("qwen2", "qwen3"))
    path = checkpoint(f"{case.source}-window")
    written = plan(path, [path] * 2, **case.settings(path)).model_config
    assert written["use_sliding_window"] is True
    assert written["sliding_window"] == 8
    assert written["layer_types"] == ["sliding_attention"] * 3
    assert written.get("max_window_layers", 0) == 0


def test_every_family_is_in_the_tests_table():
    assert [family.model_type for family in FAMILIES] == [output.model_type for output in OUTPUTS.values()]
    for family, output in zip(FAMILIES, OUTPUTS.values(), strict=True):
        assert [source.model_type for source in family.sources] == list(output.sources)
        assert list(family.layouts) == list(output.layouts)


# --------------------------------------------------------------------------------------------------------------- docs


def test_the_page_on_families_shows_granite_s_file_as_it_is_and_lists_every_family():
    page = (ROOT / "docs" / "families.md").read_text()
    shown = page.split("```python\n")[1].split("```")[0]
    assert (ROOT / "moeplan" / "architectures" / "granite_moe_shared.py").read_text().endswith(shown)
    for family in FAMILIES:
        assert f"\n| {family.name} | " in page
