"""Bases that bring modelling and tokenizer code with them: it is run where the user trusts it, and only then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from test_router_weights import MIXTRAL, PROMPTS, assert_same_directions, computed_by_transformers, merged_router

from moeplan.gates.layers import own_model_class
from moeplan.places import CheckpointError

MODELLING = """
import os
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

with open(os.environ["OWN_CODE_RAN"], "a") as file:
    file.write("modelling ")


class OwnLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return 3 * super().forward(hidden_states.tanh(), *args, **kwargs) + hidden_states


class OwnModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(OwnLayer(config, index) for index in range(config.num_hidden_layers))


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
"""

# As code was written for transformers 4: a layer says which mask it takes, and returns a tuple.
OLDER = """
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast


class OlderLayer(OwnLayer):
    attention_type = "full_attention"

    def forward(self, *args, **kwargs):
        return (super().forward(*args, **kwargs),)


class OlderModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(OlderLayer(config, index) for index in range(config.num_hidden_layers))

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rotated = self.rotary_emb(states, torch.arange(states.shape[1])[None])
        masks = {"full_attention": None}
        seen = [states]
        for layer in self.layers:
            states = layer(states, attention_mask=masks[layer.attention_type], position_embeddings=rotated)[0]
            seen.append(states)
        return BaseModelOutputWithPast(self.norm(states), hidden_states=tuple(seen))


class OlderForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = OlderModel(config)
"""

TOKENIZER = """
import os
from transformers import PreTrainedTokenizerFast

with open(os.environ["OWN_CODE_RAN"], "a") as file:
    file.write("tokenizer ")


class OwnTokenizer(PreTrainedTokenizerFast):
    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus(text[::-1], *args, **kwargs)
"""

CAUSAL = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """The file that own code writes to when it is run."""
    monkeypatch.setenv("OWN_CODE_RAN", str(tmp_path / "ran"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "ran"


def with_own_code(source: Path, path: Path, auto_map: dict[str, str]) -> Path:
    shutil.copytree(source, path)
    (path / "modeling_own.py").write_text(MODELLING + OLDER)
    (path / "tokenization_own.py").write_text(TOKENIZER)
    for name, own in (
        ("config.json", {"auto_map": auto_map}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}),
    ):
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | own))
    return path


@pytest.mark.parametrize(
    "auto_map",
    [
        CAUSAL,
        {"AutoModel": "modeling_own.OwnModel", **CAUSAL},
        {"AutoModelForCausalLM": "modeling_own.OlderForCausalLM"},
    ],
    ids=["causal", "both", "older"],
)
def test_own_code_that_is_trusted_evaluates_the_prompts(auto_map, checkpoint, merge, ran, tmp_path):
    base = with_own_code(checkpoint("llama-plain"), tmp_path / "base", auto_map)
    weights = merged_router(merge, base, MIXTRAL, "hidden", dtype="float32", trust_remote_code=True)
    assert set(ran.read_text().split()) == {"modelling", "tokenizer"}
    assert_same_directions(weights, computed_by_transformers(base, "hidden", trust_remote_code=True))


def test_own_code_may_be_of_the_model_without_its_head(checkpoint, merge, ran, tmp_path):
    found = []
    for key, name in (("AutoModel", "OwnModel"), ("AutoModelForCausalLM", "OwnForCausalLM")):
        base = with_own_code(checkpoint("llama-plain"), tmp_path / key, {key: f"modeling_own.{name}"})
        found.append(merged_router(merge, base, MIXTRAL, "hidden", dtype="float32", trust_remote_code=True))
    assert torch.equal(*found)


def test_own_code_is_never_run_where_it_is_not_trusted_and_its_being_there_is_warned_of(
    checkpoint, merge, ran, tmp_path
):
    plain = checkpoint("llama-plain")
    base = with_own_code(plain, tmp_path / "base", CAUSAL)
    with pytest.warns(UserWarning, match="auto_map names code of the model's own, which is not run"):
        weights = merged_router(merge, base, MIXTRAL, "hidden", dtype="float32")
    assert not ran.exists()
    assert_same_directions(weights, computed_by_transformers(plain, "hidden"))


@pytest.mark.parametrize("auto_map", [None, 7, "AutoModel", ["AutoModel"], {"AutoConfig": "configuration_own.Own"}])
def test_an_auto_map_that_names_no_model_is_no_code_of_one(auto_map):
    assert own_model_class({"auto_map": auto_map}) is None


def test_own_code_serves_prompts_alone_and_that_of_experts_nothing(checkpoint, merge, ran, tmp_path):
    own = with_own_code(checkpoint("llama-plain"), tmp_path / "own", CAUSAL)
    out = merge(own, [own, checkpoint("llama-plain", 1)], gate_mode="random", trust_remote_code=True)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    experts = [{"source_model": own, **prompts} for prompts in PROMPTS]
    merge(checkpoint("llama-plain", 1), experts, gate_mode="hidden", trust_remote_code=True)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("layer.feed_forward = layer.mlp\n            del layer.mlp", "'mlp'"),
        (
            "layer.register_buffer('scale', layer.mlp.up_proj.weight.new_ones(1))",
            "it computes layers.0.scale",
        ),
    ],
    ids=["parts", "numbers"],
)
def test_own_code_without_the_parts_that_transformers_models_have_or_with_numbers_of_its_own_is_named(
    change, reason, checkpoint, merge, ran, tmp_path
):
    base = with_own_code(checkpoint("llama-plain"), tmp_path / "base", CAUSAL)
    code = f"        for layer in self.model.layers:\n            {change}\n"
    (base / "modeling_own.py").write_text(MODELLING + code)
    with pytest.raises(CheckpointError, match=f"base/config.json: transformers cannot make this model: .*{reason}"):
        merged_router(merge, base, MIXTRAL, "hidden", dtype="float32", trust_remote_code=True)
