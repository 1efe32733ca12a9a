"""What a config may say, what is refused, and that every refusal names its line."""

import os
import pickle
import re
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moeplan.config import Expert, MergeConfig, load_config
from moeplan.errors import MoeplanWarning, UserError
from moeplan.yaml_file import ConfigError

REPOSITORY = Path(__file__).parents[2]

# Tests write on line 9, and beyond.
CLOWN_CAR = """\
base_model: base
experts:
  - source_model: doctor
    positive_prompts:
      - The patient
  - source_model: german
    positive_prompts:
      - Guten Tag
"""
UPCYCLING = """\
base_model: base
gate_mode: random
experts:
  - source_model: base
  - source_model: base
"""


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes, **options: Any) -> MergeConfig:
    Path("config.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config("config.yml", **options)


def refusal(text: str | bytes) -> str:
    with pytest.raises(ConfigError) as refused:
        load(text)
    return str(refused.value)


def clown_car(**changes: Any) -> MergeConfig:
    experts = (
        Expert(source_model="doctor", positive_prompts=("The patient",)),
        Expert(source_model="german", positive_prompts=("Guten Tag",)),
    )
    return MergeConfig(**{"base_model": "base", "experts": experts, **changes})


# ---------------------------------------------------------------------------------------------- what a config says


def test_a_config_says_what_to_merge() -> None:
    config = load("""\
base_model: path/to/base
gate_mode: cheap_embed
dtype: bfloat16
experts_per_token: 1
architecture: mixtral
backbone: average
experts:
  - source_model: path/to/doctor
    positive_prompts: ["<|im_start|>user\\nHello", "> get ye flask"]
    negative_prompts: ["Es war einmal"]
    noise_scale: 0.01
    residual_scale: -2
shared_experts:
  - source_model: path/to/shared
""")
    assert config == MergeConfig(
        base_model="path/to/base",
        gate_mode="cheap_embed",
        dtype="bfloat16",
        experts_per_token=1,
        architecture="mixtral",
        backbone="average",
        experts=(
            Expert(
                source_model="path/to/doctor",
                positive_prompts=("<|im_start|>user\nHello", "> get ye flask"),
                negative_prompts=("Es war einmal",),
                noise_scale=0.01,
                residual_scale=-2.0,
            ),
        ),
        shared_experts=(Expert(source_model="path/to/shared"),),
    )


def test_what_a_config_leaves_out_has_mergekits_defaults() -> None:
    config = load(CLOWN_CAR)
    assert (config.gate_mode, config.dtype, config.experts_per_token) == ("hidden", None, 2)
    assert (config.shared_experts, config.architecture, config.backbone) == ((), None, "base")
    expert = config.experts[0]
    assert (expert.negative_prompts, expert.noise_scale, expert.residual_scale) == ((), 0.0, 1.0)


def test_null_means_absent() -> None:
    nulls = "dtype:\ngate_mode: null\nexperts_per_token: ~\narchitecture: null\nshared_experts: null\nbackbone:\n"
    expert_nulls = "    negative_prompts: null\n    noise_scale: null\n    residual_scale: null\n"
    assert load(CLOWN_CAR + expert_nulls + nulls) == load(CLOWN_CAR)


@pytest.mark.parametrize("spelling", ["1e-3", "1E-3", "0.001", "1.0e-3", "+1e-3", "1.e-3"])
def test_numbers_may_have_an_exponent_without_a_point(spelling: str) -> None:
    assert load(CLOWN_CAR + f"    noise_scale: {spelling}\n").experts[1].noise_scale == 0.001


def test_numbers_may_stand_in_quotes_and_whole_ones_have_a_point_as_mergekit_reads_them() -> None:
    text = CLOWN_CAR + "    noise_scale: '0.1'\n    residual_scale: \"1e-3\"\nexperts_per_token: {}\n"
    for typed in ("'2'", "2.0", "'2.0'"):
        config = load(text.format(typed))
        assert config.experts_per_token == 2
        assert (config.experts[1].noise_scale, config.experts[1].residual_scale) == (0.1, 0.001)


def test_a_config_is_frozen_hashable_and_survives_pickling() -> None:
    config = load(CLOWN_CAR)
    with pytest.raises(ValidationError, match="frozen"):
        config.gate_mode = "random"  # type: ignore[misc]
    assert hash(config) == hash(clown_car())
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.where("base_model") == "config.yml:1: base_model"


def test_a_config_from_a_file_equals_the_same_config_built_in_python() -> None:
    assert load(CLOWN_CAR) == clown_car()
    assert load(CLOWN_CAR) == load("# a line more\n" + CLOWN_CAR)


def test_a_byte_order_mark_is_read_over() -> None:
    assert load(b"\xef\xbb\xbf" + CLOWN_CAR.encode()) == load(CLOWN_CAR)


def test_config_errors_are_for_the_user() -> None:
    assert issubclass(ConfigError, UserError)
    assert ConfigError.exit_status == 2


@pytest.mark.parametrize("name", ["clown-car.yml", "sparse-upcycling.yml"])
def test_the_examples_load_without_a_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_config(REPOSITORY / "examples" / name)
    assert config.base_model == "models/assistant"
    assert config.dtype == "bfloat16"
    assert len(config.experts) == {"clown-car.yml": 4, "sparse-upcycling.yml": 8}[name]


def test_reading_a_config_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from moeplan.config import load_config; load_config(sys.argv[2])\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    example = REPOSITORY / "examples" / "clown-car.yml"
    output = subprocess.check_output([sys.executable, "-c", code, str(REPOSITORY), str(example)], text=True)
    assert output.strip() == "[]"


# ------------------------------------------------------------------------------------------------ where keys stand


def test_where_names_the_line_of_each_key() -> None:
    config = load(CLOWN_CAR)
    assert config.where("base_model") == "config.yml:1: base_model"
    assert config.where("experts") == "config.yml:2: experts"
    assert config.where("experts", 1) == "config.yml:6: experts[1]"
    assert config.where("experts", 1, "source_model") == "config.yml:6: experts[1].source_model"
    assert config.where("experts", 0, "positive_prompts", 0) == "config.yml:5: experts[0].positive_prompts[0]"


def test_where_names_the_nearest_line_for_a_key_that_is_left_out() -> None:
    config = load("\n# comment\n" + CLOWN_CAR)
    assert config.where("dtype") == "config.yml:3: dtype"
    assert config.where("experts", 1, "noise_scale") == "config.yml:8: experts[1].noise_scale"


def test_where_names_only_the_key_of_a_config_built_in_python() -> None:
    assert clown_car().where("experts", 1, "source_model") == "experts[1].source_model"


def test_where_names_the_file_as_it_was_typed() -> None:
    Path("sub").mkdir()
    Path("sub/my.yaml").write_text(CLOWN_CAR)
    assert load_config(Path("sub/my.yaml")).where("base_model") == "sub/my.yaml:1: base_model"


def test_where_names_the_line_of_an_alias_for_what_it_stands_in() -> None:
    config = load("""\
base_model: base
gate_mode: random
experts:
  - &doctor
    source_model: doctor
  - *doctor
  - <<: *doctor
    noise_scale: 0.5
""")
    assert config.where("experts", 1) == "config.yml:6: experts[1]"
    assert config.where("experts", 1, "source_model") == "config.yml:5: experts[1].source_model"
    assert config.where("experts", 2, "source_model") == "config.yml:5: experts[2].source_model"
    assert config.where("experts", 2, "noise_scale") == "config.yml:8: experts[2].noise_scale"


# ---------------------------------------------------------------------------------------- keys, known and unknown


def test_a_misspelt_key_of_an_expert_is_refused_with_the_right_spelling() -> None:
    message = refusal(CLOWN_CAR.replace("source_model: german", "source_mode: german"))
    assert message == "config.yml:6: experts[1].source_mode: unknown key, did you mean source_model?"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("expert", "experts"),
        ("basemodel", "base_model"),
        ("base-model", "base_model"),
        ("GATE_MODE", "gate_mode"),
        ("gatemode", "gate_mode"),
        ("dtypes", "dtype"),
        ("num_experts_per_tok", "experts_per_token"),
        ("shared_expert", "shared_experts"),
        ("arhcitecture", "architecture"),
        ("back_bone", "backbone"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_right_spelling(typed: str, meant: str) -> None:
    without = CLOWN_CAR.replace(f"{meant}:", "weight:")  # of as many lines
    assert refusal(without + f"{typed}: x\n") == f"config.yml:9: {typed}: unknown key, did you mean {meant}?"


def test_a_key_beside_the_one_that_it_looks_like_is_no_misspelling_of_it() -> None:
    with pytest.warns(MoeplanWarning) as warned:
        config = load(CLOWN_CAR + "    x_source_model: 1\nnum_experts: 2\n")
    assert config == clown_car()
    assert str(warned[0].message) == (
        "config.yml:9: experts[1].x_source_model: unknown key, ignored\n"
        "config.yml:10: num_experts: unknown key, ignored"
    )


def test_every_misspelt_key_is_named_in_the_order_of_the_file() -> None:
    message = refusal(CLOWN_CAR.replace("source_model", "source_mode") + "dtypes: float16\n")
    assert [line.split(": unknown")[0] for line in message.splitlines()] == [
        "config.yml:3: experts[0].source_mode",
        "config.yml:6: experts[1].source_mode",
        "config.yml:9: dtypes",
    ]


def test_a_misspelt_key_of_a_shared_expert_is_refused() -> None:
    message = refusal(CLOWN_CAR + "shared_experts:\n  - source_models: x\n")
    assert message == "config.yml:10: shared_experts[0].source_models: unknown key, did you mean source_model?"


def test_other_unknown_keys_are_warned_about_and_ignored() -> None:
    with pytest.warns(MoeplanWarning) as warned:
        config = load(CLOWN_CAR + "    weight: 1\ntokenizer_source: union\nyes: 1\n'': 2\n")
    assert config == clown_car()
    assert [str(warning.message) for warning in warned] == [
        "config.yml:9: experts[1].weight: unknown key, ignored\n"
        "config.yml:10: tokenizer_source: unknown key, ignored\n"
        "config.yml:11: yes: unknown key, ignored\n"
        "config.yml:12: '': unknown key, ignored"
    ]
    assert warned[0].filename == __file__


@pytest.mark.parametrize("key", ["model", "models", "prompts", "name", "tokenizer", "random_seed", "x-defaults"])
def test_a_key_of_another_meaning_is_no_misspelling(key: str) -> None:
    with pytest.warns(MoeplanWarning, match=f"config.yml:9: {key}: unknown key, ignored"):
        load(CLOWN_CAR + f"{key}: 1\n")


def test_a_key_that_a_terminal_would_obey_is_escaped() -> None:
    with pytest.warns(MoeplanWarning) as warned:
        load(CLOWN_CAR + '"a\\e[31m\\nb": 1\n')
    assert str(warned[0].message) == r"config.yml:9: 'a\x1b[31m\nb': unknown key, ignored"


def test_no_more_than_twenty_unknown_keys_are_listed() -> None:
    with pytest.warns(MoeplanWarning) as warned:
        load(CLOWN_CAR + "".join(f"k{i}: 1\n" for i in range(25)))
    lines = str(warned[0].message).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 5 more"


def test_no_more_than_twenty_problems_are_listed() -> None:
    message = refusal("base_model: b\nexperts:\n" + "- 1\n" * 23)
    assert message.splitlines()[-1] == "and 3 more"
    assert len(message.splitlines()) == 21


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CLOWN_CAR + "dtype: float16\ndtype: float16\n",
            "config.yml:10: dtype: written twice, first on line 9: remove one",
        ),
        (
            CLOWN_CAR + "    source_model: other\n",
            "config.yml:9: experts[1].source_model: written twice, first on line 6: remove one",
        ),
        (
            CLOWN_CAR + '"base_model": other\n',
            "config.yml:9: base_model: written twice, first on line 1: remove one",
        ),
        (
            CLOWN_CAR + "extra:\n  deep: {a: 1, a: 1}\n",
            "config.yml:10: extra.deep.a: written twice, first on line 10: remove one",
        ),
        (
            CLOWN_CAR + "    <<: {noise_scale: 1, noise_scale: 2}\n",
            "config.yml:9: experts[1].noise_scale: written twice, first on line 9: remove one",
        ),
    ],
)
def test_a_key_written_twice_is_refused(text: str, message: str) -> None:
    assert refusal(text) == message


def test_a_merged_mapping_may_have_the_keys_of_the_mapping_it_is_merged_into() -> None:
    config = load("""\
base_model: base
gate_mode: random
experts:
  - &doctor
    source_model: doctor
    noise_scale: 0.25
    residual_scale: 0.25
  - &german
    source_model: german
    <<: *doctor
    noise_scale: 0.5
  - <<: [{residual_scale: 4}, *german, *doctor]
    source_model: last
""")
    assert config.experts == (
        Expert(source_model="doctor", noise_scale=0.25, residual_scale=0.25),
        Expert(source_model="german", noise_scale=0.5, residual_scale=0.25),
        Expert(source_model="last", noise_scale=0.5, residual_scale=4.0),
    )


def test_a_null_takes_back_what_was_merged() -> None:
    text = UPCYCLING.replace("- source", "- &e\n    noise_scale: 1\n    source", 1)
    config = load(text + "  - <<: *e\n    noise_scale: null\n")
    assert [expert.noise_scale for expert in config.experts] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("value", "kind"), [("1", "a number"), ("[text]", "text")])
def test_a_merge_of_what_is_no_mapping_is_refused(value: str, kind: str) -> None:
    message = f"config.yml:9: experts[1].<<: takes a mapping or a list of mappings, not {kind}"
    assert refusal(CLOWN_CAR + f"    <<: {value}\n") == message


@pytest.mark.parametrize(("key", "kind"), [("[a]", "a list"), ("{a: b}", "a mapping")])
def test_a_key_that_is_no_word_is_refused(key: str, kind: str) -> None:
    assert refusal(CLOWN_CAR + f"    ? {key}\n    : 1\n") == (
        f"config.yml:9: experts[1]: a key must be a plain word, not {kind}"
    )


# ----------------------------------------------------------------------------------------------- values of each key


@pytest.mark.parametrize(
    ("typed", "kind"),
    [
        ("42", "a number"),
        ("12:30", "a number"),
        ("yes", "true or false"),
        ("null", "nothing"),
        ("2020-01-01", "a date"),
    ],
)
@pytest.mark.parametrize("key", ["positive_prompts", "negative_prompts"])
def test_a_prompt_that_is_not_text_is_refused(key: str, typed: str, kind: str) -> None:
    text = CLOWN_CAR.replace("    positive_prompts:\n      - Guten Tag", f"    {key}:\n      - {typed}")
    assert refusal(text) == (
        f"config.yml:8: experts[1].{key}[0]: must be text, but YAML reads {typed} as {kind}: put it in quotes"
    )
    quoted = CLOWN_CAR + f'    negative_prompts: ["{typed}"]\n'
    assert load(quoted).experts[1].negative_prompts == (typed,)


def test_a_prompt_and_a_model_that_are_numbers_without_a_point_are_text_as_in_safe_load() -> None:
    config = load(CLOWN_CAR.replace("Guten Tag", "1e5").replace("german", "12e-03"))
    assert config.experts[1] == Expert(source_model="12e-03", positive_prompts=("1e5",))


def test_a_prompt_that_is_left_out_is_refused() -> None:
    assert refusal(CLOWN_CAR + "      -\n") == (
        "config.yml:9: experts[1].positive_prompts[1]: "
        "must be text, but nothing stands here: write the text, or remove the entry"
    )


@pytest.mark.parametrize(("typed", "kind"), [("User: hello", "a mapping"), ("[Mode]", "a list")])
def test_a_prompt_that_yaml_takes_apart_is_refused(typed: str, kind: str) -> None:
    assert refusal(CLOWN_CAR.replace("Guten Tag", typed)) == (
        "config.yml:8: experts[1].positive_prompts[0]: "
        f"must be text, but YAML reads it as {kind}: put all of it in quotes"
    )


@pytest.mark.parametrize(
    ("typed", "kind"),
    [
        ("=", "a default value"),
        ("2020-13-45", "a date"),
        ("0001-01-01 00:00:00 +99:59", "a date"),
        ("0b_", "a number"),
        ("!!int foo", "a number"),
        ("!!float ''", "a number"),
        ("!!bool foo", "true or false"),
        ("!!timestamp foo", "a date"),
    ],
)
def test_what_yaml_itself_cannot_read_is_refused(typed: str, kind: str) -> None:
    shown = re.sub("^!!\\w+ ", "", typed).replace("''", '""')
    assert refusal(CLOWN_CAR.replace("Guten Tag", typed)) == (
        "config.yml:8: experts[1].positive_prompts[0]: "
        f"YAML takes {shown} for {kind} and cannot read it: put it in quotes"
    )


def test_prompts_that_are_no_list_are_refused() -> None:
    assert refusal(CLOWN_CAR + "    negative_prompts: a text\n") == (
        "config.yml:9: experts[1].negative_prompts: "
        "must be a list, not text: begin each entry with a dash, on a line of its own"
    )


def test_experts_that_are_no_list_are_refused() -> None:
    assert refusal("base_model: b\nexperts:\n  source_model: c\n") == (
        "config.yml:2: experts: must be a list, not a mapping: begin each entry with a dash, on a line of its own"
    )


@pytest.mark.parametrize(("typed", "kind"), [("doctor", "text"), ("null", "nothing"), ("[a]", "a list")])
def test_an_expert_that_is_no_mapping_is_refused(typed: str, kind: str) -> None:
    assert refusal(CLOWN_CAR + f"  - {typed}\n") == (
        f"config.yml:9: experts[2]: must be a mapping, not {kind}: write `source_model:` before the path of the model"
    )


@pytest.mark.parametrize("typed", ['"half"', "true", "a lot", "[1]"])
@pytest.mark.parametrize("key", ["noise_scale", "residual_scale"])
def test_a_scale_that_is_no_number_is_refused(key: str, typed: str) -> None:
    shown = "a list" if typed == "[1]" else typed
    assert refusal(CLOWN_CAR + f"    {key}: {typed}\n") == (
        f"config.yml:9: experts[1].{key}: must be a number such as 0.1, not {shown}"
    )


@pytest.mark.parametrize("typed", [".inf", "-.inf", ".nan", '"inf"', '"nan"', "1e39", "-1e39", "1e400"])
@pytest.mark.parametrize("key", ["noise_scale", "residual_scale"])
def test_a_scale_that_is_not_finite_is_refused(key: str, typed: str) -> None:
    least = "0" if key == "noise_scale" else "-3.4e38"
    assert refusal(CLOWN_CAR + f"    {key}: {typed}\n") == (
        f"config.yml:9: experts[1].{key}: "
        f"must be a number from {least} to 3.4e38, which is finite in float32, not {typed}"
    )


def test_negative_noise_is_refused() -> None:
    assert refusal(CLOWN_CAR + "    noise_scale: -0.1\n") == (
        "config.yml:9: experts[1].noise_scale: must be a number from 0 to 3.4e38, which is finite in float32, not -0.1"
    )


@pytest.mark.parametrize(
    ("typed", "shown"),
    [("2.5", "2.5"), ("'2.5'", '"2.5"'), ("true", "true"), ("two", "two"), (".nan", ".nan"), ("-.inf", "-.inf")],
)
def test_experts_per_token_that_is_no_whole_number_is_refused(typed: str, shown: str) -> None:
    assert refusal(CLOWN_CAR + f"experts_per_token: {typed}\n") == (
        f"config.yml:9: experts_per_token: must be a whole number such as 2, not {shown}"
    )


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("{model: {path: x}}", "x"),
        ("{model: {path: org/x, revision: v2}, lora: null}", "org/x@v2"),
        ("{lora: {path: y, revision: null}, model: x}", "x+y"),
        ("{model: x@v1, lora: {path: y, revision: v2}}", "x@v1+y@v2"),
    ],
)
def test_a_model_reference_may_be_a_mapping_as_mergekit_writes_it(typed: str, text: str) -> None:
    assert load(CLOWN_CAR.replace("source_model: german", f"source_model: {typed}")).experts[1].source_model == text


@pytest.mark.parametrize(
    "typed", ["{}", "{path: x}", "{model: {path: 1}}", "{model: {name: x}}", "{model: x, dtype: y}"]
)
@pytest.mark.parametrize("key", ["base_model", "source_model"])
def test_a_model_reference_that_is_another_mapping_is_refused(key: str, typed: str) -> None:
    value = {"base_model": "base", "source_model": "german"}[key]
    line, path = {"base_model": (1, key), "source_model": (6, f"experts[1].{key}")}[key]
    assert refusal(CLOWN_CAR.replace(f"{key}: {value}", f"{key}: {typed}")) == (
        f"config.yml:{line}: {path}: must be text, not a mapping: write the path of the model as one string"
    )


@pytest.mark.parametrize("typed", ['""', '"  "', r'"a\0b"'])
def test_a_model_reference_that_names_nothing_is_refused(typed: str) -> None:
    assert refusal(CLOWN_CAR.replace("german", typed)) == (
        "config.yml:6: experts[1].source_model: names no model: write a model's directory, or its name on the Hub"
    )


@pytest.mark.parametrize("base", ["", "base_model:\n", "base_model: null\n"])
def test_a_missing_base_model_is_refused(base: str) -> None:
    assert refusal(CLOWN_CAR.replace("base_model: base\n", base)) == (
        "config.yml:1: base_model: missing: write the path of a model's directory"
    )


def test_a_missing_source_model_is_refused_at_its_expert() -> None:
    assert refusal(CLOWN_CAR + "  - noise_scale: 1\n") == (
        "config.yml:9: experts[2].source_model: missing: write the path of a model's directory"
    )


def test_an_empty_architecture_is_refused() -> None:
    assert refusal(CLOWN_CAR + 'architecture: ""\n') == (
        "config.yml:9: architecture: names no family: remove it, and the family that fits is chosen"
    )


@pytest.mark.parametrize("where", ["positive_prompts", "architecture"])
def test_half_a_surrogate_pair_is_refused(where: str) -> None:
    added, path = {
        "positive_prompts": ('      - "\\ud83d"\n', "experts[1].positive_prompts[1]"),
        "architecture": ('architecture: "\\ud83d"\n', "architecture"),
    }[where]
    assert refusal(CLOWN_CAR + added) == (
        f"config.yml:9: {path}: holds half of a surrogate pair, which is no text: write the character"
    )


def test_json_s_spelling_of_an_emoji_is_that_emoji() -> None:
    prompts = load(CLOWN_CAR + '      - "\\ud83d\\ude00 é"\n').experts[1].positive_prompts
    assert prompts[1] == "\U0001f600 é"


def test_a_dtype_may_be_spelt_as_torch_s() -> None:
    config = load(CLOWN_CAR + "dtype: torch.bfloat16\n")
    assert config == load(CLOWN_CAR + "dtype: bfloat16\n")
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("BFloat16", "bfloat16"),
        ("bfloat_16", "bfloat16"),
        ("torch.bf16", "bfloat16"),
        ("fp16", "float16"),
        ("f16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("f32", "float32"),
        ("float", "float32"),
        ("float64", None),
        ("int8", None),
        ("16", None),
        ("[float16]", None),
    ],
)
def test_an_unknown_dtype_is_refused(typed: str, meant: str | None) -> None:
    hint = f", did you mean {meant}?" if meant else ""
    shown = "a list" if typed == "[float16]" else typed
    assert refusal(CLOWN_CAR + f"dtype: {typed}\n") == (
        f"config.yml:9: dtype: must be float32, float16 or bfloat16, not {shown}{hint}"
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hiden", "hidden"),
        ("Hidden", "hidden"),
        ("hidden_average", "hidden_avg"),
        ("cheap-embed", "cheap_embed"),
        ("cheap", "cheap_embed"),
        ("uniform", "uniform_random"),
        ("learned", None),
        ("yes", None),
    ],
)
def test_an_unknown_gate_mode_is_refused(typed: str, meant: str | None) -> None:
    hint = f", did you mean {meant}?" if meant else ""
    assert refusal(CLOWN_CAR + f"gate_mode: {typed}\n") == (
        "config.yml:9: gate_mode: must be hidden, hidden_avg, hidden_last, ridge, cheap_embed, random or "
        f"uniform_random, not {typed}{hint}"
    )


@pytest.mark.parametrize(("typed", "meant"), [("averaged", "average"), ("Base", "base"), ("mean", None)])
def test_an_unknown_backbone_is_refused(typed: str, meant: str | None) -> None:
    hint = f", did you mean {meant}?" if meant else ""
    assert refusal(CLOWN_CAR + f"backbone: {typed}\n") == (
        f"config.yml:9: backbone: must be base or average, not {typed}{hint}"
    )


def test_a_long_value_is_shortened_in_a_message() -> None:
    message = refusal(CLOWN_CAR + f"dtype: {'x' * 5000}\n")
    assert message.endswith(f"not {'x' * 60}...")


def test_all_wrong_values_are_named_in_the_order_of_the_file() -> None:
    message = refusal("dtype: bf16\n" + CLOWN_CAR + "    noise_scale: -1\n" + "experts_per_token: two\n")
    assert [line.split(": must")[0] for line in message.splitlines()] == [
        "config.yml:1: dtype",
        "config.yml:10: experts[1].noise_scale",
        "config.yml:11: experts_per_token",
    ]


# ------------------------------------------------------------------------------------------- rules between the keys


@pytest.mark.parametrize("experts", ["experts: []\n", "experts:\n", "experts: null\n", ""])
@pytest.mark.parametrize("mode", ["hidden", "random"])
def test_a_config_without_experts_is_refused(experts: str, mode: str) -> None:
    message = refusal(f"base_model: b\ngate_mode: {mode}\n" + experts)
    line = 3 if experts else 1
    problem = "no experts" if "[]" in experts else "missing"
    assert message == f"config.yml:{line}: experts: {problem}: list at least one model"


@pytest.mark.parametrize("count", ["0", "-1"])
def test_less_than_one_expert_per_token_is_refused(count: str) -> None:
    assert refusal(UPCYCLING + f"experts_per_token: {count}\n") == (
        f"config.yml:6: experts_per_token: must be at least 1, not {count}"
    )


def test_more_experts_per_token_than_experts_are_refused() -> None:
    assert refusal(UPCYCLING + "experts_per_token: 3\n") == (
        "config.yml:6: experts_per_token: 3 is more than the number of experts: write at most 2"
    )


def test_the_default_experts_per_token_is_refused_for_a_single_expert() -> None:
    assert refusal("base_model: b\ngate_mode: random\nexperts: [{source_model: a}]\n") == (
        "config.yml:1: experts_per_token: 2 (the default) is more than the number of experts: write at most 1"
    )


def test_as_many_experts_per_token_as_experts_are_taken() -> None:
    assert load(UPCYCLING + "experts_per_token: 2\n").experts_per_token == 2
    assert load(UPCYCLING + "experts_per_token: 1\n").experts_per_token == 1


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "hidden_last", "ridge", "cheap_embed"])
@pytest.mark.parametrize("prompts", ["", "    positive_prompts: []\n", "    positive_prompts:\n"])
def test_an_expert_without_positive_prompts_is_refused_where_the_router_is_made_of_them(
    mode: str, prompts: str
) -> None:
    added = f"  - source_model: other\n    negative_prompts: [x]\n{prompts}gate_mode: {mode}\n"
    assert refusal(CLOWN_CAR + added) == (
        f"config.yml:{11 if prompts else 9}: experts[2].positive_prompts: no positive prompts, "
        f"which gate_mode {mode} makes this expert's router weights from: write at least one, or positive_files, or "
        "use gate_mode random"
    )


def test_files_and_samples_stand_for_prompts() -> None:
    config = load("""\
base_model: base
gate_mode: ridge
ridge: 1
gate_tokens: 100
experts:
  - source_model: doctor
    positive_files: [notes.txt, records.jsonl]
  - source_model: german
    positive_samples: 16
""")
    assert (config.ridge, config.gate_tokens) == (1.0, 100)
    assert config.experts[0].positive_files == ("notes.txt", "records.jsonl")
    assert config.experts[1].positive_samples == 16


def test_the_same_files_for_every_expert_are_refused_and_samples_of_different_models_are_not() -> None:
    experts = "  - {source_model: a, positive_files: [x]}\n  - {source_model: b, positive_files: [x]}\n"
    assert refusal("base_model: b\nexperts:\n" + experts) == SAME_PROMPTS
    assert load("base_model: b\ngate_mode: ridge\nexperts:\n" + experts.replace("files: [x]", "samples: 2"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ridge: 0", "ridge: must be a number from 1e-8 to a million, not 0"),
        ("ridge: 1.0e-9", "ridge: must be a number from 1e-8 to a million, not 1.0e-9"),
        ("ridge: .inf", "ridge: must be a number from 1e-8 to a million, not .inf"),
        ("ridge: much", "ridge: must be a number such as 0.1, not much"),
        ("gate_tokens: 0", "gate_tokens: must be a whole number from 1 to 1,048,576, not 0"),
        ("gate_tokens: 1048577", "gate_tokens: must be a whole number from 1 to 1,048,576, not 1048577"),
        ("gate_tokens: 1.5", "gate_tokens: must be a whole number such as 2, not 1.5"),
        (
            "    positive_files: [a, '']",
            "experts[1].positive_files[1]: names no file: write the path of a file of text",
        ),
        ("    positive_samples: -1", "experts[1].positive_samples: must be a whole number from 0 to 1,024, not -1"),
        ("    positive_samples: 9999", "experts[1].positive_samples: must be a whole number from 0 to 1,024, not 9999"),
    ],
)
def test_wrong_settings_of_ridge_are_refused(line: str, message: str) -> None:
    assert refusal(CLOWN_CAR + line + "\n") == f"config.yml:9: {message}"


@pytest.mark.parametrize("mode", ["random", "uniform_random"])
def test_a_random_router_needs_neither_prompts_nor_distinct_sources(mode: str) -> None:
    assert load(UPCYCLING.replace("random", mode)).gate_mode == mode
    same = UPCYCLING.replace("random", mode).replace("- source", "- positive_prompts: [x]\n    source")
    assert load(same).gate_mode == mode


SAME_PROMPTS = (
    "config.yml:2: experts: the prompts are the same for every expert, so the router could not tell them apart: "
    "give each expert prompts of its own, or use gate_mode random"
)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "hidden_last", "cheap_embed"])
def test_prompts_that_are_the_same_for_every_expert_are_refused(mode: str) -> None:
    assert refusal(CLOWN_CAR.replace("Guten Tag", "The patient") + f"gate_mode: {mode}\n") == SAME_PROMPTS


def test_the_same_prompts_in_another_order_are_refused() -> None:
    one = CLOWN_CAR.replace("Guten Tag", "The patient\n      - Guten Tag")
    assert refusal(one.replace("- The patient\n  -", "- Guten Tag\n      - The patient\n  -")) == SAME_PROMPTS


def test_prompts_that_differ_in_one_expert_or_in_negative_prompts_are_taken() -> None:
    same = CLOWN_CAR.replace("Guten Tag", "The patient")
    assert load(same + "    negative_prompts: [other]\n")
    assert load(same + "  - source_model: third\n    positive_prompts: [other]\n")
    swapped = same.replace(
        "    positive_prompts:\n      - The patient\n  -", "    positive_prompts: [a]\n    negative_prompts: [b]\n  -"
    )
    assert load(swapped)


def test_a_prompt_moved_from_positive_to_negative_is_a_difference() -> None:
    experts = (
        Expert(source_model="a", positive_prompts=("x", "y"), negative_prompts=("z",)),
        Expert(source_model="b", positive_prompts=("x",), negative_prompts=("y", "z")),
    )
    assert clown_car(experts=experts).experts == experts


SAME_SOURCES = (
    "config.yml:2: experts: all sources are the same model, so until it is trained the merge can do no more than that "
    "model, and costs more: name different models, or, to train the result, pass "
    "--i-understand-this-is-not-useful-without-training"
)


def test_sources_that_are_all_the_same_are_refused_unless_that_is_asked_for() -> None:
    same = CLOWN_CAR.replace("german", "doctor")
    assert refusal(same) == SAME_SOURCES
    assert load(same, allow_all_same=True).experts[1].source_model == "doctor"


@pytest.mark.parametrize("other", ["./doctor", "doctor/", "link", "{cwd}/doctor", "doctor/../doctor"])
def test_one_directory_under_two_names_is_the_same_source(tmp_path: Path, other: str) -> None:
    Path("doctor").mkdir()
    Path("link").symlink_to("doctor")
    assert refusal(CLOWN_CAR.replace("german", other.format(cwd=tmp_path))) == SAME_SOURCES


def test_one_source_that_differs_is_enough() -> None:
    same = CLOWN_CAR.replace("german", "doctor")
    assert load(same + "  - source_model: other\n    positive_prompts: [z]\n")


def test_a_single_expert_is_neither_the_same_as_others_nor_in_need_of_distinct_prompts() -> None:
    config = load("base_model: b\nexperts_per_token: 1\nexperts: [{source_model: b, positive_prompts: [x]}]\n")
    assert len(config.experts) == 1


def test_more_than_one_shared_expert_is_refused() -> None:
    shared = "shared_experts:\n  - source_model: a\n"
    assert load(CLOWN_CAR + shared).shared_experts == (Expert(source_model="a"),)
    assert refusal(CLOWN_CAR + shared + "  - source_model: b\n") == (
        "config.yml:11: shared_experts[1]: only one shared expert can be built: remove the others"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": ()}, "experts: no experts: list at least one model"),
        ({"experts_per_token": 0}, "experts_per_token: must be at least 1, not 0"),
        ({"experts_per_token": 3}, "experts_per_token: 3 is more than the number of experts"),
        ({"experts_per_token": True}, "experts_per_token\n  Input should be a valid integer"),
        (
            {"experts": (Expert(source_model="a"), Expert(source_model="b"))},
            r"experts\[0\].positive_prompts: no positive",
        ),
        ({"experts": (Expert(source_model="a", positive_prompts=("x",)),) * 2}, "experts: the prompts are the same"),
        ({"shared_experts": (Expert(source_model="a"),) * 2}, r"shared_experts\[1\]: only one shared expert"),
        ({"gate_mode": "learned"}, "gate_mode\n  Input should be 'hidden'"),
        ({"base_model": ""}, "base_model\n  names no model"),
        ({"dtypes": "float16"}, "dtypes\n  Extra inputs are not permitted"),
    ],
)
def test_a_config_built_in_python_obeys_the_same_rules(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        clown_car(**changes)


@pytest.mark.parametrize(
    "values",
    [
        {"source_model": 1},
        {"positive_prompts": "text"},
        {"positive_prompts": (42,)},
        {"negative_prompts": (None,)},
        {"noise_scale": True},
        {"noise_scale": "half"},
        {"noise_scale": -1.0},
        {"residual_scale": float("nan")},
        {"residual_scale": float("inf")},
        {"weight": 1.0},
    ],
)
def test_an_expert_built_in_python_is_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        Expert(**{"source_model": "a", **values})


# -------------------------------------------------------------------------------------------- files that are no config


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^nope\.yml: no such file: give the path of the YAML file$"):
        load_config("nope.yml")


def test_a_directory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^\.: is a directory: give the path of the YAML file$"):
        load_config(".")


def test_a_socket_is_refused() -> None:
    os.mknod("socket", stat.S_IFSOCK | 0o600)
    with pytest.raises(ConfigError, match=r"^socket: is neither a file nor a pipe: give"):
        load_config("socket")


def test_a_pipe_is_read_once() -> None:
    reading, writing = os.pipe()
    os.write(writing, CLOWN_CAR.encode())
    os.close(writing)
    config = load_config(f"/dev/fd/{reading}")
    os.close(reading)
    assert config.source_text == CLOWN_CAR


def test_a_pipe_without_end_is_read_to_the_limit() -> None:
    with pytest.raises(ConfigError, match=r"^/dev/zero: larger than 1 MiB: is this really the YAML file\?$"):
        load_config("/dev/zero")


def test_a_path_through_a_file_is_refused() -> None:
    Path("file").touch()
    with pytest.raises(ConfigError, match=r"^file/config\.yml: cannot be read: Not a directory$"):
        load_config("file/config.yml")


def test_a_path_with_a_nul_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^'a\\x00b': is no path: give the path of the YAML file$"):
        load_config("a\0b")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "\ufeff"])
def test_an_empty_file_is_refused(text: str) -> None:
    assert refusal(text) == "config.yml: empty: write base_model and experts"


@pytest.mark.parametrize("text", ["\n- a\n- b\n", "\ntext\n", "\n[]\n", "\n42\n"])
def test_a_file_that_is_no_mapping_is_refused(text: str) -> None:
    assert refusal(text) == "config.yml:2: must be a mapping of keys such as base_model and experts"


def test_a_second_document_is_refused() -> None:
    assert refusal(CLOWN_CAR + "---\nbase_model: other\n") == (
        "config.yml:9: a second document begins here: write one document a file"
    )
    assert load("---\n" + CLOWN_CAR + "...\n") == clown_car()


def test_a_large_file_is_refused() -> None:
    padding = "#" * ((1 << 20) - len(CLOWN_CAR))
    assert load(CLOWN_CAR + padding) == clown_car()
    assert refusal(CLOWN_CAR + padding + "#") == "config.yml: larger than 1 MiB: is this really the YAML file?"


def test_bytes_that_are_no_utf_8_are_refused() -> None:
    assert refusal(CLOWN_CAR.encode() + b"dtype: \xff\n") == (
        "config.yml:9: not UTF-8 text (byte 0xff): save the file as UTF-8"
    )
    assert refusal(CLOWN_CAR.encode("utf-16")).startswith("config.yml:1: not UTF-8 text (byte 0x")


@pytest.mark.parametrize("code", [0x00, 0x07, 0x1B, 0x7F, 0xFFFE])
def test_a_control_character_is_refused(code: int) -> None:
    assert refusal(CLOWN_CAR + f"dtype: {chr(code)}\n") == (
        f"config.yml:9: the character U+{code:04X} cannot stand in YAML: remove it"
    )


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("\tdtype: x\n", 9, r"while scanning for the next token, found character '\t' that cannot start any token"),
        ("dtype: [a\nx: y\n", 10, "while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("dtype: *name\n", 9, "found undefined alias 'name'"),
        ("dtype: @x\n", 9, "while scanning for the next token, found character '@' that cannot start any token"),
    ],
)
def test_what_is_not_yaml_is_refused(text: str, line: int, problem: str) -> None:
    assert refusal(CLOWN_CAR + text) == (
        f"config.yml:{line}: not valid YAML: {problem}: "
        "check the indentation, and put text with special characters in quotes"
    )


@pytest.mark.parametrize("text", ['dtype: "\\U00110000"\n', 'dtype: "\\UFFFFFFFF"\n'])
def test_an_escape_that_is_no_character_is_refused(text: str) -> None:
    assert refusal(CLOWN_CAR + text) == (
        "config.yml:9: the number of a \\U escape or a %YAML directive is out of range: correct it"
    )


def test_a_version_of_yaml_that_is_no_number_to_python_is_refused() -> None:
    assert refusal(f"%YAML {'9' * 5000}.1\n---\n{CLOWN_CAR}") == (
        "config.yml:1: the number of a \\U escape or a %YAML directive is out of range: correct it"
    )


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        ("!!python/object/apply:os.system [touch pwned]", "!!python/object/apply:os.system"),
        ("!!python/name:os.system", "!!python/name:os.system"),
        ("!mine x", "!mine"),
        ("!!binary aGk=", "!!binary"),
        ("!!set {a, b}", "!!set"),
        ("!!str [a]", "!!str"),
        ("{? !mine x : y}", "!mine"),
    ],
)
def test_a_tag_is_refused_and_nothing_executed(value: str, tag: str) -> None:
    assert refusal(CLOWN_CAR + f"extra: {value}\n") == (
        f"config.yml:9: the tag {tag} is not one that a config may use: put text that begins with ! in quotes"
    )
    assert not Path("pwned").exists()


def test_deep_nesting_is_refused() -> None:
    assert load(CLOWN_CAR.replace("base\n", "base # " + "[" * 1000 + "\n")) == clown_car()
    message = "config.yml:9: nested more than 32 levels deep, where a config needs five"
    assert refusal(CLOWN_CAR + "extra: " + "[" * 32 + "]" * 32 + "\n") == message
    assert refusal(CLOWN_CAR + "extra: " + "[" * 500_000) == message
    with pytest.warns(MoeplanWarning, match="extra: unknown key"):
        load(CLOWN_CAR + "extra: " + "[" * 31 + "]" * 31 + "\n")


@pytest.mark.parametrize("link", ["[*a{}]", "[*a{}, shallow]", "[shallow, *a{}]", "{{<<: *a{}}}"])
def test_aliases_that_nest_deeply_are_refused(link: str) -> None:
    chain = "".join(f"a{i + 1}: &a{i + 1} {link.format(i)}\n" for i in range(2000))
    assert refusal("a0: &a0 {}\n" + chain) == (
        "config.yml:32: nested more than 32 levels deep, where a config needs five"
    )


def test_an_alias_bomb_is_refused() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(20)
    )
    start = time.monotonic()
    assert refusal(bomb) == (
        "config.yml:5: more than 25,000 values, counting each alias as all that it stands for: too many"
    )
    assert time.monotonic() - start < 10


def test_aliases_count_as_what_they_stand_for() -> None:
    # 13 values without aliases (root, keys, prompts ...); each alias adds its list and the 999 texts in it.
    texts = f"x-texts: &t [{', '.join(['x'] * 999)}]\n"
    with pytest.warns(MoeplanWarning):
        load(CLOWN_CAR + texts + f"x-more: [{', '.join(['*t'] * 23)}]\n")
    assert "too many" in refusal(CLOWN_CAR + texts + f"x-more: [{', '.join(['*t'] * 24)}]\n")


def test_an_alias_of_itself_is_refused() -> None:
    assert refusal(CLOWN_CAR + "extra: &a\n  - [*a]\n") == "config.yml:10: the alias *a is part of what it stands for"


@pytest.mark.parametrize("number", ["1" + ":1" * 200_000, "0x" + "f" * 200_000, "9" * 5000])
def test_a_number_that_takes_long_to_read_is_refused(number: str) -> None:
    start = time.monotonic()
    assert refusal(CLOWN_CAR + f"experts_per_token: {number}\n") == (
        f"config.yml:9: experts_per_token: YAML takes {number[:60]}... for a number and cannot read it: "
        "put it in quotes"
    )
    assert time.monotonic() - start < 3


# ------------------------------------------------------------------------------------------------------- any file


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeplanWarning)
        yield


BASIS = CLOWN_CAR.replace("- source_model: doctor", "- &d\n    source_model: doctor") + (
    "  - <<: *d\n    source_model: third\n    noise_scale: 0.5\n    negative_prompts: [\"a\\n\", 'b']\n"
)
FRAGMENTS = [
    *("{", "}", "[", "]", ",", ": ", "? ", "- ", "|", "> ", "'", '"', "#", " #", "@", "%", "!", "=", "~"),
    *("---\n", "...\n", "\t", "\r", "\n", "  ", "\u2028", "\x85", "\ufeff", "\0", "\x1b", "é", "🤡"),
    *("&a", "*a", "*d", "<<", "<<: *d", "!!str ", "!!int ", "!!float ", "!!python/name:os ", "%YAML 9.9\n"),
    *("null", "yes", "0b_", "1:1", "2020-01-01", "2020-13-45", "1e400", ".nan", "\\ud800", '"\\U00110000"'),
    *("experts", "source_model", "dtype: bf16\n", "random"),
]


def problems_of(content: bytes) -> list[str]:
    Path("config.yml").write_bytes(content)
    try:
        load_config("config.yml")
    except ConfigError as error:
        return str(error).splitlines()
    return []


def is_printable_and_names_the_file(line: str) -> bool:
    return line.isprintable() and line.startswith(("config.yml:", "and "))


FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.mark.usefixtures("quiet")
@FUZZ
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_load_or_are_refused(content: bytes) -> None:
    assert all(map(is_printable_and_names_the_file, problems_of(content)))


@pytest.mark.usefixtures("quiet")
@settings(FUZZ, max_examples=300)
@given(
    st.lists(
        st.tuples(st.integers(0, len(BASIS)), st.integers(0, 12), st.sampled_from(FRAGMENTS)), min_size=1, max_size=4
    )
)
def test_any_damaged_config_loads_or_is_refused(edits: list[tuple[int, int, str]]) -> None:
    text = BASIS
    for at, length, inserted in edits:
        text = text[:at] + inserted + text[at + length :]
    assert all(map(is_printable_and_names_the_file, problems_of(text.encode())))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SCALES = st.floats(0, 1e30)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "source_model": TEXTS.filter(lambda text: text.strip() and "\0" not in text),
        "positive_prompts": st.none() | st.lists(TEXTS, max_size=3),
        "negative_prompts": st.none() | st.lists(TEXTS, max_size=3),
        "positive_files": st.none() | st.lists(TEXTS.filter(lambda text: "\0" not in text), max_size=3),
        "positive_samples": st.none() | st.integers(0, 1024),
        "noise_scale": st.none() | SCALES | st.integers(0, 5),
        "residual_scale": st.none() | SCALES,
    },
)


@FUZZ
@given(FIELDS, FIELDS, FIELDS, st.sampled_from(["<<: *a", "<<: [*a, *b]", "<<: [*b, *a]", "<<: *a\n  <<: *b"]))
def test_every_text_number_and_merge_is_read_as_safe_load_reads_it(
    first: dict[str, Any], second: dict[str, Any], third: dict[str, Any], merge: str
) -> None:
    def expert(head: str, fields: dict[str, Any]) -> str:
        lines = yaml.safe_dump(fields, width=1000).splitlines() if fields else []
        return "".join(f"  {line}\n" for line in (head, *lines)).replace("  ", "- ", 1)

    text = "base_model: base\ngate_mode: random\nexperts_per_token: 1\nexperts:\n"
    text += expert("&a", {"source_model": "one", **first}) + expert("&b", {"source_model": "two", **second})
    text += expert(merge, third)
    expected = yaml.safe_load(text)
    expected["experts"] = [
        {key: value for key, value in fields.items() if value is not None} for fields in expected["experts"]
    ]
    assert load(text) == MergeConfig.model_validate(expected)
