"""Tokenizers that are no tokenizer.json: sentencepiece models, and strangers' code, which is copied and never run."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commands import moeplan, write_config
from families import CASES, OUTPUTS, Case, plain_recipe
from models import use_sentencepiece
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from moeplan.architectures import as_dense_model
from moeplan.checkpoint import open_checkpoint
from moeplan.config import Expert
from moeplan.gates.prompts import tokenize
from moeplan.gates.special_tokens import special_tokens
from moeplan.gates.tokenizer import READERS, encode
from moeplan.places import CheckpointError

TEXTS = ["Ein Brötchen für den Doktor", "def main(): pass", "two  spaces", "雪"]
CODE = "open({!r}, 'w')\nclass Tokenizer: pass\n"


@pytest.fixture
def model(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    return shutil.copytree(checkpoint("llama-plain"), tmp_path / "model")


def change_tokenizer_config(model: Path, **settings: object) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def tokens_of_texts(model: Path) -> list[tuple[int, ...]]:
    """What moeplan makes of each of `TEXTS`, as prompts of a base."""
    expert = Expert(source_model="model", positive_prompts=TEXTS)
    tokenized = tokenize(as_dense_model(open_checkpoint(model)), (expert,))
    return [tokenized.tokens[index] for index in tokenized.positive[0]]


def name_class(model: Path, file: str | None, name: str) -> None:
    """Have `file` name the tokenizer's class, and no other file of the model."""
    for each in ("tokenizer_config.json", "config.json"):
        said = json.loads((model / each).read_text())
        said.pop("tokenizer_class", None)
        (model / each).write_text(json.dumps({**said, **({"tokenizer_class": name} if each == file else {})}))


@pytest.mark.parametrize("named_in", ["tokenizer_config.json", "config.json", None])
@pytest.mark.parametrize("recipe", ["llama-plain", "mistral-plain", "granite-plain"])
def test_a_sentencepiece_model_alone_gives_plain_text_sentencepiece_s_tokens_where_llama_s_class_is_named_or_none(
    checkpoint: Callable[..., Path], tmp_path: Path, recipe: str, named_in: str | None
) -> None:
    model = shutil.copytree(checkpoint(recipe), tmp_path / "model")
    use_sentencepiece(model)
    name_class(model, named_in, "LlamaTokenizer")
    oracle = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    assert tokens_of_texts(model) == [(oracle.bos_id(), *oracle.encode(text)) for text in TEXTS]


CASES_OF_SENTENCEPIECE = [
    case
    for case in CASES
    if case.source in ("llama", "mistral", "granite") and case.layout == next(iter(OUTPUTS[case.output].layouts))
]


@pytest.mark.parametrize("case", CASES_OF_SENTENCEPIECE, ids=str)
def test_a_sentencepiece_model_alone_that_transformers_would_read_wrong_is_warned_of_with_what_mends_it(
    case: Case, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint(plain_recipe(case)), tmp_path / "model")
    use_sentencepiece(model)
    change_tokenizer_config(model, add_bos_token=True)
    settings = {"architecture": OUTPUTS[case.output].architecture}
    if case.shared:
        settings["shared_experts"] = [{"source_model": model}]
    config = write_config(tmp_path / "c.yml", model, [model, model], gate_mode="random", **settings)
    ran = moeplan(config, tmp_path / "out", "--i-understand-this-is-not-useful-without-training")
    expected = LlamaTokenizer.from_pretrained(model)(TEXTS).input_ids
    oracle = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    assert expected == [[oracle.bos_id(), *oracle.encode(text)] for text in TEXTS]
    name = "Granite MoE" if case.output == "granite" else "Mixtral"
    command = ran.stderr.partition(
        f"{config}:1: base_model: {model} has a tokenizer.model and no tokenizer.json, without which transformers 5 "
        f"reads the tokenizer of a {name} model wrong; to make one, run in the merged model's directory: "
    )[2]
    is_right = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS).input_ids == expected
    assert bool(command) is not is_right
    assert is_right is (case.output not in ("mixtral", "granite"))
    if command:
        python, *arguments = shlex.split(command.splitlines()[0])
        assert python == "python"
        subprocess.run([sys.executable, *arguments], cwd=tmp_path / "out", check=True)
        assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS).input_ids == expected


@pytest.mark.parametrize("recipe", ["llama-plain", "granite-plain"])
def test_a_tokenizer_that_is_not_copied_is_not_warned_of(
    checkpoint: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    model = shutil.copytree(checkpoint(recipe), tmp_path / "model")
    use_sentencepiece(model)
    config = write_config(tmp_path / "c.yml", model, [model, checkpoint(recipe, 1)])
    assert "tokenizer" in moeplan(config, "--plan").stderr
    assert "tokenizer" not in moeplan(config, "--plan", "--no-copy-tokenizer").stderr


@pytest.mark.parametrize("named_in", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("recipe", ["llama-plain", "mistral-plain"])
def test_a_sentencepiece_model_is_read_by_the_class_that_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path, recipe: str, named_in: str
) -> None:
    model = shutil.copytree(checkpoint(recipe), tmp_path / "model")
    use_sentencepiece(model)
    name_class(model, named_in, "GemmaTokenizer")
    oracle = GemmaTokenizer.from_pretrained(model)
    found = [tokens[1:] for tokens in tokens_of_texts(model)]
    assert found == [tuple(oracle.encode(text, add_special_tokens=False)) for text in TEXTS]
    assert found[0] != tuple(LlamaTokenizer.from_pretrained(model).encode(TEXTS[0], add_special_tokens=False))


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        ({}, {"bos_token": "<s>"}),
        ({"bos_token": ""}, {"bos_token": "<s>"}),
        ({"bos_token": ""}, {}),
        ({"bos_token": "</s>"}, {"bos_token": {"content": "<s>"}}),
        ({"bos_token": "<s>"}, {}),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "</s>"}),
        ({"added_tokens_decoder": {}}, {"bos_token": "<s>"}),
        (None, {"bos_token": "<s>"}),
        (None, {"eos_token": "</s>"}),
    ],
)
def test_the_bos_token_is_the_one_that_transformers_takes(
    model: Path, newer: dict[str, object] | None, older: dict[str, object]
) -> None:
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **(newer or {})})
    )
    (model / "special_tokens_map.json").write_text(json.dumps(older))
    if newer is None:
        (model / "tokenizer_config.json").unlink()
    expert = Expert(source_model="model", positive_prompts=TEXTS[:1])
    tokenized = tokenize(as_dense_model(open_checkpoint(model)), (expert,))
    oracle = AutoTokenizer.from_pretrained(model)
    start = [] if oracle.bos_token_id is None else [oracle.bos_token_id]
    assert list(tokenized.tokens[0]) == [*start, *oracle.encode(TEXTS[0], add_special_tokens=False)]


@pytest.mark.parametrize(
    ("newer", "older", "file"),
    [
        ({"bos_token": "<no>"}, None, "tokenizer_config.json"),
        ({"bos_token": "<no>"}, {"eos_token": "</s>"}, "tokenizer_config.json"),
        ({"bos_token": "<s>"}, {"bos_token": "<no>"}, "special_tokens_map.json"),
        (None, {"bos_token": "<no>"}, "special_tokens_map.json"),
    ],
)
@pytest.mark.parametrize("what", ["a token", "text"])
def test_a_bos_token_that_cannot_be_is_refused_by_the_file_that_has_the_last_word(
    model: Path, what: str, newer: dict[str, object] | None, older: dict[str, object] | None, file: str
) -> None:
    for name, said in (("tokenizer_config.json", newer), ("special_tokens_map.json", older)):
        (model / name).unlink(missing_ok=True)
        if said is not None:
            wrong = {"bos_token": 7} if what == "text" and said.get("bos_token") == "<no>" else {}
            (model / name).write_text(json.dumps(said | wrong))
    message = "'<no>' is not a token of tokenizer.json" if what == "a token" else "is 7; it must be text, or null"
    with pytest.raises(CheckpointError, match=f"^{model / file}: bos_token {message}$"):
        encode(as_dense_model(open_checkpoint(model)), ["x"], False)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("said", [{}, {"bos_token": None}, {"bos_token": "</s>"}], ids=str)
@pytest.mark.parametrize("works_on_bytes", [True, False])
def test_where_no_file_speaks_of_a_bos_token_its_class_has_one_as_in_transformers(
    model: Path, works_on_bytes: bool, said: dict[str, object], tokenizer_class: str
) -> None:
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **said}))
    if not works_on_bytes:
        tokenizer = json.loads((model / "tokenizer.json").read_text())
        tokenizer["pre_tokenizer"] = tokenizer["decoder"] = {"type": "Metaspace", "replacement": "▁", "split": False}
        (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    expert = Expert(source_model="model", positive_prompts=TEXTS[1:2])
    tokenized = tokenize(as_dense_model(open_checkpoint(model)), (expert,))
    bos = AutoTokenizer.from_pretrained(model).bos_token_id
    assert tokenized.start == (() if bos is None else (bos,))


MARKUP = "<|im_start|> user\nWrite <tool> code<s> </s>  now<|im_end|> <pad>"


def listed(*contents: str, **flags: bool) -> dict[str, object]:
    """`added_tokens_decoder` as transformers writes it; ids are what their order comes to."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {str(400 + number): {"content": content, **plain, **flags} for number, content in enumerate(contents)}


def assert_tokens_are_those_of_transformers(
    model: Path, files: dict[str, dict[str, object]], *there: AddedToken
) -> None:
    """Of MARKUP, where tokenizer.json has `there` and <unk> for added tokens, and `files` say this beside it."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] == "<unk>"]
    with_added = Tokenizer.from_str(json.dumps(tokenizer))
    with_added.add_tokens(list(there))
    with_added.save(str(model / "tokenizer.json"))
    for name in ("tokenizer_config", "special_tokens_map", "added_tokens"):
        (model / f"{name}.json").unlink(missing_ok=True)
    plain = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    for name, said in {"tokenizer_config": {}, **files}.items():
        (model / f"{name}.json").write_text(json.dumps({**(plain if name == "tokenizer_config" else {}), **said}))
    oracle = AutoTokenizer.from_pretrained(model)
    with_room = json.loads((model / "config.json").read_text()) | {"vocab_size": len(oracle)}
    (model / "config.json").write_text(json.dumps(with_room))
    expert = Expert(source_model="model", positive_prompts=[MARKUP])
    base = as_dense_model(open_checkpoint(model))
    base = replace(base, sizes={**base.sizes, "vocab_size": len(oracle)})
    tokenized = tokenize(base, (expert,))
    assert list(tokenized.tokens[0]) == [oracle.bos_token_id, *oracle.encode(MARKUP, add_special_tokens=False)]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"added_tokens_decoder": listed("<|im_start|>", "<|im_end|>")}},
        {"tokenizer_config": {"added_tokens_decoder": listed("<|im_start|>", "<|im_end|>", lstrip=True, rstrip=True)}},
        {"tokenizer_config": {"added_tokens_decoder": listed("code", special=False, single_word=True)}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": dict(reversed(listed(*(f"<{c}>" for c in "abc"), "<tool>").items()))
            }
        },
        {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<pad>"}},
        {"tokenizer_config": {"pad_token": {"__type": "AddedToken", "content": "<pad>", "lstrip": True}}},
        {"tokenizer_config": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "extra_special_tokens": []}},
        {"tokenizer_config": {"extra_special_tokens": {"tool_token": "<tool>"}, "image_token": "<|im_end|>"}},
        {"tokenizer_config": {"added_tokens_decoder": listed("<tool>"), "split_special_tokens": True}},
        {"special_tokens_map": {"eos_token": {"content": "<|im_end|>", "rstrip": True}, "pad_token": "<pad>"}},
        {"added_tokens": {"<|im_end|>": 401, "<|im_start|>": 400, "tool": 402}},
        {"added_tokens": {"<|im_end|>": 400}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
        {
            "tokenizer_config": {"split_special_tokens": True},
            "special_tokens_map": {"eos_token": "<tool>"},
            "added_tokens": {"<tool>": 400, "code": 401},
        },
        {
            "tokenizer_config": {"added_tokens_decoder": listed("<tool>"), "eos_token": "<|im_end|>"},
            "special_tokens_map": {"pad_token": "<pad>"},
            "added_tokens": {"code": 402},
        },
    ],
    ids=str,
)
def test_special_tokens_that_are_named_beside_tokenizer_json_are_those_of_transformers(
    model: Path, files: dict[str, dict[str, object]]
) -> None:
    assert_tokens_are_those_of_transformers(model, files)


def test_added_tokens_that_are_special_are_looked_for_before_text_is_normalised_and_others_after(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))
    files = {"added_tokens": {"<TOOL>": 400, "CODE": 401}, "special_tokens_map": {"eos_token": "<TOOL>"}}
    assert_tokens_are_those_of_transformers(model, files)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<|im_start|>": 384, "<|im_end|>": 385}},
        {"special_tokens_map": {"eos_token": {"content": "<|im_end|>", "lstrip": True}, "pad_token": "<|im_start|>"}},
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": True}}},
        {"tokenizer_config": {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}},
        {"tokenizer_config": {"added_tokens_decoder": {}, "eos_token": "<|im_end|>"}},
        {"tokenizer_config": {"added_tokens_decoder": listed("<|im_end|>", lstrip=True), "eos_token": "<|im_end|>"}},
        {"tokenizer_config": {"bos_token": "<|im_end|>"}},
    ],
    ids=str,
)
def test_what_tokenizer_json_says_of_a_token_counts_where_transformers_has_it_count(
    model: Path, files: dict[str, dict[str, object]]
) -> None:
    there = (AddedToken(token, rstrip=True, special=True) for token in ("<|im_start|>", "<|im_end|>"))
    assert_tokens_are_those_of_transformers(model, files, *there)


def test_what_is_no_token_where_tokens_are_named_is_passed_over(tmp_path: Path) -> None:
    decoder = {"x": 1, "1": [], "2": {"content": "a", "lstrip": 3}, "9" * 5000: {"content": "b"}}
    said = {
        "added_tokens_decoder": decoder,
        "extra_special_tokens": 7,
        "eos_token": {},
        "pad_token": None,
        "my_token": 1,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert special_tokens(tmp_path).listed == ({"content": "a"},)
    assert special_tokens(tmp_path).added == ()


def test_a_tokenizer_that_cuts_and_pads_what_it_is_given_does_neither_with_prompts(model: Path) -> None:
    expected = tokens_of_texts(model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32, pad_id=2, pad_token="</s>")
    tokenizer.save(str(model / "tokenizer.json"))
    assert tokens_of_texts(model) == expected
    assert max(map(len, expected)) > 4


def test_a_prompt_that_begins_with_the_bos_token_gets_no_second_one(model: Path) -> None:
    base = as_dense_model(open_checkpoint(model))
    once, twice = (
        tokenize(base, (Expert(source_model="model", positive_prompts=[text]),))
        for text in ("Guten Tag", "<s>Guten Tag")
    )
    assert twice.tokens == once.tokens


def test_a_model_that_says_minus_one_for_its_bos_token_has_none(model: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": -1}))
    expert = Expert(source_model="model", positive_prompts=TEXTS[:1])
    tokenized = tokenize(as_dense_model(open_checkpoint(model)), (expert,))
    assert tokenized.start == ()
    assert min(tokenized.tokens[0]) >= 0


@pytest.mark.parametrize("absent", [("sentencepiece",), ("sentencepiece", "protobuf"), ("protobuf",)])
def test_where_nothing_reads_sentencepiece_models_one_message_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]
) -> None:
    use_sentencepiece(model)
    for package in absent:
        monkeypatch.setitem(READERS, package, f"{package}_that_is_not_there.of_it")
    config = write_config(tmp_path / "config.yml", model, [model, model], gate_mode="cheap_embed")
    ran = moeplan(config, "--plan", "--i-understand-this-is-not-useful-without-training")
    assert ran.status == 2
    assert ran.error.startswith(
        f"{model}/tokenizer.model: is a sentencepiece model, and what reads it is not installed"
    )
    assert f"`pip install {' '.join(absent)}`, or put the tokenizer's tokenizer.json beside it" in ran.error


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_s_own_code_is_copied_byte_for_byte_and_never_run(
    model: Path, checkpoint: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    if kind == "tokenizer.model":
        use_sentencepiece(model)
    victim = tmp_path / "victim"
    (model / "tokenization_own.py").write_text(CODE.format(str(victim)))
    change_tokenizer_config(model, auto_map={"AutoTokenizer": ["tokenization_own.Tokenizer", None]})
    config = write_config(tmp_path / "c.yml", model, [model, checkpoint("llama-plain", 1)], gate_mode="cheap_embed")
    ran = moeplan(config, tmp_path / "out")
    assert (ran.status, ran.stderr.count("warning")) == (0, 0), ran.stderr
    assert not victim.exists()
    for name in ("tokenization_own.py", "tokenizer_config.json", kind):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained(path, trust_remote_code=True)" in card
    assert 'AutoModelForCausalLM.from_pretrained(path, dtype="auto")' in card


def test_a_tokenizer_that_its_own_code_alone_can_read_is_refused_and_its_code_not_run(
    model: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    use_sentencepiece(model)
    (model / "tokenization_own.py").write_text(CODE.format(str(tmp_path / "victim")))
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Tokenizer", None]}}
    change_tokenizer_config(model, tokenizer_class="OwnTokenizer", **own)
    config = write_config(tmp_path / "c.yml", model, [model, checkpoint("llama-plain", 1)], gate_mode="cheap_embed")
    ran = moeplan(config, tmp_path / "out")
    assert ran.status == 2
    assert f"{model}/tokenizer.model: is not a tokenizer that can be used: only code that comes with it" in ran.error
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("gate_mode", ["random", "cheap_embed"])
def test_a_tokenizer_that_is_a_git_lfs_pointer_is_neither_read_nor_copied(
    model: Path, checkpoint: Callable[..., Path], tmp_path: Path, gate_mode: str
) -> None:
    (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085657\n")
    config = write_config(tmp_path / "c.yml", model, [model, checkpoint("llama-plain", 1)], gate_mode=gate_mode)
    ran = moeplan(config, tmp_path / "out")
    assert ran.status == 2
    assert f"{model}/tokenizer.json: is a git-LFS pointer, not the file itself; `git lfs pull`" in ran.error


def test_code_that_is_not_copied_is_warned_of(model: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    change_tokenizer_config(model, auto_map={"AutoTokenizer": ["own.Tokenizer", "org/other--tokenization_x.Y"]})
    (model / "own.py").write_text(CODE.format(str(tmp_path / "victim")))
    ran = moeplan(write_config(tmp_path / "c.yml", model, [model, checkpoint("llama-plain", 1)]), tmp_path / "out")
    assert ran.status == 0
    assert f"{model}: its tokenizer_config.json names code, 'own.py', that is not copied" in ran.stderr
    assert not (tmp_path / "out" / "own.py").exists()
    assert not (tmp_path / "victim").exists()
