"""Opening LoRA adapters: what does not belong to the model, is of another kind, broken or hostile is refused."""

import json
import os
import re
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moeplan, sparse_llama, write_config
from safetensors.torch import save_file

from moeplan.adapter import ADAPTER_BIN_WEIGHTS, ADAPTER_WEIGHTS
from moeplan.adapter_config import ADAPTER_CONFIG, MERGE_ADAPTER
from moeplan.architectures import as_dense_model
from moeplan.architectures.dense import DenseModel
from moeplan.checkpoint import open_checkpoint
from moeplan.errors import MoeplanWarning
from moeplan.places import CheckpointError
from planner.expr import DType, Read

UP = "base_model.model.model.layers.0.mlp.up_proj."
DOWN = "base_model.model.model.layers.1.mlp.down_proj."
QUERY = "base_model.model.model.layers.0.self_attn.q_proj."

TENSORS = {
    UP + "lora_A.weight": (4, 64),
    UP + "lora_B.weight": (96, 4),
    DOWN + "weight": (64, 96),
    QUERY + "lora_A.weight": (4, 64),
    QUERY + "lora_B.weight": (64, 4),
    "base_model.model.lm_head.weight": (500, 64),
}


@pytest.fixture
def model(tmp_path: Path) -> DenseModel:
    return as_dense_model(open_checkpoint(sparse_llama(tmp_path / "base")))


def write_adapter(path: Path, shapes: dict[str, Any] = TENSORS, **config: Any) -> Path:
    """Write an adapter on the modules that it has factors of; `...` leaves a setting out."""
    path.mkdir(exist_ok=True)
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, path / ADAPTER_WEIGHTS)
    targets = sorted({match[1] for name in shapes if (match := re.match(r"base_model\.model\.(.+)\.lora_", name))})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, **config}
    kept = {key: value for key, value in settings.items() if value is not ...}
    (path / ADAPTER_CONFIG).write_text(json.dumps(kept))
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_what_an_adapter_adds_to_an_output_matrix_is_left_out_also_where_that_is_the_embeddings(
    tmp_path: Path, tied: bool
) -> None:
    model = as_dense_model(open_checkpoint(sparse_llama(tmp_path / "base", tie_word_embeddings=tied)))
    factors = {"base_model.model.lm_head.lora_A.weight": (4, 64), "base_model.model.lm_head.lora_B.weight": (500, 4)}
    adapter = model.with_adapter(write_adapter(tmp_path / "lora", factors)).adapter
    assert adapter is not None
    assert adapter.left_out == ["lm_head.lora_A.weight", "lm_head.lora_B.weight"]


def test_a_model_that_ties_its_output_matrix_may_be_without_embeddings(tmp_path: Path) -> None:
    """Of an expert no more is needed than its MLPs."""
    base = sparse_llama(tmp_path / "base", tie_word_embeddings=True, num_hidden_layers=1)
    shapes = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    mlp = {f"model.layers.0.mlp.{part}.weight": torch.zeros(shape) for part, shape in shapes.items()}
    save_file(mlp, base / "model.safetensors")
    model = as_dense_model(open_checkpoint(base))
    factors = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (4, 64),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": (96, 4),
    }
    assert model.with_adapter(write_adapter(tmp_path / "lora", factors)).adapter is not None


@pytest.fixture
def refusal(model: DenseModel, tmp_path: Path) -> Callable[..., str]:
    """`refusal(path)`: the message with which an adapter on `model` is refused, without the directory's name."""

    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            model.with_adapter(path)
        message = str(error.value)
        assert message.isprintable()
        assert len(message) < 1000
        return message.replace(f"{tmp_path}/", "")

    return refused


def test_an_adapter_s_tensors_lie_where_the_file_has_them(model: DenseModel, tmp_path: Path) -> None:
    adapter = model.with_adapter(write_adapter(tmp_path / "lora")).adapter
    assert adapter is not None
    delta = adapter.added["model.layers.0.mlp.up_proj.weight"]
    assert (delta.a.shape, delta.b.shape, delta.scale) == ((4, 64), (96, 4), 2.0)
    replacement = adapter.replaced["model.layers.1.mlp.down_proj.weight"]
    assert (replacement.dtype, replacement.shape) == (DType.BF16, (64, 96))
    assert len(adapter.added) == len(adapter.replaced) == 1
    assert {Path(read.file.path) for read in adapter.reads} == {tmp_path / "lora" / ADAPTER_WEIGHTS}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3.0, "use_rslora": True}, 1.5),
        ({"lora_alpha": 3, "use_rslora": 1}, 1.5),  # whatever is true to Python is to peft
        ({"lora_alpha": 3, "use_rslora": None}, 0.75),
        ({"lora_alpha": ..., "r": ..., "rank_pattern": {"up_proj": 4}}, 2.0),  # 8 is peft's default for both
        ({"alpha_pattern": {"mlp.up_proj": 1}}, 0.25),
        ({"alpha_pattern": {"p_proj": 1, "up_proj": 2, "mlp.up_proj": 1}}, 0.5),  # whole names, and the first counts
        ({"alpha_pattern": {r"layers\.[0-5]\.mlp\.(?:up|gate)_proj": 4}}, 1.0),
        ({"alpha_pattern": {r"^model.*": 0}, "rank_pattern": None}, 0.0),
        ({"alpha_pattern": {r"model\.layers\.\d+\..*_proj": 1}}, 0.25),
        ({"target_parameters": ["mlp.up_proj.weight"], "alpha_pattern": {}}, 2.0),
        ({"init_lora_weights": "gaussian", "use_dora": False, "alora_invocation_tokens": None}, 2.0),
        *(({"init_lora_weights": init}, 2.0) for init in (None, True, False, "eva", "orthogonal")),
    ],
)
def test_the_scale_is_that_of_the_first_pattern_that_fits(
    model: DenseModel, tmp_path: Path, config: dict[str, Any], scale: float
) -> None:
    adapter = model.with_adapter(write_adapter(tmp_path / "lora", **config)).adapter
    assert adapter is not None
    assert adapter.added["model.layers.0.mlp.up_proj.weight"].scale == scale


MERGE = "merge the adapter into its base model first (peft's merge_and_unload)"

# name: settings, what the message says
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "LoHa": ({"peft_type": "LOHA"}, f"`peft_type` is 'LOHA', and moeplan adds LORA alone; {MERGE}"),
    "LoKr": ({"peft_type": "LOKR"}, "`peft_type` is 'LOKR'"),
    "IA3": ({"peft_type": "IA3"}, "`peft_type` is 'IA3'"),
    "AdaLoRA": ({"peft_type": "ADALORA"}, "`peft_type` is 'ADALORA'"),
    "no kind": ({"peft_type": ...}, "`peft_type` is None"),
    "DoRA": ({"use_dora": True}, f"`use_dora` is True, which is more than a product to add; {MERGE}"),
    "biases of factors": ({"lora_bias": True}, "`lora_bias` is True"),
    "activated LoRA": ({"alora_invocation_tokens": [1, 2]}, "`alora_invocation_tokens` is [1, 2]"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication` is [[0, 2], [1, 2]]"),
    "an init that is a list": ({"init_lora_weights": ["gaussian"]}, "`init_lora_weights` is ['gaussian']"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is 'pissa_niter_4': the adapter belongs on"),
    "OLoRA": ({"init_lora_weights": "olora"}, f"changed when its training began; {MERGE}"),
    "a rank of text": ({"r": "4"}, "`r` has '4' for a rank; it must be a whole number from 1 up"),
    "rank 0": ({"r": 0}, "`r` has 0 for a rank"),
    "rank true": ({"r": True}, "`r` has True for a rank"),
    "no rank, which is 8": ({"r": ...}, "make it [8, 64]"),
    "another rank": (
        {"r": 8},
        f"'{UP}lora_A.weight' has shape [4, 64], and the model and {ADAPTER_CONFIG} make it [8, 64]",
    ),
    "a rank of a pattern": ({"rank_pattern": {"up_proj": 2}}, "make it [2, 64]"),
    "a pattern's rank of text": ({"rank_pattern": {"up_proj": "2"}}, "`rank_pattern` has '2' for a rank"),
    "an endless scale": ({"lora_alpha": 10**20}, "`lora_alpha` has 1e+20 for a scale"),
    "a scale of text": ({"alpha_pattern": {"x": "1"}}, "`alpha_pattern` has '1' for a scale; it must be a number"),
    "scales of parameters": (
        {"target_parameters": ["mlp.gate_proj.weight"], "alpha_pattern": {"gate_proj": 32}},
        f"`alpha_pattern` is matched with other names by peft for `target_parameters` than for modules; {MERGE}",
    ),
    "ranks of parameters": (
        {"target_parameters": ["mlp.gate_proj.weight"], "rank_pattern": {"gate_proj": 32}},
        "`rank_pattern` is matched with other names",
    ),
    "patterns in a list": ({"alpha_pattern": ["x"]}, "`alpha_pattern` must map at most 1,024 modules to values"),
    "many patterns": ({"rank_pattern": {f"m{n}": 1 for n in range(2000)}}, "must map at most 1,024 modules"),
    "many expressions": ({"rank_pattern": {f"m{n}.*": 1 for n in range(20)}}, "up to 16 simple expressions"),
    "an expression that takes centuries": (
        {"alpha_pattern": {"(.*)*(.*)*(.*)*x": 1}},
        "`alpha_pattern` has the pattern '(.*)*(.*)*(.*)*x'; moeplan matches names of modules",
    ),
    "an expression of many repeats": ({"alpha_pattern": {".*.*.*x": 1}}, "has the pattern '.*.*.*x'"),
    "an expression of alternatives": ({"alpha_pattern": {"(.|.)" * 30: 1}}, "has the pattern '(.|.)(.|.)"),
    "no expression": ({"alpha_pattern": {"[z-a]": 1}}, "`alpha_pattern` has a pattern that is no regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_an_adapter_of_another_kind_or_with_a_broken_config_is_refused(
    case: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    config, reason = CONFIGS[case]
    message = refusal(write_adapter(tmp_path / "lora", **config))
    assert message.startswith(f"lora/{ADAPTER_WEIGHTS if 'make it' in reason else ADAPTER_CONFIG}: ")
    assert reason in message


def test_a_setting_that_is_not_known_is_a_warning_where_it_says_something(model: DenseModel, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "lora", use_lora_of_2027=True, another=None, a_third=False, a_fourth={})
    with pytest.warns(MoeplanWarning) as given:
        model.with_adapter(path)
    assert [str(warning.message) for warning in given] == [
        f"{path / ADAPTER_CONFIG}: 'use_lora_of_2027' is True, which moeplan does not know: if that changes what the "
        f"adapter does, {MERGE_ADAPTER}"
    ]


def test_of_many_unknown_settings_a_few_are_named(model: DenseModel, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "lora", **{f"{n}\x1b[2J{'x' * 500}": "y" * 500 for n in range(1000)})
    with pytest.warns(MoeplanWarning, match=r"\(and 997 more\), which moeplan does not know") as given:
        model.with_adapter(path)
    (message,) = (str(warning.message) for warning in given)
    assert message.isprintable()
    assert len(message) < 1000


def test_what_peft_saves_is_known(model: DenseModel, tmp_path: Path) -> None:
    from peft import LoraConfig

    path = write_adapter(tmp_path / "lora")
    LoraConfig(r=4, target_modules=["up_proj"], layers_to_transform=[0]).save_pretrained(path)
    old = {"enable_lora": [True], "merge_weights": True}  # of peft before 0.4
    (path / ADAPTER_CONFIG).write_text(json.dumps({**json.loads((path / ADAPTER_CONFIG).read_text()), **old}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.with_adapter(path)
    for setting in json.loads((path / ADAPTER_CONFIG).read_text()):
        with warnings.catch_warnings(record=True) as given, suppress(CheckpointError):
            warnings.simplefilter("always")
            model.with_adapter(write_adapter(path, **{setting: True}))
        assert not [warning for warning in given if "does not know" in str(warning.message)], setting


# name: tensors to add, or to take away with None, what the message says
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "half a product": ({UP + "lora_A.weight": None}, f"there is no {UP}lora_A.weight, and its other half is there"),
    "the other half": ({UP + "lora_B.weight": None}, f"there is no {UP}lora_B.weight"),
    "a model of other sizes": (
        {UP + "lora_B.weight": (128, 4)},
        f"'{UP}lora_B.weight' has shape [128, 4], and the model and {ADAPTER_CONFIG} make it [96, 4]; was the adapter",
    ),
    "a factor with three dimensions": ({UP + "lora_A.weight": (4, 8, 8)}, "has shape [4, 8, 8]"),
    "a replacement of another shape": ({DOWN + "weight": (96, 64)}, "has shape [96, 64]"),
    "more layers": (
        {f"{QUERY.replace('0', '7')}lora_A.weight": (4, 64)},
        "layers.7.self_attn.q_proj.lora_A.weight' belongs to no weight of the model: was it trained on another one?",
    ),
    "DoRA's magnitudes": ({UP + "lora_magnitude_vector": (96,)}, "lora_magnitude_vector' belongs to no weight of"),
    "a bias": ({UP + "bias": (96,)}, "up_proj.bias' belongs to no weight of the model"),
    "a factor's bias": ({UP + "lora_B.bias": (96,)}, "lora_B.bias' belongs to no weight of the model"),
    "names of a program that is not peft": ({"lora_unet_mlp.lora_up.weight": (4, 4)}, "is not named as peft names"),
    "an MLP that is replaced and added to": ({UP + "weight": (96, 64)}, "is replaced and added to at once"),
    "terminal codes": ({"base_model.model.x\x1b[2J.mlp.": (1,)}, r"x\\x1b[2J.mlp.' belongs to no weight"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_adapter_for_another_model_or_with_more_than_products_is_refused(
    case: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    changes, reason = OTHERS[case]
    shapes = {name: shape for name, shape in {**TENSORS, **changes}.items() if shape is not None}
    message = refusal(write_adapter(tmp_path / "lora", shapes))
    assert message.startswith(f"lora/{ADAPTER_WEIGHTS}: ")
    assert reason.replace("\\\\", "\\") in message


UP_IN_0 = "model.layers.0.mlp.up_proj"

# settings, what the message says; None: it is taken, without a word
TARGETS: list[tuple[dict[str, Any], str | None]] = [
    ({"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [0]}, None),
    ({"target_modules": ["0.mlp.up_proj"], "layers_to_transform": 0, "layers_pattern": []}, None),
    ({"target_modules": [UP_IN_0], "layers_to_transform": [1], "exclude_modules": ["p_proj"]}, None),
    ({"target_modules": r".*\.(gate|up)_proj", "layers_to_transform": [1]}, None),
    ({"target_modules": "all-linear", "exclude_modules": "up_proj"}, None),
    ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, None),
    ({"target_modules": ["0.mlp.up_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"}, None),
    ({"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, None),
    ({"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "model.layers"}, None),
    ({"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "lay.*"]}, None),
    ({"target_modules": ["up_proj", "down_proj"], "exclude_modules": ".*down_proj"}, None),
    ({"target_modules": [1], "modules_to_save": "mlp", "exclude_modules": None, "layers_to_transform": "x"}, None),
    ({"target_modules": ["q_proj", "p_proj"]}, "`target_modules` of"),
    ({"target_modules": []}, "`target_modules` of"),
    ({"target_modules": ...}, "`target_modules` of"),  # peft takes projections of attention then
    ({"target_modules": None, "target_parameters": None}, "`target_modules` of"),
    ({"target_modules": None, "target_parameters": ["mlp.up_proj.weight"]}, None),
    ({"target_modules": ["up_proj"], "layers_to_transform": [1, 2]}, "`layers_to_transform` of"),
    ({"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, "`layers_to_transform` of"),
    ({"target_modules": ["up_proj"], "exclude_modules": ["mlp.up_proj"]}, "`exclude_modules` of"),
]


@pytest.mark.parametrize(("config", "reason"), TARGETS)
def test_factors_of_a_module_that_the_config_leaves_out_are_refused_since_peft_ignores_them(
    model: DenseModel, tmp_path: Path, refusal: Callable[..., str], config: dict[str, Any], reason: str | None
) -> None:
    path = write_adapter(tmp_path / "lora", **config)
    if reason is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter = model.with_adapter(path).adapter
        assert adapter is not None
        assert len(adapter.added) == 1
    else:
        message = refusal(path)
        assert message.startswith(
            f"lora/{ADAPTER_WEIGHTS}: '{UP}lora_A.weight' is of a module that {reason} {ADAPTER_CONFIG} leaves"
        )
        assert message.endswith(MERGE_ADAPTER)


@pytest.mark.parametrize("name", ["gate_proj", "p_proj", "mlp", "lp", "layers.1.mlp", "model.layers.0.mlp.gate_proj"])
def test_a_module_that_is_said_to_be_saved_whole_and_is_not_there_is_refused(
    tmp_path: Path, refusal: Callable[..., str], name: str
) -> None:
    shapes = {key: shape for key, shape in TENSORS.items() if ".mlp." not in key}
    message = refusal(write_adapter(tmp_path / "lora", shapes, modules_to_save=["lm_head", name]))
    assert message.startswith(f"lora/{ADAPTER_WEIGHTS}: there is no base_model.model.model.layers.")
    assert message.endswith(f"_proj.weight, and `modules_to_save` of {ADAPTER_CONFIG} names it; is the file complete?")


def test_a_module_that_the_config_names_without_factors_is_a_warning(model: DenseModel, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "lora", target_modules=["up_proj", "down_proj", "k_proj"])
    message = (
        f"{ADAPTER_WEIGHTS}: there are no factors for 2 modules that `target_modules` of {ADAPTER_CONFIG} names, "
        "model.layers.0.mlp.down_proj for one: what is missing stays as the model has it"
    )
    with pytest.warns(MoeplanWarning, match=re.escape(message)):
        model.with_adapter(path)


def test_what_is_no_adapter_s_directory_is_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert refusal(tmp_path / "nowhere").startswith("nowhere: no such directory; ")
    assert refusal(tmp_path / "base").startswith(f"base: is no LoRA adapter; it has no {ADAPTER_CONFIG}")
    path = write_adapter(tmp_path / "lora")
    (path / ADAPTER_WEIGHTS).unlink()
    assert refusal(path) == f"lora/{ADAPTER_WEIGHTS}: is not there, or links to nothing; is the download complete?"
    (path / ADAPTER_BIN_WEIGHTS).write_bytes(b"PK")
    assert refusal(path) == (
        f"lora/{ADAPTER_BIN_WEIGHTS}: is truncated, or not a zip archive: its list of members is not where it should "
        "end. Download it again"
    )
    os.mkfifo(path / ADAPTER_WEIGHTS)
    assert refusal(path) == f"lora/{ADAPTER_WEIGHTS}: is not a regular file"
    (path / ADAPTER_CONFIG).write_text("{")
    assert refusal(path).startswith(f"lora/{ADAPTER_CONFIG}: is not JSON")
    (path / ADAPTER_CONFIG).unlink()
    (path / ADAPTER_CONFIG).symlink_to("/dev/zero")
    assert refusal(path).startswith(f"lora/{ADAPTER_CONFIG}: is a symbolic link out of the checkpoint")


def test_the_slowest_patterns_that_are_taken_are_matched_in_seconds(tmp_path: Path) -> None:
    model = as_dense_model(open_checkpoint(sparse_llama(tmp_path / "base", num_hidden_layers=100)))
    names = {f"model.layers.{n}.mlp.up_proj": 1 for n in range(100, 1100)}
    slow = {f".*.*(?:{'|'.join('o' * 40)}).q{n}": 1 for n in range(16)}
    factors = {
        UP.replace("0", str(n)) + x: TENSORS[UP + x] for n in range(100) for x in ("lora_A.weight", "lora_B.weight")
    }
    path = write_adapter(tmp_path / "lora", factors, alpha_pattern={**names, **slow})
    started = time.process_time()
    adapter = model.with_adapter(path).adapter
    assert time.process_time() - started < 5
    assert adapter is not None
    assert len(adapter.added) == 100


def test_the_plan_lists_a_model_and_each_adapter_on_it(tmp_path: Path) -> None:
    base = sparse_llama(tmp_path / "base")
    first, second = (write_adapter(tmp_path / name) for name in ("first", "second"))
    experts = [f"{base}+{first}", base, f"{base}+{second}", f"{base}+{first}"]
    config = write_config(tmp_path / "config.yml", base, experts)
    outcome = moeplan(config, "--plan", "--json")
    assert outcome.status == 0, outcome.stderr
    sources = {
        source["path"].replace(f"{tmp_path}/", ""): source for source in json.loads(outcome.stdout)["plan"]["sources"]
    }
    assert {path: source["used_as"] for path, source in sources.items()} == {
        "base": ["base", "expert 1"],
        "base+first": ["expert 0", "expert 3"],
        "base+second": ["expert 2"],
    }
    used = 2 * (4 * 64 + 96 * 4 + 64 * 96)
    assert sources["base+first"]["read_nbytes"] == sources["base+second"]["read_nbytes"] == used
    assert sources["base"]["read_nbytes"] == sum(read.nbytes for read in open_checkpoint(base).tensors.values())


def test_a_base_with_an_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    base, lora = sparse_llama(tmp_path / "base"), write_adapter(tmp_path / "lora")
    outcome = moeplan(write_config(tmp_path / "config.yml", Path(f"{base}+{lora}"), [base, base]), "--plan")
    assert outcome.status == 2
    assert "config.yml:1: base_model: " in outcome.error
    assert f"only experts can have an adapter on them; {MERGE}" in outcome.error


def test_two_adapters_on_a_model_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base = sparse_llama(tmp_path / "base")
    first, second = (write_adapter(tmp_path / name) for name in ("first", "second"))
    outcome = moeplan(write_config(tmp_path / "config.yml", base, [base, f"{base}+{first}+{second}"]), "--plan")
    assert outcome.status == 2
    assert outcome.error == (
        f"{tmp_path}/config.yml:1: experts[1].source_model: {first}+{second}: no such directory; if these are several "
        f"adapters, one is all that a model can have on it: {MERGE_ADAPTER}"
    )


def test_a_refused_adapter_is_named_with_its_line(tmp_path: Path) -> None:
    base, lora = sparse_llama(tmp_path / "base"), write_adapter(tmp_path / "lora", use_dora=True)
    outcome = moeplan(write_config(tmp_path / "config.yml", base, [base, f"{base}+{lora}"]), tmp_path / "out")
    assert outcome.status == 2
    assert outcome.error.startswith(
        f"{tmp_path}/config.yml:1: experts[1].source_model: {lora}/{ADAPTER_CONFIG}: `use_dora`"
    )
    assert not (tmp_path / "out").exists()


def test_reads_are_of_what_an_expert_uses_alone(model: DenseModel, tmp_path: Path) -> None:
    adapter = model.with_adapter(write_adapter(tmp_path / "lora")).adapter
    assert adapter is not None
    assert all(isinstance(read, Read) for read in adapter.reads)
    assert len(adapter.reads) == 3
