"""The model card: metadata that the Hub takes, and nothing from the sources' cards but what a licence may be."""

import os
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from commands import moeplan, snapshot, write_config
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import moeplan as api
from moeplan.model_card import MAX_NBYTES, CardSource, Licence, hub_name, metadata, read_licence, warn_of_licences


def card(text: str, path: Path) -> Licence | None:
    path.mkdir(exist_ok=True)
    (path / "README.md").write_bytes(text.encode())
    return read_licence(path)


def source(name: str | None = None, licence: Licence | None = None) -> CardSource:
    return CardSource(name or "models/local", ("base",), name, licence)


APACHE, LLAMA = Licence("apache-2.0"), Licence("other", "llama-3 licence", "https://llama.com/llama3/license")


# -------------------------------------------------------------------------------------------------- what is written


@pytest.fixture
def linked(checkpoint, tmp_path, monkeypatch):
    """`linked(place, seed=0)`: a copy of a checkpoint, by links, at a place in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(place: str, seed: int = 0) -> str:
        Path(place).mkdir(parents=True)
        for file in checkpoint("llama-plain", seed).iterdir():
            os.link(file, Path(place, file.name))
        return place

    return make


def test_the_hub_s_own_reader_finds_models_licence_and_tags(linked):
    models = [linked(f"hub/models--some-org--model-{n}/snapshots/0123", n) for n in range(2)]
    for model in models:
        Path(model, "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    config = write_config(Path("config.yml"), models[0], models)
    assert moeplan(config, "out").stderr == ""
    loaded = ModelCard.load("out/README.md")
    loaded.data.to_yaml()
    assert loaded.data.base_model == ["some-org/model-0", "some-org/model-1"]
    assert loaded.data.license == "apache-2.0"
    assert loaded.data.library_name == "transformers"
    assert {"moe", "merge", "moeplan"} <= {*loaded.data.tags}
    assert "[some-org/model-1](https://huggingface.co/some-org/model-1) | apache-2.0 |" in loaded.text


def put_adapter(place: str, licence: str) -> str:
    """A LoRA adapter for the models that `linked` makes, at a place in the working directory."""
    Path(place).mkdir(parents=True)
    Path(place, "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}'
    )
    Path(place, "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(96, 2)}
    save_file(factors, Path(place, "adapter_model.safetensors"))
    return place


def test_adapters_are_listed_beside_their_models_and_their_licences_count(linked):
    model = linked("hub/models--some-org--model/snapshots/0123")
    Path(model, "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    loras = [put_adapter(f"hub/models--some-org--lora-{n}/snapshots/0123", "apache-2.0") for n in range(2)]
    config = write_config(Path("config.yml"), model, [model, *(f"{model}+{lora}" for lora in loras)])
    assert "licences" not in moeplan(config, "out").stderr
    loaded = ModelCard.load("out/README.md")
    assert loaded.data.base_model == ["some-org/model", "some-org/lora-0", "some-org/lora-1"]
    assert loaded.data.license == "apache-2.0"
    rows = [line.partition(" | [")[0] for line in loaded.text.splitlines() if "](https://huggingface.co/" in line]
    assert rows == ["| base, experts 0-2", "| adapter of expert 1", "| adapter of expert 2"]

    Path(loras[1], "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    ran = moeplan(config, "differs")
    assert f"have different licences: apache-2.0 ({loras[0]}), cc-by-nc-4.0 ({loras[1]})" in ran.stderr
    assert ModelCard.load("differs/README.md").data.license is None


def test_a_model_that_the_yaml_spells_in_several_ways_is_listed_once_by_the_first(linked):
    model = linked("models/assistant")
    Path("link").symlink_to(model)
    spellings = ["models/assistant", "./models/assistant/", "link", Path(model).resolve()]
    config = write_config(Path("config.yml"), model, [*spellings, linked("models/other", 1)])
    assert moeplan(config, "out").status == 0
    rows = [line for line in Path("out/README.md").read_text().splitlines() if line.endswith("| not known |")]
    assert rows == [
        "| base, experts 0-3 | `models/assistant` | not known |",
        "| expert 4 | `models/other` | not known |",
    ]


def test_a_model_of_one_expert_is_spoken_of_in_the_singular(linked):
    model = linked("model")
    config = write_config(Path("config.yml"), model, [model], experts_per_token=1)
    assert moeplan(config, "out").status == 0
    content = Path("out/README.md").read_text()
    assert "# Mixtral of 1 expert\n" in content
    assert "1 experts" not in content
    assert "on a token" not in content


def test_the_yaml_is_beside_the_weights_byte_for_byte_and_in_the_card(linked):
    model = linked("models/a|b`c")
    text = f"base_model: '{model}'  # ```` näive\r\nexperts:\r\n- source_model: '{model}'\r\ngate_mode: random\n"
    Path("config.yml").write_bytes((text + "experts_per_token: 1").encode())
    assert moeplan("config.yml", "out").status == 0
    assert Path("out/moeplan_config.yml").read_bytes() == Path("config.yml").read_bytes()
    content = Path("out/README.md").read_bytes().decode()
    fenced = re.search(r"^`{5}yaml\n(.*?)\n`{5}$", content, re.DOTALL | re.MULTILINE)
    assert fenced[1] == text + "experts_per_token: 1"
    assert r"| base, expert 0 | `` models/a\|b`c `` | not known |" in content


def test_a_config_made_in_python_is_written_as_yaml_that_says_the_same(linked, tmp_path):
    model = linked("model")
    config = api.MergeConfig(base_model=model, experts=[api.Expert(source_model=model)] * 2, gate_mode="random")
    api.merge(config, "out")
    assert api.load_config("out/moeplan_config.yml", allow_all_same=True) == config


def test_the_commands_on_the_card_merge_and_load_the_model(linked):
    model = linked("model")
    config = write_config(Path("config.yml"), model, [model] * 2, gate_mode="cheap_embed")
    given = [
        "--trust-remote-code",
        "--out-shard-size",
        "20 K",
        "--random-seed",
        "7",
        "--i-understand-this-is-not-useful-without-training",
    ]
    assert moeplan(config, "out", *given).status == 0
    content = Path("out/README.md").read_text()

    command = re.search(r"^`moeplan (\S+) OUT (.*)`, with", content, re.MULTILINE)
    assert moeplan(f"out/{command[1]}", "again", *shlex.split(command[2])).status == 0
    assert snapshot(Path("again")) == snapshot(Path("out"))

    loaded = {}
    python = re.search(r"```python\n(.*?)```", content, re.DOTALL)[1].replace('"."', '"out"')
    exec(python, loaded)
    assert type(loaded["model"]).__name__ == "MixtralForCausalLM"
    assert loaded["tokenizer"]("Hello")["input_ids"]


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"architecture": "deepseek"}, [], "transformers 5 cannot load it: use transformers 4.57 with use_cache=False"),
        ({}, ["--expert-layout", "packed"], "the fused tensors of transformers 5, which transformers 4 cannot load."),
        ({}, [], None),
    ],
    ids=["deepseek", "packed", "mixtral"],
)
def test_the_card_says_with_which_versions_the_model_loads_where_not_with_all(linked, settings, options, said):
    model = linked("model")
    config = write_config(Path("config.yml"), model, [model, linked("other", 1)], **settings)
    assert moeplan(config, "out", *options).status == 0
    how = Path("out/README.md").read_text().partition("## How to load it\n\n")[2]
    if said is None:
        assert how.startswith("```python")
    else:
        assert said in how.partition("```python")[0]


def test_the_card_says_what_readers_get_wrong(linked):
    model = linked("model")
    config = write_config(
        Path("config.yml"), model, [model, linked("other", 1)], architecture="deepseek", experts_per_token=1
    )
    assert moeplan(config, "out").status == 0
    content = Path("out/README.md").read_text()
    assert "Mind that with one expert per token, DeepSeek's code scales it by the router's softmax, and vLLM" in content
    assert "Mind that the activation" not in content


@pytest.mark.parametrize(
    ("base_files", "options"),
    [
        (["config.json", "model.safetensors", "tokenizer.json"], ["--no-copy-tokenizer"]),
        (["config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"], []),
    ],
    ids=["not-copied", "base-without"],
)
def test_the_card_names_no_tokenizer_where_the_model_has_none(linked, base_files, options):
    model = linked("model")
    for file in Path(model).iterdir():
        if file.name not in base_files:
            file.unlink()
    config = write_config(Path("config.yml"), model, [model] * 2)
    assert moeplan(config, "out", *options).status == 0
    content = Path("out/README.md").read_text()
    assert "AutoTokenizer" not in content
    assert "It has no tokenizer of its own: use the base's." in content

    loaded = {}
    exec(re.search(r"```python\n(.*?)```", content, re.DOTALL)[1].replace('"."', '"out"'), loaded)
    assert type(loaded["model"]).__name__ == "MixtralForCausalLM"


def test_options_that_do_not_reach_the_model_s_bytes_are_not_on_the_card(linked):
    model = linked("model")
    config = write_config(Path("config.yml"), model, [model, linked("other", 1)], gate_mode="cheap_embed")
    for out, options in (("plain", []), ("given", ["--load-in-8bit", "--cuda", "--max-memory", "2GiB"])):
        assert moeplan(config, out, *options).status == 0
    assert snapshot(Path("given")) == snapshot(Path("plain"))


def test_without_a_card_neither_it_nor_the_yaml_is_written(linked):
    model = linked("model")
    config = write_config(Path("config.yml"), model, [model] * 2)
    assert moeplan(config, "out", "--no-write-model-card").status == 0
    assert not Path("out", "README.md").exists()
    assert not Path("out", "moeplan_config.yml").exists()


# --------------------------------------------------------------------------------------------------------- licences


def test_a_licence_is_named_where_all_models_have_it():
    assert (
        metadata([source(licence=LLAMA), source("a/b", LLAMA)]).items()
        >= {
            "license": "other",
            "license_name": "llama-3 licence",
            "license_link": "https://llama.com/llama3/license",
        }.items()
    )
    assert "license" not in metadata([source(licence=APACHE), source("a/b", LLAMA)])
    assert "license" not in metadata([source(licence=APACHE), source("a/b", None)])


def test_one_licence_is_one_wherever_each_model_has_its_copy():
    names = ("Qwen/a", "Qwen/b")
    models = [source(name, Licence("apache-2.0", None, f"https://hf.co/{name}/LICENSE")) for name in names]
    assert metadata(models)["license_link"] == "https://hf.co/Qwen/a/LICENSE"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_licences(models)


def test_licences_that_differ_are_warned_of_and_unknown_ones_are_not():
    with pytest.warns(
        api.MoeplanWarning, match=r"different licences: apache-2\.0 \(models/local\), llama-3 licence \(a/b\)"
    ):
        warn_of_licences([source(licence=APACHE), source("a/b", LLAMA), source("c/d")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_licences([source(licence=APACHE), source("a/b", APACHE), source("c/d")])


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("\ufeff---\r\nlanguage: en\r\nlicense: 'mit'  # yes\r\n---\r\n", "mit"),
        ('---\nlicense: "apache-2.0"\n---', "apache-2.0"),
        ("license: mit\n", None),
        ("---\nlicense: mit\n", None),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("---\nmodel:\n  license: mit\n---\n", None),
        ("---\nlicense: \x1b[31mmit\n---\n", None),
        ("---\nlicense: *bomb\n---\n", None),
        ("---\nlicense: !!python/object:os.system mit\n---\n", None),
        ("---\nlicense: mit\n" + "x" * MAX_NBYTES + "\n---\n", None),
    ],
)
def test_a_licence_is_read_from_a_card_s_metadata_alone(tmp_path, text, licence):
    assert card(text, tmp_path / "model") == (None if licence is None else Licence(licence))


@given(st.text())
@example("license: mit\n---\n")
def test_whatever_a_card_holds_what_is_taken_from_it_is_plain_yaml_and_harmless(tmp_path_factory, text):
    licence = card("---\nlicense: " + text + "\n---\n", tmp_path_factory.mktemp("card"))
    if licence is not None:
        data = metadata([source(licence=licence)])
        assert yaml.safe_load(yaml.safe_dump(data)) == data
        assert str(licence).isascii()
        assert str(licence).isprintable()


def test_a_card_that_is_no_file_of_the_model_is_not_read(tmp_path):
    (tmp_path / "outside.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model").mkdir()
    readme = tmp_path / "model" / "README.md"
    assert read_licence(tmp_path / "model") is None
    readme.symlink_to(tmp_path / "outside.md")
    assert read_licence(tmp_path / "model") is None
    readme.unlink()
    os.mkfifo(readme)
    assert read_licence(tmp_path / "model") is None


# --------------------------------------------------------------------------------------------------- names on the Hub


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-v0.1@main", "mistralai/Mistral-7B-v0.1"),
        ("/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123", "Qwen/Qwen3-8B"),
        ("models/assistant/", None),
        ("/models/assistant", None),
        ("~/assistant", None),
        ("./assistant", None),
        ("../assistant", None),
        ("assistant", None),
        ("a/b/c", None),
        ("a/b--c", None),
        ("a/b..c", None),
        ("a/b.", None),
        ("a./b", None),
        ("a/b.git", None),
        ("a/" + "b" * 95, None),
        ("ä/b", None),
        ("a/b c", None),
    ],
)
def test_names_that_look_like_the_hub_s_are_taken_for_such(reference, name):
    assert hub_name(reference) == name


def test_a_directory_is_not_on_the_hub_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/assistant").mkdir(parents=True)
    assert hub_name("models/assistant") is None


@given(st.from_regex(r"[\w.-]{1,9}/[\w.-]{1,9}", fullmatch=True))
def test_what_is_taken_for_a_name_is_one_by_the_hub_s_own_rules(reference):
    if hub_name(reference) is not None:
        validate_repo_id(reference)
