"""`moeplan routes`, against what transformers computes: of a merge before it is made, and of a finished model."""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import moeplan, outcome, start
from families import CASES
from models import read_tensors
from safetensors.torch import save_file
from test_ridge import Base, expected
from test_router_weights import case_of, has_gate
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeplan as api
from moeplan import Options
from moeplan.errors import MoeplanWarning, UserError
from moeplan.places import CheckpointError
from moeplan.routes import statistics
from moeplan.routes.after import routes_after
from moeplan.routes.before import routes_before
from moeplan.staging import PARTIAL

PROMPTS = [
    ["Where does it hurt?", "Say ah", "Since when?", "Listen to the doctor."],
    ["x = 1", "def f(): pass", "return x", "import torch"],
    ["Guten Tag", "Der Zug fährt", "Ich möchte ein Brötchen"],
]

ROUTER, EXPERT = "model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.experts."


@pytest.fixture
def layers_seen(monkeypatch):
    """The layers that statistics are made of, in the order of the calls."""
    seen: list[list[statistics.Layer]] = []
    original = statistics.routes

    def spy(experts, texts, layers, *args, **kwargs):
        seen.append(list(layers))
        return original(experts, texts, seen[-1], *args, **kwargs)

    for module in ("before", "after"):
        monkeypatch.setattr(f"moeplan.routes.{module}.routes", spy)
    return seen


def config_of(configure, source, prompts=PROMPTS, **settings):
    experts = [{"source_model": source, "positive_prompts": each} for each in prompts]
    return configure(source, experts, **settings)


@pytest.mark.parametrize("mode", ["ridge", "hidden", "cheap_embed", "random"])
@pytest.mark.parametrize("recipe", ["llama-plain", "qwen2-f16"])
def test_tokens_are_scored_by_routers_that_were_made_without_their_prompts(
    recipe, mode, checkpoint, configure, layers_seen
):
    source, case = checkpoint(recipe), case_of(recipe)
    base = Base(source)
    shared = {"positive_prompts": ["Listen."]} if has_gate(case) else {}
    config, options = config_of(configure, source, gate_mode=mode, **case.settings(source, **shared))
    found = routes_before(config, "config.yml", options)
    texts = [[base.text(prompt) for prompt in each] for each in PROMPTS]
    assert [text.tokens for text in found.texts] == [sum(map(len, each)) for each in texts]
    assert all(text.held_out for text in found.texts)
    for number, layer in enumerate(layers_seen[0]):
        assert layer.logits.shape == (sum(len(text) for each in texts for text in each), 3)
        if mode == "random":
            seen = np.concatenate([text.seen[number] for each in texts for text in each])
            np.testing.assert_allclose(layer.logits, seen @ layer.router.T, rtol=1e-4, atol=1e-4)
    if mode == "ridge":
        full = expected(texts)
        np.testing.assert_allclose([layer.router for layer in layers_seen[0]], full, rtol=1e-3, atol=1e-4)


def test_held_out_scores_are_those_of_a_router_of_the_other_half(checkpoint, configure, layers_seen):
    source = checkpoint("llama-plain")
    config, options = config_of(configure, source, gate_mode="cheap_embed")
    routes_before(config, "config.yml", options)
    base = Base(source)
    texts = [[base.text(prompt) for prompt in each] for each in PROMPTS]
    embedding = base.model.get_input_embeddings().weight.detach().double().numpy()

    def router(parts) -> np.ndarray:
        rows = [sum(embedding[[*base.bos, *text.ids]].sum(axis=0) for text in part) for part in parts]
        return np.stack([row / np.linalg.norm(row) for row in rows])

    in_half = [halves_in_order(each, base) for each in texts]
    for number, layer in enumerate(layers_seen[0]):
        wanted = []
        for each, half_of in zip(texts, in_half, strict=True):
            for text, half in zip(each, half_of, strict=True):
                others = [
                    [other for other, its in zip(all_of, its_halves, strict=True) if its != half]
                    for all_of, its_halves in zip(texts, in_half, strict=True)
                ]
                wanted.append(text.seen[number] @ router(others).T)
        np.testing.assert_allclose(layer.logits, np.concatenate(wanted), rtol=1e-4, atol=1e-4)


def halves_in_order(texts, base) -> list[int]:
    """Prompts in the order of the config, each to the half that has fewer tokens, BOS counted."""
    sizes, found = [0, 0], []
    for text in texts:
        found.append(int(sizes[0] > sizes[1]))
        sizes[found[-1]] += len(base.bos) + len(text.ids)
    return found


def test_prompts_are_tokenised_once(checkpoint, configure, monkeypatch):
    run, started = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: started.append(command) or run(command, **kwargs))
    config, options = config_of(configure, checkpoint("llama-plain"), gate_mode="ridge")
    routes_before(config, "config.yml", options)
    assert len(started) == 1


def test_an_expert_with_one_prompt_is_not_held_out(checkpoint, configure):
    source = checkpoint("llama-plain")
    config, options = config_of(configure, source, [["Say ah"], *PROMPTS[1:]], gate_mode="hidden")
    found = routes_before(config, "config.yml", options)
    assert [text.held_out for text in found.texts] == [False, True, True]


def test_text_of_files_is_routed_by_the_final_router(checkpoint, configure, layers_seen, tmp_path):
    source = checkpoint("llama-plain")
    (tmp_path / "story.txt").write_text("light a torch and go down")
    config, options = config_of(configure, source, gate_mode="ridge")
    found = routes_before(config, "config.yml", options, [str(tmp_path / "story.txt")])
    text = Base(source).text("light a torch and go down")
    assert (found.texts[-1].name, found.texts[-1].expert) == (str(tmp_path / "story.txt"), None)
    for number, layer in enumerate(layers_seen[0]):
        wanted = text.seen[number] @ layer.router.T
        np.testing.assert_allclose(layer.logits[-len(text) :], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["hidden", "random"])
def test_text_that_the_routers_were_made_from_is_not_held_out(mode, checkpoint, configure, tmp_path):
    """A file that is an expert's, too; one prompt of each of two experts, which no half is without; a negative one."""
    source, out = checkpoint("llama-plain"), tmp_path / "out"
    files = [str(tmp_path / f"{name}.txt") for name in ("the expert's", "positive", "negative", "other")]
    for file, text in zip(files, ["import torch", "x = 1", "Guten Tag", "Der Zug"], strict=True):
        Path(file).write_text(text)
    experts = [
        {"source_model": source, "positive_files": files[:1], "positive_prompts": PROMPTS[0]},
        {"source_model": source, "positive_prompts": ["x = 1"], "negative_prompts": ["Guten Tag"]},
    ]
    config, options = configure(source, experts, gate_mode=mode)
    before = routes_before(config, "config.yml", options, files)
    api.merge(config, out, options)
    after = routes_after(out, options, files)
    is_random = mode == "random"
    assert [text.held_out for text in before.texts[2:]] == [True, is_random, is_random, True]
    assert [text.held_out for text in after.texts] == [is_random] * 5 + [True]
    assert (before.to_data()["finished"], after.to_data()["finished"]) == (False, True)


def test_text_with_tokens_that_the_model_has_no_rows_for_is_refused(checkpoint, configure, tmp_path):
    source = shutil.copytree(checkpoint("llama-plain"), tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<|{number}|>" for number in range(500)])
    tokenizer.save_pretrained(source)
    config, options = config_of(configure, source, gate_mode="hidden")
    routes_before(config, "config.yml", options)
    (tmp_path / "chat.txt").write_text("Hello <|499|>")
    with pytest.raises(UserError, match=r"chat.txt: a passage has token \d+, and the embeddings of .* have \d+ rows"):
        routes_before(config, "config.yml", options, [str(tmp_path / "chat.txt")])


@pytest.mark.parametrize(
    ("case", "variant"),
    [(case, "plain") for case in CASES if case.output != "deepseek"] + [(CASES[0], "off-page")],
    ids=str,
)
def test_a_finished_model_is_scored_through_its_own_layers(case, variant, checkpoint, merge, layers_seen):
    sources = [checkpoint(f"{case.source}-{variant}", seed) for seed in range(3)]
    experts = [
        {"source_model": source, "positive_prompts": each} for source, each in zip(sources, PROMPTS, strict=True)
    ]
    shared = {"positive_prompts": ["Listen."]} if has_gate(case) else {}
    out = merge(sources[0], experts, gate_mode="ridge", **case.settings(sources[0], **shared))
    found = routes_after(out, Options())
    base = Base(sources[0])
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto", experts_implementation="eager")
    wanted: list[list[np.ndarray]] = [[] for _ in layers_seen[0]]
    for prompt in (prompt for each in PROMPTS for prompt in each):
        ids = torch.tensor([[*base.bos, *base.tokenizer(prompt, add_special_tokens=False).input_ids]])
        with torch.inference_mode():
            of_layers = model(ids, output_router_logits=True).router_logits
        for layer, of_layer in zip(wanted, of_layers, strict=True):
            layer.append(of_layer[len(base.bos) :].float().numpy())
    for layer, of_layer in zip(layers_seen[0], map(np.concatenate, wanted), strict=True):
        probabilities = np.exp(layer.logits) / np.exp(layer.logits).sum(axis=1, keepdims=True)
        is_softmax = np.allclose(of_layer.sum(axis=1), 1, atol=1e-4)  # what some versions call logits
        ours = probabilities if is_softmax else layer.logits
        np.testing.assert_allclose(ours, of_layer, rtol=1e-3, atol=1e-4)
    assert [text.tokens for text in found.texts] == [sum(len(base.text(p)) for p in each) for each in PROMPTS]
    assert not any(text.held_out for text in found.texts)
    assert found.gate_mode == "ridge"


def test_of_a_finished_model_s_prompts_those_alone_are_evaluated_that_are_routed(checkpoint, merge):
    source = checkpoint("llama-plain")
    experts = [{"source_model": source, "positive_prompts": each, "negative_prompts": ["no"]} for each in PROMPTS]
    out, started, done = merge(source, experts, gate_mode="hidden"), [], []
    found = routes_after(out, Options(), on_start=started.append, on_progress=lambda state: done.append(state))
    with_bos = sum(text.tokens for text in found.texts) + sum(map(len, PROMPTS))
    assert started == [with_bos]
    assert (len(done), done[-1].written_nbytes) == (sum(map(len, PROMPTS)), with_bos)


def test_a_finished_model_in_bin_files_is_scored_as_it_is_in_safetensors(checkpoint, merge, layers_seen, tmp_path):
    source = checkpoint("llama-plain")
    experts = [{"source_model": source, "positive_prompts": each} for each in PROMPTS]
    out = merge(source, experts, gate_mode="hidden")
    expected = routes_after(out, Options())
    in_bin = shutil.copytree(out, tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(read_tensors(out), in_bin / "pytorch_model.bin")
    found = routes_after(in_bin, Options())
    assert found.to_data()["layers"] == expected.to_data()["layers"]


def test_a_finished_model_that_transformers_cannot_load_is_refused(checkpoint, merge, tmp_path):
    source = checkpoint("llama-plain")
    out = merge(source, [{"source_model": source, "positive_prompts": each} for each in PROMPTS], gate_mode="hidden")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "router_jitter_noise": "much"}))
    with pytest.raises(UserError, match=f"{out}: transformers cannot load this model: "):
        routes_after(out, Options())


DAMAGED = [
    ("model.layers.1.self_attn.q_proj.weight", {}, "there is no tensor model.layers.1.self_attn.q_proj.weight, which "),
    (f"{EXPERT}1.w3.weight", {}, f"there is no tensor {EXPERT}1.w3.weight, which a Mixtral model of 3 experts has"),
    (ROUTER, {}, f"there is no tensor {ROUTER}, which a Mixtral model has"),
    (None, {"num_hidden_layers": 2}, "has a tensor 'model.layers.2."),
    (None, {"num_hidden_layers": 4}, "there is no tensor model.layers.3.block_sparse_moe.gate.weight, which "),
    (None, {"num_local_experts": 2}, "gate.weight has shape [3, 64], and config.json makes it [2, 64]"),
    (None, {"num_local_experts": 4}, "gate.weight has shape [3, 64], and config.json makes it [4, 64]"),
    (None, {"hidden_size": 32}, "gate.weight has shape [3, 64], and config.json makes it [3, 32]"),
    (None, {"intermediate_size": 80}, "has shape [3, 64, 96], and config.json makes it [3, 64, 80]"),
    (None, {"vocab_size": 400}, "has shape [384, 64], and config.json makes it [400, 64]"),
]


@pytest.mark.parametrize(("removed", "settings", "message"), DAMAGED)
def test_a_finished_model_whose_tensors_are_not_those_of_its_config_is_refused_by_one_of_them(
    removed, settings, message, checkpoint, merge, capfd
):
    source = checkpoint("llama-plain")
    out = merge(source, [{"source_model": source, "positive_prompts": each} for each in PROMPTS], gate_mode="hidden")
    tensors = read_tensors(out)
    tensors.pop(removed, None)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **settings}))
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        routes_after(out, Options())
    assert str(refused.value).startswith(f"{out}: ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [0, 3, "2"])
def test_a_finished_model_with_a_wrong_number_of_experts_per_token_is_refused(number, checkpoint, merge, tmp_path):
    source = checkpoint("llama-plain")
    out = merge(source, [{"source_model": source, "positive_prompts": each} for each in PROMPTS[:2]])
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": number}))
    message = f"{out}/config.json: `num_experts_per_tok` is {number!r}; it must be a whole number from 1 to 2"
    with pytest.raises(UserError, match=re.escape(message)):
        routes_after(out, Options())


def test_why_there_is_no_text_beside_a_finished_model_is_said(checkpoint, merge, tmp_path, monkeypatch):
    source = checkpoint("llama-plain")
    (tmp_path / "story.txt").write_text("light a torch and go down")
    monkeypatch.chdir(tmp_path)
    out = merge(source, [{"source_model": source, "positive_files": ["story.txt"]}, source])
    assert [text.expert for text in routes_after(out, Options()).texts] == [0]
    monkeypatch.chdir(out)
    said = f"{out}: there is no text to route: "
    message = f"{said}none of the positive_files of its moeplan_config.yml is found from this directory; give --text"
    with (
        pytest.warns(MoeplanWarning, match=r"story\.txt: is not found from this directory, so its text is left out"),
        pytest.raises(UserError, match=re.escape(message)),
    ):
        routes_after(out, Options())
    for number, message in (
        (2, "there are no positive prompts in its moeplan_config.yml; give --text FILE"),
        (3, "its moeplan_config.yml has 3 experts, and the model 2; give --text FILE"),
        (0, "it has no moeplan_config.yml, which says what it was merged by; give --text FILE"),
    ):
        expert = {"source_model": str(source), "negative_prompts": ["no"]}
        copy = {"base_model": str(source), "gate_mode": "random", "experts": [expert] * number}
        (out / "moeplan_config.yml").write_text(json.dumps(copy)) if number else (out / "moeplan_config.yml").unlink()
        with pytest.raises(UserError, match=re.escape(said + message)):
            routes_after(out, Options())
    os.mkfifo(out / "moeplan_config.yml")  # a stranger's, which is not waited for
    with pytest.raises(UserError, match=re.escape(said + message)):
        routes_after(out, Options())


def test_a_finished_model_without_a_tokenizer_is_to_be_given_one(checkpoint, merge):
    source = checkpoint("llama-plain")
    out = merge(source, [{"source_model": source, "positive_prompts": each} for each in PROMPTS], copy_tokenizer=False)
    with pytest.raises(CheckpointError) as refused:
        routes_after(out, Options())
    assert str(refused.value) == (
        f"{out}: there is no tokenizer (tokenizer.json or tokenizer.model) to read text with; copy the model's "
        "tokenizer files there"
    )


def test_a_finished_deepseek_is_refused(checkpoint, merge):
    source = checkpoint("llama-plain")
    out = merge(source, [source, source], architecture="deepseek")
    with pytest.raises(UserError, match=r"transformers has no DeepSeek MoE of its own.* give the YAML file"):
        routes_after(out, Options())


def test_the_command_prints_a_report_and_writes_a_page_and_json(checkpoint, configure, tmp_path):
    source = checkpoint("llama-plain")
    config_of(configure, source, gate_mode="ridge")
    shown = moeplan("routes", tmp_path / "0.yml", "--html", tmp_path / "report.html")
    assert shown.status == 0, shown.stderr
    assert "layer" in shown.stdout
    assert " \n" not in shown.stdout
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    as_json = moeplan("routes", tmp_path / "0.yml", "--json", "--quiet")
    data = json.loads(as_json.stdout)["routes"]
    assert len(data["layers"]) == 3
    assert data["subject"] == str(tmp_path / "0.yml")


def test_progress_is_of_routing_alone_and_ends_with_all_of_it(checkpoint, configure, merge):
    source = checkpoint("llama-plain")
    config, options = config_of(configure, source, gate_mode="hidden")
    out = merge(source, [{"source_model": source, "positive_prompts": each} for each in PROMPTS], gate_mode="hidden")
    for route in (partial(routes_before, config, "config.yml", options), partial(routes_after, out, Options())):
        started, states = [], []
        found = route((), started.append, states.append)
        assert {state.doing for state in states} == {"routing"}
        assert [states[-1].written_nbytes] == started
    tokens = sum(text.tokens for text in found.texts)
    assert tokens < started[0] < 2 * tokens, "of a finished model these are tokens, BOS included"


def test_nothing_is_said_twice_and_nothing_by_others(checkpoint, configure, tmp_path):
    source = checkpoint("llama-plain")
    config_of(configure, source, [["", "Where does it hurt?"], ["x = 1", "return x"]], gate_mode="hidden")
    before = outcome(start("routes", tmp_path / "0.yml", "--json", "--quiet"))
    assert json.loads(before.stdout)["warnings"] == [
        f"{tmp_path}/0.yml:1: experts[0].positive_prompts[0]: an empty prompt tells nothing: write text, or remove it"
    ]
    useless = "--i-understand-this-is-not-useful-without-training"
    assert moeplan(tmp_path / "0.yml", tmp_path / "out", useless).status == 0
    after = outcome(start("routes", tmp_path / "out", "--json", "--quiet"))
    assert (before.stderr, after.status, after.stderr) == ("", 0, "")


def test_what_cannot_be_routed_is_refused_in_one_line(checkpoint, configure, tmp_path):
    source = checkpoint("llama-plain")
    configure(source, [source, source])  # random, no prompts
    unfinished = tmp_path / "unfinished"
    (unfinished / PARTIAL).mkdir(parents=True)
    for args, message in (
        (
            [tmp_path / "0.yml"],
            f"{tmp_path}/0.yml: there is no text to route; give the experts prompts, or a text file with --text",
        ),
        ([tmp_path / "0.yml", "--text", tmp_path / "none"], "none: cannot be read: No such file or directory"),
        ([source], "model_type is 'llama', which is no model that moeplan makes"),
        ([tmp_path / "none.yml"], "none.yml: no such file"),
        ([unfinished], "unfinished: an unfinished merge is there; run its command again, which goes on with it"),
        ([tmp_path / "0.yml", "--html", tmp_path / "none" / "page.html"], "there is no directory"),
        ([tmp_path / "0.yml", "--html", tmp_path], "is a directory; name a file"),
    ):
        refused = moeplan("routes", *args)
        assert refused.status == 2
        assert message in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1


def test_a_finished_model_that_does_not_fit_memory_is_refused(checkpoint, configure, merge):
    source = checkpoint("llama-plain")
    out = merge(source, [source, source])
    refused = moeplan("routes", out, "--max-memory", "100kB")
    assert refused.status == 2
    assert "MiB may be taken; the YAML file of the merge takes little" in refused.stderr


@pytest.mark.parametrize(
    "typed", [["--device", "auto"], ["--cuda"], ["--max-device-memory", "1GiB"], ["--load-in-8bit"], ["--load-in-4bit"]]
)
def test_a_finished_model_is_evaluated_as_it_is(typed, tmp_path):
    refused = moeplan("routes", tmp_path, *typed)
    assert refused.status == 2
    option = "--device" if typed == ["--cuda"] else typed[0]
    assert f"{option}: a finished model is evaluated as it is, by the CPU; leave the option out" in refused.stderr


def test_a_finished_model_is_evaluated_by_so_many_threads(checkpoint, merge):
    source, before = checkpoint("llama-plain"), torch.get_num_threads()
    experts = [{"source_model": source, "positive_prompts": prompts} for prompts in PROMPTS[:2]]
    out = merge(source, experts, gate_mode="cheap_embed")
    torch.set_num_threads(2)
    try:
        routes_after(out, Options(num_threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
