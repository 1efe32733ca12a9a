"""Sources that do not fit each other, the output family or their prompts: refused, or warned about, unwritten to."""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Outcome, moeplan, snapshot, write_config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import moeplan as api
from executor.engine import Progress
from executor.errors import RunError
from moeplan import merging, planning, record
from moeplan.gates import evaluation
from moeplan.memory import MemoryCap


def edit_config(path: Path, **changes: Any) -> None:
    """Change config.json; `...` removes a key."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def models(checkpoint, tmp_path) -> tuple[Path, Path]:
    """A base and another model of the same make, which a test may spoil."""
    paths = tmp_path / "base", tmp_path / "other"
    for seed, path in enumerate(paths):
        shutil.copytree(checkpoint("llama-plain", seed), path, copy_function=shutil.copy)
        edit_config(path, rope_theta=300.0, rope_parameters=...)
    return paths


@pytest.fixture
def refused(models, tmp_path) -> Callable[..., str]:
    """`refused(*options, prompt=..., **settings)`: the message that a merge of base and other is refused with.

    Tried with an output directory that is not there and with an empty one: both stay so.
    """

    def try_both(*options: str, prompt: str = "a prompt", **settings: Any) -> str:
        base, other = models
        experts = [base, {"source_model": other, "positive_prompts": [prompt]}]
        config = write_config(tmp_path / "config.yml", base, experts, **settings)
        empty = tmp_path / "empty"
        empty.mkdir(exist_ok=True)
        results = []
        for out in (tmp_path / "new" / "out", empty):
            before = snapshot(tmp_path)
            results.append(moeplan(config, out, *options))
            assert snapshot(tmp_path) == before
        assert {result.status for result in results} == {2}
        assert {result.stdout for result in results} == {""}
        assert "Traceback" not in results[0].stderr
        assert results[0].error == results[1].error
        return results[0].error.replace(f"{tmp_path}/", "")

    return try_both


def warned(outcome: Outcome) -> list[str]:
    assert outcome.status == 0, outcome.stderr
    return [line.removeprefix("warning: ") for line in outcome.stderr.splitlines() if line.startswith("warning: ")]


# ----------------------------------------------------------------------------------- sources that do not fit each other


@pytest.mark.parametrize(
    ("key", "value", "sides"),
    [
        ("hidden_size", 128, "hidden_size is 128 in other and 64 in the base base"),
        ("intermediate_size", 192, "intermediate_size is 192 in other and 96 in the base base"),
        ("num_hidden_layers", 2, "num_hidden_layers is 2 in other and 3 in the base base"),
        ("hidden_act", "gelu", "hidden_act is 'gelu' in other and 'silu' in the base base"),
    ],
)
def test_sizes_that_differ_are_refused_with_both_values(models, refused, key, value, sides):
    edit_config(models[1], **{key: value})
    assert refused() == f"config.yml:1: experts[1].source_model: {sides}; they must be equal"


def test_a_default_that_another_model_spells_out_otherwise_is_a_difference(models, refused):
    edit_config(models[1], intermediate_size=...)
    message = "intermediate_size is 11008 in other and 96 in the base base; they must be equal"
    assert refused() == f"config.yml:1: experts[1].source_model: {message}"


def test_models_of_two_families_are_refused(models, refused):
    edit_config(models[1], model_type="mistral")
    message = "other is a mistral model and the base base a llama model; all must be of one family"
    assert refused() == f"config.yml:1: experts[1].source_model: {message}"


def test_a_model_of_an_unknown_family_is_refused(models, refused):
    edit_config(models[0], model_type="gpt2")
    assert refused().startswith(
        "config.yml:1: base_model: base: models of type 'gpt2' cannot be merged; moeplan knows "
    )


def test_a_source_that_is_not_there_is_refused_at_its_line(models, refused):
    shutil.rmtree(models[1])
    assert refused().startswith("config.yml:1: experts[1].source_model: other: no such directory; ")


# ------------------------------------------------------------------------------- tensors that are missing or in excess


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("mode", ["random", "hidden"])
def test_a_tensor_that_is_missing_is_named(models, refused, which, mode):
    edit_tensors(models[which], lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    path = models[which].name
    assert refused(gate_mode=mode) == (
        f"{path}: there is no tensor model.layers.1.mlp.up_proj.weight, which a llama model has"
    )


@pytest.mark.parametrize("mode", ["random", "cheap_embed"])
def test_missing_embeddings_are_named(models, refused, mode):
    edit_tensors(models[0], lambda tensors: tensors.pop("model.embed_tokens.weight"))
    edit_config(models[0], dtype=..., torch_dtype=...)
    assert refused(gate_mode=mode) == ("base: there is no tensor model.embed_tokens.weight, which a llama model has")


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(models, refused):
    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.2.mlp.down_proj.weight"
        tensors[name] = tensors[name].T.contiguous()

    edit_tensors(models[1], transpose)
    assert refused() == (
        "other: model.layers.2.mlp.down_proj.weight has shape [96, 64], and config.json makes it [64, 96] "
        "(hidden_size × intermediate_size)"
    )


def test_a_base_without_an_output_matrix_is_refused_unless_the_embeddings_are_it(models, refused, tmp_path):
    edit_tensors(models[0], lambda tensors: tensors.pop("lm_head.weight"))
    assert refused() == (
        "base: there is no tensor lm_head.weight, and config.json does not tie it to the embeddings "
        "(tie_word_embeddings)"
    )
    edit_config(models[0], tie_word_embeddings=True)
    assert moeplan(tmp_path / "config.yml", "--plan").status == 0


@pytest.mark.parametrize(
    ("recipe", "which", "message"),
    [
        ("llama-attention-bias", 0, "'model.layers.0.self_attn.k_proj.bias' (and 11 more)"),
        ("llama-mlp-bias", 0, "'model.layers.0.mlp.down_proj.bias' (and 8 more)"),
        ("llama-mlp-bias", 1, "'model.layers.0.mlp.down_proj.bias' (and 8 more)"),
    ],
)
def test_biases_that_the_output_cannot_hold_are_refused_not_dropped(
    models, refused, checkpoint, recipe, which, message
):
    shutil.rmtree(models[which])
    shutil.copytree(checkpoint(recipe), models[which], copy_function=shutil.copy)
    assert refused() == (
        f"{models[which].name}: a Mixtral model cannot hold {message}, and without it the merged model would compute "
        "something else"
    )


def test_an_expert_s_attention_is_not_used_so_its_biases_do_no_harm(models, checkpoint, tmp_path):
    config = write_config(tmp_path / "config.yml", models[0], [models[0], checkpoint("llama-attention-bias")])
    assert warned(moeplan(config, tmp_path / "out")) == []


def test_tensor_names_cannot_reach_the_terminal_unescaped(models, refused):
    edit_tensors(models[0], lambda tensors: tensors.update({"\x1b]0;owned\x07": torch.zeros(1)}))
    assert r"cannot hold '\x1b]0;owned\x07', and" in refused()


# ------------------------------------------------------------------------------------------------- what the family is


def test_an_unknown_output_family_is_refused_with_those_that_there_are(refused):
    assert refused(architecture="switch").startswith(
        "config.yml:1: architecture: there is no output family 'switch'; there are Mixtral, "
    )


def test_a_family_that_the_sources_do_not_fit_is_refused_with_the_reason(models, refused):
    message = refused(architecture="Mixtral", shared_experts=[{"source_model": models[1]}])
    assert message.startswith("config.yml:1: experts: no output family fits these models:\n  Mixtral ")
    assert message.endswith("has no shared expert: remove shared_experts")


def test_an_expert_layout_that_the_family_lacks_is_refused(refused):
    message = refused("--expert-layout", "round")
    assert message == "--expert-layout: Mixtral has no layout 'round'; it has separate, packed"


# ------------------------------------------------------------------------------------------------------------ RoPE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "RoPE scaling of type 'su' cannot be held"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope parameters that differ between layers"),
        ({"rope_scaling": "linear"}, "rope parameters that differ between layers cannot be carried over"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; the merged model rotates whole heads"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; it must be a number above 0"),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a number above 0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0; it must be a number above 0"),
    ],
)
def test_rope_that_the_merged_model_would_compute_otherwise_is_refused(models, refused, changes, message):
    for path in models:
        edit_config(path, **changes)
    assert refused().startswith(f"base/config.json: {message}")


# ------------------------------------------------------------------------------------- prompts and the base's tokenizer


def test_prompts_need_a_tokenizer(models, refused):
    (models[0] / "tokenizer.json").unlink()
    assert refused(gate_mode="cheap_embed") == (
        "base: there is no tokenizer (tokenizer.json or tokenizer.model) to read text with; copy the model's "
        "tokenizer files there, or use gate_mode: random"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a JSON object but []"),
        ("{", "is not JSON"),
        ('{"a":' * 100_000, "is nested more than 64 levels deep"),
        ('{"bos_token": "<start>"}', "bos_token '<start>' is not a token of tokenizer.json"),
        ('{"bos_token": 1}', "bos_token is 1; it must be text, or null"),
    ],
)
def test_a_tokenizer_config_that_names_no_bos_token_of_the_tokenizer_is_refused(models, refused, content, message):
    (models[0] / "tokenizer_config.json").write_text(content)
    (models[0] / "special_tokens_map.json").unlink(missing_ok=True)
    assert refused(gate_mode="hidden").startswith(f"base/tokenizer_config.json: {message}")


def test_a_prompt_that_is_longer_than_the_context_is_refused(models, refused):
    message = refused(gate_mode="hidden", prompt="x" * 256)
    where = "config.yml:1: experts[1].positive_prompts[0]"
    assert message == f"{where}: the prompt '{'x' * 40}…' has 257 tokens, and the context of base is 256; shorten it"


def test_a_prompt_without_any_token_is_refused(models, refused):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (models[0] / name).unlink()
    edit_config(models[0], bos_token_id=None)
    message = refused(gate_mode="hidden", prompt="")
    where = "config.yml:1: experts[1].positive_prompts[0]"
    assert message == f"{where}: the prompt '' has no tokens, and the tokenizer of base has no BOS token"


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden"])
def test_an_empty_prompt_is_warned_about_with_its_place(models, tmp_path, mode):
    experts = [models[0], {"source_model": models[1], "positive_prompts": ["a prompt", ""], "negative_prompts": [""]}]
    config = write_config(tmp_path / "config.yml", models[0], experts, gate_mode=mode)
    assert warned(moeplan(config, "--plan")) == [
        f"{config}:1: experts[1].positive_prompts[1]: an empty prompt tells nothing: write text, or remove it "
        "(1 more is empty, too)"
    ]
    assert warned(moeplan(write_config(config, models[0], experts, gate_mode="random"), "--plan")) == []


@pytest.mark.parametrize("option", ["--load-in-8bit", "--load-in-4bit"])
def test_a_base_cannot_be_quantised_without_bitsandbytes(refused, monkeypatch, tmp_path, option):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    message = refused(option, gate_mode="hidden")
    assert message == f"{option}: bitsandbytes is not installed; pip install bitsandbytes, or leave the option out"
    elsewhere = ModuleSpec("bitsandbytes", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(evaluation, "find_spec", lambda name: elsewhere)
    assert "has no library for this machine's processor" in refused(option, gate_mode="hidden")


def test_how_a_base_would_be_evaluated_does_not_matter_where_none_is(models, configure, tmp_path, monkeypatch):
    """Nor does bitsandbytes have to be there. So a merge that was stopped is gone on with by any of these options."""
    versions = dict.fromkeys(record.PACKAGES, "1")
    monkeypatch.setattr(record, "version", versions.__getitem__)
    made_from = []
    for settings in ({}, {"load_in_8bit": True}, {"load_in_4bit": True, "device": "cuda"}):
        config, options = configure(models[0], list(models), **settings)
        identity = record.identity(api.plan(config, options=options))
        made_from.append(identity["option"] | identity["version of"])
    assert made_from[0] == made_from[1] == made_from[2]


def test_text_that_changed_tells_an_unfinished_merge_from_another(models, configure, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Where does it hurt?")
    experts = [{"source_model": str(path), "positive_files": [str(text)]} for path in models]
    experts[1]["positive_prompts"] = ["Draw your sword!"]
    found = []
    for mode in ("ridge", "ridge", "random"):
        config, options = configure(models[0], experts, gate_mode=mode)
        found.append(record.identity(api.plan(config, options=options))["text in"])
        text.write_text("Where does it hurt, and since when?")
    nbytes = [{name: state["nbytes"] for name, state in each.items()} for each in found]
    assert nbytes == [{str(text): 19}, {str(text): 35}, {}]


@pytest.mark.parametrize("is_trusted", [True, False])
def test_own_code_that_changed_tells_an_unfinished_merge_from_another_where_it_is_run(models, configure, is_trusted):
    code = models[0] / "modeling_own.py"
    experts = [{"source_model": str(path), "positive_prompts": [path.name]} for path in models]
    config, options = configure(models[0], experts, gate_mode="cheap_embed", trust_remote_code=is_trusted)
    found = []
    for text in ("one = 1", "one = 2"):
        code.write_text(text)
        found.append(record.identity(api.plan(config, options=options))["file"])
    assert (found[0] != found[1]) == is_trusted


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_source_of_the_same_size_time_and_header_is_told_from_another_by_its_weights(models, configure, part):
    config, options = configure(models[0], list(models))
    file = models[1] / "model.safetensors"
    status, data = file.stat(), bytearray(file.read_bytes())
    before = record.identity(api.plan(config, options=options))["source"]
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin + int((len(data) - begin - 1) * part)] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    now = record.identity(api.plan(config, options=options))["source"]
    assert [path for path in now if now[path] != before[path]] == [str(file)]


def test_a_source_that_cannot_be_read_is_named_before_the_merge_is_told_from_others(models, configure):
    config, options = configure(models[0], list(models))
    planned, file = api.plan(config, options=options), models[1] / "model.safetensors"
    file.unlink()
    file.symlink_to("/proc/self/mem")  # reading it is an I/O error
    with pytest.raises(RunError, match=f"^{file}: Input/output error$"):
        record.identity(planned)


def test_the_device_that_is_used_tells_an_unfinished_merge_from_another(models, configure):
    experts = [{"source_model": str(path), "positive_prompts": [path.name]} for path in models]
    config, options = configure(models[0], experts, gate_mode="hidden", device="auto")
    assert record.identity(api.plan(config, options=options))["option"]["--device"] == "cpu"


def test_a_merge_is_known_by_each_setting_as_it_counts_however_it_was_said(models, configure):
    experts = [{"source_model": str(path), "positive_prompts": [path.name]} for path in models]
    plain, same = (
        api.plan(config, options=options)
        for said in ({}, {"expert_layout": "separate", "dtype": None})
        for config, options in [configure(models[0], experts, gate_mode="hidden", **said)]
    )
    known = record.identity(plain)
    assert record.identity(same) == known
    assert known["config"]["experts[1].positive_prompts[0]"] == models[1].name
    quantised = replace(plain, options=replace(plain.options, load_in_8bit=True))
    assert record.identity(quantised)["option"] == known["option"] | {"--load-in-8bit": True}


def test_a_tokenizer_of_another_model_is_refused(models, refused):
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:50].clone()

    for path in models:
        edit_config(path, vocab_size=50)
        edit_tensors(path, shrink)
    assert re.fullmatch(
        r"config.yml:1: experts\[0\].positive_prompts\[0\]: the prompt '.*' has token \d+, and the embeddings of base "
        "have 50 rows; its tokenizer is of another model",
        refused(gate_mode="cheap_embed"),
    )


# -------------------------------------------------------------------------------- backbones that cannot be averaged

AVERAGED = ", since all that is not an MLP is averaged (backbone: average)"


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"vocab_size": 400}, "vocab_size is 400 in other and 384 in the base base"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
            "num_attention_heads is 8 in other and 4 in the base base",
        ),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4 in other and 2 in the base base"),
        ({"head_dim": 32}, "head_dim is 32 in other and 16 in the base base"),
    ],
)
def test_a_backbone_of_other_sizes_is_not_averaged(models, refused, tmp_path, changes, sides):
    edit_config(models[1], **changes)
    message = refused(backbone="average")
    assert message == f"config.yml:1: experts[1].source_model: {sides}; they must be equal{AVERAGED}"
    config = write_config(tmp_path / "config.yml", models[0], models)
    assert moeplan(config, "--plan").status == 0


def test_a_shared_expert_is_no_part_of_the_mean(models, tmp_path):
    edit_config(models[1], vocab_size=400)
    settings = {"architecture": "qwen2 moe", "shared_experts": [{"source_model": str(models[1])}]}
    config = write_config(tmp_path / "config.yml", models[0], [models[0]] * 2, backbone="average", **settings)
    assert len(warned(moeplan(config, "--plan", "--i-understand-this-is-not-useful-without-training"))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("lm_head.weight"),
            "other: there is no tensor lm_head.weight, and config.json does not tie it to the embeddings "
            "(tie_word_embeddings)",
        ),
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            "other: there is no tensor model.norm.weight, which a llama model has",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(32)}),
            "other: model.norm.weight has shape [32], and config.json makes it [64] (hidden_size)",
        ),
    ],
)
def test_an_expert_without_a_tensor_or_with_one_of_another_shape_is_not_averaged(
    models, refused, tmp_path, change, message
):
    edit_tensors(models[1], change)
    assert refused(backbone="average") == f"config.yml:1: experts[1].source_model: {message}"
    assert moeplan(write_config(tmp_path / "config.yml", models[0], models), "--plan").status == 0


def test_a_weight_that_float16_has_no_place_for_is_told_with_what_to_do(models, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(models[1], lambda tensors: tensors.update({name: torch.full_like(tensors[name], 1e5)}))
    config = write_config(tmp_path / "config.yml", models[0], models, dtype="float16")
    result = moeplan(config, tmp_path / "out")
    assert result.status == 1
    assert result.error.endswith(
        "model.layers.1.block_sparse_moe.experts.1.w3.weight: has weights beyond 65,504, the largest number in "
        "float16: they would be infinite; have dtype: bfloat16, or float32"
    )
    assert not (tmp_path / "out").exists()


def test_a_bias_of_an_expert_s_attention_is_not_left_out_of_the_mean(models, refused, tmp_path):
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(models[1], lambda tensors: tensors.update({name: torch.ones(64)}))
    assert refused(backbone="average").startswith(f"other: a Mixtral model cannot hold '{name}', and without it")
    assert moeplan(write_config(tmp_path / "config.yml", models[0], models), "--plan").status == 0


@pytest.mark.parametrize("modules", [["mlp.up_proj"], ["mlp.up_proj", "self_attn.q_proj"]])
def test_an_adapter_that_changes_more_than_mlps_is_not_averaged(models, tmp_path, modules):
    lora = tmp_path / "lora"
    lora.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    rows = {"mlp.up_proj": 96, "self_attn.q_proj": 64}
    prefix = "base_model.model.model.layers.0."
    factors = {f"{prefix}{module}.lora_A.weight": torch.ones(2, 64) for module in modules}
    factors |= {f"{prefix}{module}.lora_B.weight": torch.ones(rows[module], 2) for module in modules}
    save_file(factors, lora / "adapter_model.safetensors")
    experts = [models[0], f"{models[1]}+{lora}"]
    for backbone in ("base", "average"):
        config = write_config(tmp_path / "config.yml", models[0], experts, backbone=backbone)
        result = moeplan(config, "--plan")
        assert result.status == (2 if backbone == "average" and len(modules) == 2 else 0)
    if len(modules) == 2:
        assert result.error.replace(f"{tmp_path}/", "").startswith(
            "config.yml:1: experts[1].source_model: lora has 'model.layers.0.self_attn.q_proj.lora_A.weight' (and 1 "
            "more), and adapters are applied to MLPs alone, so the mean of all else (backbone: average) would be "
            "without it; merge the adapter into its base model first"
        )


# ------------------------------------------------------------------------------------------------- what deserves a word


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0 in other and 300.0 in the base base"),
        ({"rope_theta": ...}, "rope_theta is 10000.0 in other and 300.0 in the base base"),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 in other and 300.0 in"),
        ({"vocab_size": 400}, "vocab_size is 400 in other and 384 in the base base"),
    ],
)
def test_a_difference_that_does_not_reach_the_output_is_a_warning(models, tmp_path, changes, difference):
    edit_config(models[1], **changes)
    config = write_config(tmp_path / "config.yml", models[0], [models[0], models[1], models[1], models[1]])
    (warning,) = warned(moeplan(config, "--plan"))
    warning = warning.replace(f"{tmp_path}/", "")
    assert warning.startswith(f"config.yml:1: experts[1].source_model: {difference}")
    assert warning.endswith("; the merged model has the base's")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling is {'factor': 2.0, 'rope_type': 'linear'} in other and {'rope_type': 'default'} in the base",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling is {'factor': 2.0, 'rope_type'"),
        ({"rms_norm_eps": 0.25}, "rms_norm_eps is 0.25 in other and 0.001 in the base base"),
    ],
)
def test_attention_that_was_trained_otherwise_is_a_warning_where_it_is_averaged(models, tmp_path, changes, difference):
    edit_config(models[1], **changes)
    for backbone, count in (("base", 0), ("average", 1)):
        config = write_config(tmp_path / "config.yml", models[0], models, backbone=backbone)
        warnings = warned(moeplan(config, "--plan"))
        assert len(warnings) == count
    assert difference in warnings[0].replace(f"{tmp_path}/", "")


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 16}, "16"),
        ({"sliding_window": None}, "None"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "[None, None, 8]"),
    ],
)
def test_another_window_is_a_warning_where_attention_is_averaged(changes, window, checkpoint, tmp_path):
    models = [shutil.copytree(checkpoint("mistral-plain", seed), tmp_path / f"{seed}") for seed in range(2)]
    edit_config(models[1], **changes)
    config = write_config(tmp_path / "config.yml", models[0], models, backbone="average")
    (warning,) = warned(moeplan(config, "--plan"))
    assert f"sliding_window is {window} in {models[1]} and 8 in the base {models[0]}" in warning


def test_mlps_whose_results_count_otherwise_are_not_merged(checkpoint, tmp_path):
    models = [shutil.copytree(checkpoint("granite-plain", seed), tmp_path / f"{seed}") for seed in range(2)]
    edit_config(models[1], residual_multiplier=0.25)
    result = moeplan(write_config(tmp_path / "config.yml", models[0], models), "--plan")
    assert result.status == 2
    assert re.search(
        r"residual_multiplier is 0\.25 in .*/1 and [\d.]+ in the base .*; they must be equal", result.error
    )


def test_an_averaged_output_matrix_whose_logits_were_scaled_otherwise_is_a_warning(checkpoint, tmp_path):
    models = [shutil.copytree(checkpoint("granite-plain", seed), tmp_path / f"{seed}") for seed in range(2)]
    edit_config(models[1], logits_scaling=8.0)
    config = write_config(tmp_path / "config.yml", models[0], models, backbone="average")
    (warning,) = [each for each in warned(moeplan(config, "--plan")) if "logits_scaling" in each]
    assert "logits_scaling is 8.0 in" in warning


def test_rope_in_another_spelling_is_no_difference(models, tmp_path):
    edit_config(models[1], rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    config = write_config(tmp_path / "config.yml", models[0], models)
    assert warned(moeplan(config, "--plan")) == []


def test_a_number_of_experts_that_is_no_power_of_two_is_a_warning(models, tmp_path):
    config = write_config(tmp_path / "config.yml", models[0], [models[0], models[1], models[1]])
    (warning,) = warned(moeplan(config, "--plan"))
    assert warning.endswith("experts: 3 is no power of two, which older versions of llama.cpp cannot read")


@pytest.mark.parametrize(
    ("settings", "others"),
    [({"architecture": "deepseek"}, ""), ({}, "; `architecture: Qwen2 MoE` would fit, too")],
    ids=["named", "inferred"],
)
def test_a_family_that_transformers_5_cannot_load_is_a_warning_that_says_what_can(models, tmp_path, settings, others):
    shared = [{"source_model": models[0]}]
    config = write_config(tmp_path / "config.yml", models[0], models, shared_experts=shared, **settings)
    (warning,) = warned(moeplan(config, "--plan"))
    assert warning == (
        f"{config}:1: architecture: transformers 5 cannot load a DeepSeek MoE model: use transformers 4.57 with "
        f"use_cache=False, or vLLM, both with trust_remote_code=True{others}"
    )


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ("llama-gelu", {}, "the activation is not SiLU: llama.cpp"),
        ("llama-wide-heads", {"architecture": "qwen2 moe"}, "heads are not hidden_size / num_attention_heads wide"),
        ("granite-wide-heads", {}, "heads are not hidden_size / num_attention_heads wide"),
        ("llama-plain", {"architecture": "deepseek", "experts_per_token": 1}, "with one expert per token, DeepSeek's"),
    ],
)
def test_what_readers_get_wrong_is_a_warning(checkpoint, tmp_path, recipe, settings, words):
    models = [checkpoint(recipe, seed) for seed in range(2)]
    shared = [{"source_model": models[0]}] if "architecture" in settings else []
    config = write_config(tmp_path / "config.yml", models[0], models, shared_experts=shared, **settings)
    assert warned(moeplan(config, "--plan"))[0].startswith(f"{config}:1: architecture: {words}")


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("llama-wide-heads", {}), ("qwen3-wide-heads", {}), ("llama-plain", {"experts_per_token": 1})],
)
def test_what_every_reader_of_the_family_gets_right_is_none(checkpoint, tmp_path, recipe, settings):
    models = [checkpoint(recipe, seed) for seed in range(2)]
    config = write_config(tmp_path / "config.yml", models[0], models, **settings)
    assert warned(moeplan(config, "--plan")) == []


def test_layers_whose_router_cannot_tell_experts_apart_are_named(models, tmp_path):
    prompts = [{"positive_prompts": ["the same"]}, {"positive_prompts": ["the same", "the same"]}]
    experts = [{"source_model": path, **given} for path, given in zip(models, prompts, strict=True)]
    config = write_config(tmp_path / "config.yml", models[0], experts, gate_mode="hidden")
    (warning,) = warned(moeplan(config, tmp_path / "out"))
    assert warning == (
        "routing is degenerate in all layers: the router cannot tell some experts apart; give them prompts that "
        "differ more"
    )


def test_an_expert_whose_negative_prompts_take_away_all_of_it_is_named(models, tmp_path):
    experts = [{"source_model": path, "positive_prompts": [path.name]} for path in models]
    experts[1]["negative_prompts"] = experts[1]["positive_prompts"]
    config = write_config(tmp_path / "config.yml", models[0], experts, gate_mode="hidden")
    assert warned(moeplan(config, tmp_path / "out"))[0] == (
        f"{config}:1: experts[1]: the router's row for this expert is zero; its negative prompts take away "
        "all that its positive ones give"
    )


def test_only_degenerate_layers_are_named_and_no_prompts_where_there_are_none(models, tmp_path):
    experts = [models[0]] * 64  # of 64 random rows of 64 numbers, some combination nearly vanishes
    config = write_config(tmp_path / "config.yml", models[0], experts, gate_mode="random")
    (warning,) = warned(moeplan(config, tmp_path / "out"))
    assert warning == "routing is degenerate in all layers: the router cannot tell some experts apart"


def test_an_expert_whose_prompts_give_nothing_is_named(models, tmp_path):
    edit_tensors(models[0], lambda tensors: tensors["model.embed_tokens.weight"].fill_(0))
    config = write_config(tmp_path / "config.yml", models[0], models, gate_mode="cheap_embed")
    assert warned(moeplan(config, tmp_path / "out"))[0] == (
        f"{config}:1: experts[0]: the router's row for this expert is zero; its prompts give nothing that is not as "
        "much the others'"
    )


def test_a_shared_expert_s_gate_that_is_no_number_is_warned_of(models, tmp_path):
    """The routers' rows may be sound: what is not is the embedding of a token that its prompts alone have."""
    experts = [{"source_model": path, "positive_prompts": [prompt]} for path, prompt in zip(models, "xy", strict=True)]
    shared = [{"source_model": models[0], "positive_prompts": ["Q"]}]
    tokens = AutoTokenizer.from_pretrained(models[0])("Q", add_special_tokens=False).input_ids
    edit_tensors(models[0], lambda tensors: tensors["model.embed_tokens.weight"][tokens[-1]].fill_(float("nan")))
    settings = {"gate_mode": "cheap_embed", "architecture": "qwen2 moe", "shared_experts": shared}
    config = write_config(tmp_path / "config.yml", models[0], experts, **settings)
    said = [warning for warning in warned(moeplan(config, tmp_path / "out")) if "NaN" in warning]
    assert said == [
        f"{config}:1: shared_experts[0]: the gate of this expert holds NaN or infinities in all layers: so do the "
        "base's weights, or what it makes of its prompts"
    ]


@pytest.mark.parametrize("own", [True, False])
def test_a_shared_expert_whose_prompts_are_all_the_experts_is_named(models, tmp_path, own):
    experts = [{"source_model": path, "positive_prompts": [path.name]} for path in models]
    prompts = [path.name for path in models] + ["something else"] * own
    shared = [{"source_model": models[0], "positive_prompts": prompts}]
    settings = {"gate_mode": "ridge", "architecture": "qwen2 moe", "shared_experts": shared}
    config = write_config(tmp_path / "config.yml", models[0], experts, **settings)
    said = [warning for warning in warned(moeplan(config, tmp_path / "out")) if "gate of this expert" in warning]
    assert said == [
        f"{config}:1: shared_experts[0]: the gate of this expert is zero in all layers, so half of it counts for every "
        "token; give it prompts that are not the experts'"
    ] * (not own)


def test_the_only_expert_s_row_may_be_zero(models, tmp_path):
    config = write_config(
        tmp_path / "config.yml", models[0], models[:1], gate_mode="ridge", experts_per_token=1, architecture="mixtral"
    )
    ran = moeplan(config, tmp_path / "out", "--i-understand-this-is-not-useful-without-training")
    assert (ran.status, warned(ran)) == (0, [])


def test_routers_with_numbers_that_are_not_finite_are_named_for_that(models, tmp_path):
    edit_tensors(models[0], lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    config = write_config(tmp_path / "config.yml", models[0], models, gate_mode="hidden")
    assert warned(moeplan(config, tmp_path / "out")) == [
        "routers hold NaN or infinities in layers 1-2: so do the base's weights, or what it makes of these prompts"
    ]


def test_merges_in_several_threads_give_what_one_gives(models, tmp_path):
    config = api.load_config(write_config(tmp_path / "config.yml", models[0], models, gate_mode="hidden"))

    def weights(number: int) -> bytes:
        api.merge(config, tmp_path / f"out{number}")
        return (tmp_path / f"out{number}" / "model.safetensors").read_bytes()

    alone = weights(0)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(weights, range(1, 9))) == [alone] * 8


# ------------------------------------------------------------------------------------------------------ runs that fail


@pytest.mark.parametrize("harm", ["change", "removal"])
def test_a_source_that_does_not_stay_as_it_was_planned_fails_the_run(models, tmp_path, harm):
    config = api.load_config(write_config(tmp_path / "config.yml", models[0], models))
    file = models[1] / "model.safetensors"

    def meddle(plan: api.MergePlan) -> None:
        if harm == "change":
            os.utime(file, ns=(0, 0))
        else:
            file.unlink()

    with pytest.raises(RunError, match=rf"{file}: (the file was changed|cannot be opened any more)"):
        api.merge(config, tmp_path / "out", on_plan=meddle)
    assert not (tmp_path / "out").exists()


def test_what_an_interrupted_progress_display_raises_is_raised_with_a_note(models, tmp_path):
    config = api.load_config(write_config(tmp_path / "config.yml", models[0], models))

    def interrupt(state: Progress) -> None:
        if not state.doing:  # something is copied then
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        api.merge(config, tmp_path / "new" / "out", on_progress=interrupt)
    assert raised.value.__notes__ == ["what is finished is kept: run the same command again to go on"]
    assert api.merge(config, tmp_path / "new" / "out").run.nbytes_by_path["resumed"] > 0


def test_a_plan_that_is_made_again_says_nothing_twice(models, configure, tmp_path, monkeypatch):
    """Where nobody knows what torch takes here, and it seems too much, a merge imports it, looks, and plans anew."""
    cap = planning.memory_cap
    caps = iter([MemoryCap(1, 2, ("torch",))])
    monkeypatch.setattr(planning, "memory_cap", lambda *args: next(caps, None) or cap(*args))
    monkeypatch.setattr(merging, "runtime_is_known", lambda: False)
    config, options = configure(models[0], [*models, models[1]])
    with pytest.warns(api.MoeplanWarning) as said:
        api.merge(config, tmp_path / "out", options)
    assert next(caps, None) is None
    assert sum("is no power of two" in str(warning.message) for warning in said) == 1
