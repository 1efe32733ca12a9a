"""`ridge` routers, against float64 arithmetic with numpy on what transformers computes, one prompt at a time."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import NUM_LAYERS
from safetensors.torch import load_file, save_file
from test_router_weights import MANY, SHARED_PROMPTS, case_of, has_gate, router_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from moeplan import gates
from moeplan.architectures import as_dense_model
from moeplan.checkpoint import open_checkpoint
from moeplan.config import Expert
from moeplan.errors import MoeplanWarning
from moeplan.gates import ridge as ridge_mode
from moeplan.gates import samples as sampling
from moeplan.gates.folds import folds, kept
from moeplan.gates.prompts import PromptError, Prompts, tokenize
from moeplan.gates.samples import samples
from moeplan.places import CheckpointError
from moeplan.yaml_file import ConfigError

FEW = [
    {"positive_prompts": ["Where does it hurt?", "Say ah", "Since when?"]},
    {"positive_prompts": ["x = 1", "def f(): pass"], "negative_prompts": ["Say ah", "oh"]},
    {"positive_prompts": ["Guten Tag", "Der Zug"]},
]
LONG = [{"positive_prompts": MANY[first:60:3]} for first in range(3)]


class Text:
    """A prompt's tokens, and what each layer's MLP is given for all of them but BOS, `[num_layers, tokens, hidden]`."""

    def __init__(self, ids: Sequence[int], seen: np.ndarray) -> None:
        self.ids, self.seen = ids, seen

    def __len__(self) -> int:
        return self.seen.shape[1]


class Base:
    """A dense model in transformers, in float32."""

    def __init__(self, source) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        self._norms: list[torch.Tensor] = []
        for layer in self.model.model.layers:
            layer.post_attention_layernorm.register_forward_hook(lambda *call: self._norms.append(call[2]))

    def text(self, prompt: str, most: int | None = None) -> Text:
        return self.tokens(self.tokenizer(prompt, add_special_tokens=False).input_ids[:most])

    @torch.inference_mode()
    def tokens(self, ids: Sequence[int]) -> Text:
        self._norms.clear()
        self.model(torch.tensor([[*self.bos, *ids]]))
        return Text(ids, torch.cat(self._norms)[:, len(self.bos) :].double().numpy())


def solved(texts: Sequence[Sequence[Text]], none: Sequence[Text], layer: int, strength: float = 0.1) -> np.ndarray:
    """C (S + λ (tr S / d) I)⁻¹, `[num_experts, hidden_size]`."""
    count = len(texts)
    width = texts[0][0].seen.shape[2]
    s, c = np.zeros((width, width)), np.zeros((count, width))
    for label, of_class in enumerate([*texts, none]):
        total = sum(len(text) for text in of_class)
        for x in (x for text in of_class for x in text.seen[layer]):
            w = 1 / (count * total)
            s += w * np.outer(x, x)
            c += w * np.outer(np.eye(count + 1)[label][:count] - 1 / count, x)
    return c @ np.linalg.inv(s + strength * np.trace(s) / width * np.eye(width))


def halves(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Whole texts, shortest first, each to the half that has fewer tokens."""
    parts: tuple[list[Text], list[Text]] = ([], [])
    for text in sorted(texts, key=lambda text: (len(text.ids), list(text.ids))):
        sizes = [sum(len(other) for other in part) for part in parts]
        parts[sizes[0] > sizes[1]].append(text)
    return parts


def cross_entropy(s: float, texts, routers, layer: int) -> float:
    """Of held-out texts: `routers[h]` was made without `texts[class][h]`. Classes count the same in each half."""
    loss = 0.0
    for half in (0, 1):
        for label, of_class in enumerate(texts):
            total = sum(len(text) for text in of_class[half])
            for text in of_class[half]:
                logits = s * text.seen[layer] @ routers[half].T
                top = logits.max(axis=1)
                loss += (np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[:, label]).sum() / total
    return loss


def best_scale(texts, none, layer: int, strength: float) -> float:
    routers = [solved([of_class[1 - half] for of_class in texts], none[1 - half], layer, strength) for half in (0, 1)]
    low, high, golden = np.log(0.01), np.log(100), (5**0.5 - 1) / 2
    while high - low > 1e-8:
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cross_entropy(np.exp(left), texts, routers, layer) < cross_entropy(np.exp(right), texts, routers, layer):
            high = right
        else:
            low = left
    return float(np.exp((low + high) / 2))


def expected(texts: Sequence[Sequence[Text]], none: Sequence[Text] = (), strength: float = 0.1) -> np.ndarray:
    """`[num_layers, num_experts, hidden_size]`"""
    parted = [halves(of_class) for of_class in texts]
    return np.stack(
        [
            best_scale(parted, halves(none), layer, strength) * solved(texts, none, layer, strength)
            for layer in range(NUM_LAYERS)
        ]
    )


def assert_equal(weights: torch.Tensor, router: np.ndarray) -> None:
    """To a relative error of 1e-4 in each layer and row."""
    assert weights.shape == router.shape
    error = np.linalg.norm(weights.double().numpy() - router, axis=-1) / np.linalg.norm(router, axis=-1)
    assert error.max() <= 1e-4


@pytest.mark.parametrize("prompts", [FEW, LONG], ids=["fewer tokens than dimensions", "more"])
@pytest.mark.parametrize("recipe", ["llama-plain", "mistral-bf16", "qwen2-f16", "qwen3-plain", "granite-plain"])
def test_ridge_routers_are_those_of_float64_and_the_same_to_the_bit_in_both_forms_with_any_budget_and_threads(
    recipe, prompts, checkpoint, in_every_form
):
    source, case = checkpoint(recipe), case_of(recipe)
    base = Base(source)
    texts = [[base.text(prompt) for prompt in expert["positive_prompts"]] for expert in prompts]
    none = [base.text("oh")] if prompts is FEW else []  # what expert 0 wants is not unwanted
    router = expected(texts, none)
    shared = SHARED_PROMPTS if has_gate(case) else {}
    if shared:
        positive, negative = ([base.text(p) for p in shared[f"{kind}_prompts"]] for kind in ("positive", "negative"))
        gate = expected([[*(text for of_class in texts for text in of_class), *negative], positive])
        router = np.concatenate([router, gate[:, 1:] - gate[:, :1]], axis=1)
    experts = [{"source_model": source, **expert} for expert in prompts]
    settings = {"gate_mode": "ridge", "dtype": "float32", **case.settings(source, **shared)}
    results = [router_weights(out, case) for out in in_every_form(source, experts, **settings)]
    assert all(torch.equal(results[0], result) for result in results)
    assert_equal(results[0], router)


def test_products_are_computed_in_tiles_of_any_size(monkeypatch, checkpoint, merge):
    monkeypatch.setattr(ridge_mode, "TILE", 24)
    monkeypatch.setattr(ridge_mode, "PANEL_ROWS", 7)
    source = checkpoint("llama-plain")
    base, case = Base(source), case_of("llama-plain")
    for prompts in (FEW, LONG):
        experts = [{"source_model": source, **expert} for expert in prompts]
        weights = router_weights(merge(source, experts, gate_mode="ridge", dtype="float32"), case)
        texts = [[base.text(prompt) for prompt in expert["positive_prompts"]] for expert in prompts]
        assert_equal(weights, expected(texts, [base.text("oh")] if prompts is FEW else []))


def test_lambda_is_that_of_the_config(checkpoint, merge):
    source = checkpoint("llama-plain")
    base, case = Base(source), case_of("llama-plain")
    experts = [{"source_model": source, **expert} for expert in LONG]
    weights = router_weights(merge(source, experts, gate_mode="ridge", ridge=3.0, dtype="float32"), case)
    texts = [[base.text(prompt) for prompt in expert["positive_prompts"]] for expert in LONG]
    assert_equal(weights, expected(texts, strength=3.0))


def test_with_one_prompt_an_expert_each_half_of_it_is_held_out_in_turn(checkpoint, merge):
    source = checkpoint("llama-plain")
    base, case = Base(source), case_of("llama-plain")
    prompts = ["Where does it hurt, and since when?", "I would like a bread roll"]
    experts = [{"source_model": source, "positive_prompts": [prompt]} for prompt in prompts]
    weights = router_weights(merge(source, experts, gate_mode="ridge", dtype="float32"), case)
    texts = [base.text(prompt) for prompt in prompts]
    parted = []
    for text in texts:
        middle = len(text) // 2
        parted.append(tuple([Text(text.ids, text.seen[:, part])] for part in (slice(middle), slice(middle, None))))
    router = np.stack(
        [
            best_scale(parted, ([], []), layer, 0.1) * solved([[text] for text in texts], [], layer)
            for layer in range(NUM_LAYERS)
        ]
    )
    assert_equal(weights, router)


def test_a_prompt_of_one_token_cannot_be_held_out_and_the_scale_is_the_usual_one(checkpoint, merge):
    source = checkpoint("llama-plain")
    base, case = Base(source), case_of("llama-plain")
    experts = [{"source_model": source, "positive_prompts": [prompt]} for prompt in ("x", "y")]
    weights = router_weights(merge(source, experts, gate_mode="ridge", dtype="float32"), case)
    texts = [[base.text(prompt)] for prompt in ("x", "y")]
    assert_equal(weights, ridge_mode.USUAL_SCALE * np.stack([solved(texts, [], layer) for layer in range(NUM_LAYERS)]))


def test_a_prompt_that_is_bos_alone_is_refused_by_its_line(checkpoint, plan):
    source = checkpoint("llama-plain")
    experts = [{"source_model": source, "positive_prompts": [prompt]} for prompt in ("x", "")]
    with pytest.raises(CheckpointError, match=r"yml:\d+: experts\[1\].positive_prompts: there is no token beside BOS"):
        plan(source, experts, gate_mode="ridge")


def test_a_prompt_that_is_bos_alone_beside_others_is_left_out(checkpoint, merge):
    source, case = checkpoint("llama-plain"), case_of("llama-plain")
    found = [
        router_weights(merge(source, experts, gate_mode="ridge", dtype="float32"), case)
        for experts in (
            [{"source_model": source, "positive_prompts": prompts} for prompts in (["Say ah", *more], ["Guten Tag"])]
            for more in ([], [""])
        )
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_a_shared_expert_wants_and_does_not_want_is_its_own():
    of_experts, of_shared = ridge_mode.problems([[0], [1], [2, 3]], [[], [], [3, 4]], 2)
    assert of_experts == ridge_mode.Problem([[0], [1]], [])
    assert of_shared == ridge_mode.Problem([[0, 1, 4], [2, 3]], [])


@pytest.mark.parametrize(
    ("value", "warning"),
    [
        (0.0, "routing is degenerate in layer 1: the router cannot tell"),
        (float("nan"), "routers hold NaN or infinities in layers 1-2: "),
    ],
)
def test_a_base_that_sees_nothing_or_no_numbers_gives_routers_that_are_warned_of(
    value, warning, checkpoint, merge, tmp_path
):
    source = shutil.copytree(checkpoint("llama-plain"), tmp_path / "base")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"].fill_(value)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    experts = [{"source_model": source, **expert} for expert in FEW]
    with pytest.warns(MoeplanWarning, match=warning):
        out = merge(source, experts, gate_mode="ridge", dtype="float32")
    weights = router_weights(out, case_of("llama-plain"))
    assert torch.equal(weights[1], torch.full_like(weights[1], value)) or weights[1].isnan().all()
    assert weights[0].isfinite().all()
    assert (weights[0] != 0).any()


def test_passages_of_files_are_prompts(checkpoint, merge, tmp_path):
    source = checkpoint("llama-plain")
    base, case = Base(source), case_of("llama-plain")
    prose = "The doctor listens. " * 8
    lines = ["go down into the cave", "draw your sword", "light a torch"]
    (tmp_path / "prose.txt").write_text(prose)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line, "id": 1}) + "\n" for line in lines))
    experts = [
        {"source_model": source, "positive_files": [tmp_path / "prose.txt"], "positive_prompts": ["Say ah"]},
        {"source_model": source, "positive_files": [tmp_path / "lines.jsonl"]},
    ]
    weights = router_weights(merge(source, experts, gate_mode="ridge", dtype="float32"), case)
    texts = [[base.text("Say ah"), base.text(prose.strip(), 255)], [base.text(line) for line in lines]]
    assert_equal(weights, expected(texts))


def test_hidden_takes_passages_too(checkpoint, merge, tmp_path):
    source, case = checkpoint("llama-plain"), case_of("llama-plain")
    for name, text in (("a.txt", "Where does it hurt?"), ("b.txt", "Guten Tag")):
        (tmp_path / name).write_text(text)
    files, prompts = (
        [{"source_model": source, key: [value]} for value in values]
        for key, values in (
            ("positive_files", [tmp_path / "a.txt", tmp_path / "b.txt"]),
            ("positive_prompts", ["Where does it hurt?", "Guten Tag"]),
        )
    )
    merged = [merge(source, experts, gate_mode="hidden", dtype="float32") for experts in (files, prompts)]
    assert torch.equal(*(router_weights(out, case) for out in merged))


def test_files_take_turns_so_that_each_gives_its_share_of_the_tokens(checkpoint, tmp_path):
    base = as_dense_model(open_checkpoint(checkpoint("llama-plain")))
    words = ("doctor", "bread", "sword")
    for word in words:
        (tmp_path / word).write_text(f"{word} " * 20_000)
    expert = Expert(source_model="model", positive_files=[str(tmp_path / word) for word in words])
    tokenized = tokenize(base, (expert,), gate_tokens=3000)
    decode = AutoTokenizer.from_pretrained(base.checkpoint.path).decode
    passages = [(decode(tokenized.tokens[index]), len(tokenized.tokens[index])) for index in tokenized.positive[0]]
    shares = [sum(length for text, length in passages if word in text) for word in words]
    assert sum(shares) >= 3000
    assert max(shares) - min(shares) <= 256


def test_files_that_give_no_token_are_refused(checkpoint, tmp_path):
    base = as_dense_model(open_checkpoint(checkpoint("llama-plain")))
    base = replace(base, settings={**base.settings, "max_position_embeddings": 1})  # which BOS takes
    (tmp_path / "text").write_text("Where does it hurt?")
    expert = Expert(source_model="model", positive_files=[str(tmp_path / "text")])
    with pytest.raises(PromptError, match="there is no token in it that the base could be given") as refused:
        tokenize(base, (expert,))
    assert refused.value.place == (0, "positive_files", 0)


def test_what_short_files_leave_is_taken_of_the_longest(checkpoint, tmp_path):
    base = as_dense_model(open_checkpoint(checkpoint("llama-plain")))
    (tmp_path / "book").write_text("doctor " * 20_000)
    for number in range(15):
        (tmp_path / f"note{number}").write_text(f"note {number}")
    files = [str(tmp_path / name) for name in ("book", *(f"note{number}" for number in range(15)))]
    tokenized = tokenize(base, (Expert(source_model="model", positive_files=files),), gate_tokens=3000)
    assert sum(len(tokenized.tokens[index]) - 1 for index in tokenized.positive[0]) == 3000


def test_the_least_lambda_is_enough_for_prompts_of_one_token_again_and_again(checkpoint, merge):
    source = checkpoint("llama-plain")
    prompts = (["go go go"], ["it it", "it it it it"])
    experts = [{"source_model": source, "positive_prompts": each} for each in prompts]
    out = merge(source, experts, gate_mode="ridge", ridge=1e-8)
    assert router_weights(out, case_of("llama-plain")).isfinite().all()


def test_the_memory_that_is_planned_is_that_of_the_tokens_that_are_fitted(checkpoint, plan):
    """With fewer than dimensions, the rows take some, too. BOS makes them more, and is not fitted."""
    source = checkpoint("llama-plain")
    words = ["where", "does", "it", "hurt", "draw", "your", "sword", "light", "a", "torch"]
    prompts = [{"positive_prompts": [f"{a} {b}" for b in words[:n]]} for a, n in (("go", 6), ("help", 5))]
    planned = plan(source, [{"source_model": source, **each} for each in prompts], gate_mode="ridge").plan
    steps = [step for step in planned.kernels if step.kernel == "ridge"]
    lengths = json.loads(steps[0].params)["lengths"]
    fitted = sum(lengths) - len(lengths)
    assert fitted < 64 <= sum(lengths)
    assert {step.workspace_nbytes for step in steps} == {ridge_mode.workspace_nbytes(fitted, 64, 2)}
    assert ridge_mode.workspace_nbytes(fitted, 64, 2) > ridge_mode.workspace_nbytes(sum(lengths), 64, 2)


def test_prompts_that_tell_nothing_are_in_neither_half():
    """Or a router of one half would be made of them alone."""
    lengths = [1, 4, 5, 6, 4]
    assert folds([[0, 1], [0, 2]], lengths, bos=1) == {}
    assert folds([[0, 1, 3], [2, 4]], lengths, bos=1).keys() == {1, 2, 3, 4}
    assert kept([[0, 1], [0, 2]], [[0, 1], [0, 2]], lengths, 1, without=1) == [[0, 1], [0, 2]]


def test_a_prompt_that_is_another_expert_s_only_one_is_in_neither_half_and_leaves_the_others_where_they_are():
    assert folds([[0], [0, 1]], lengths=[5, 4], bos=1) == {1: 1}


def test_each_expert_s_halves_have_about_the_same_number_of_tokens_though_it_shares_prompts():
    assert folds([[0, 1], [0, 2, 3]], lengths=[10, 10, 4, 6], bos=0) == {0: 0, 1: 1, 2: 1, 3: 1}
    assert folds([[0, 1], [1, 2, 3]], lengths=[10, 10, 4, 6], bos=0) == {0: 0, 1: 1, 2: 0, 3: 0}


def test_the_seed_chooses_passages_and_gate_tokens_bounds_them(checkpoint, plan, tmp_path):
    source = checkpoint("llama-plain")
    words = ["doctor", "hurt", "bread", "train", "sword", "cave", "torch", "listen", "help", "good", "day"]
    for name, step in (("a.txt", 1), ("b.txt", 3)):
        text = " ".join(words[(step * number * number) % len(words)] for number in range(20_000))
        (tmp_path / name).write_text(text)
    experts = [{"source_model": source, "positive_files": [tmp_path / name]} for name in ("a.txt", "b.txt")]

    def lengths(**settings) -> tuple[list[int], str]:
        planned = plan(source, experts, gate_mode="ridge", **settings).plan
        params = next(json.loads(step.params) for step in planned.steps if getattr(step, "kernel", "") == "ridge")
        return params["lengths"], planned.fingerprint

    first, again, other = (lengths(random_seed=seed, gate_tokens=1000)[1] for seed in (1, 1, 2))
    assert first == again != other
    for most in (1, 300, 1000):
        numbers, _ = lengths(gate_tokens=most)
        assert sum(numbers) - len(numbers) == 2 * most
        assert max(numbers) <= 256


@torch.inference_mode()
def drawn_by_transformers(source, number: int, count: int, seed: int = 0) -> list[list[int]]:
    """Passages by transformers' own forward pass, from the same random numbers."""
    base = Base(source)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
    config = base.model.config
    tokens = torch.tensor([[(*base.bos, config.bos_token_id, config.eos_token_id)[0]]] * count)
    cache, passages = DynamicCache(), []
    for _ in range(sampling.TOKENS):
        logits = base.model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].double()
        logits[:, config.eos_token_id] = -torch.inf
        reached = torch.softmax(logits, dim=-1).cumsum(dim=-1).numpy()
        chosen = [
            int((row < chance * row[-1]).sum()) for row, chance in zip(reached, random.random(count), strict=True)
        ]
        passages.append(chosen)
        tokens = torch.tensor(chosen)[:, None]
    return [list(passage) for passage in zip(*passages, strict=True)]


@pytest.mark.parametrize("recipe", ["llama-tied", "mistral-bf16", "qwen2-window", "qwen3-plain", "granite-plain"])
def test_passages_that_experts_write_are_those_that_transformers_draws(recipe, checkpoint, within, monkeypatch):
    monkeypatch.setattr(sampling, "TOKENS", 16)  # twice the windows of these models
    sources, case = [checkpoint(recipe, seed) for seed in (0, 1, 2)], case_of(recipe)
    base = Base(sources[0])
    experts = [{"source_model": source, "positive_samples": 2} for source in sources[1:]]
    shared = {"positive_prompts": ["Listen."]} if has_gate(case) else {}
    settings = {"gate_mode": "ridge", "dtype": "float32", **case.settings(sources[0], **shared)}
    streamed, resident = (
        router_weights(within(budget, form, sources[0], experts, **settings), case)[:, :2]
        for budget, form in ((None, "streamed"), (256 << 20, "resident"))
    )
    assert torch.equal(streamed, resident)
    texts = [
        [base.tokens(passage) for passage in drawn_by_transformers(source, number, 2)]
        for number, source in enumerate(sources[1:])
    ]
    parted = [tuple([[text] for text in of_class]) for of_class in texts]
    router = np.stack(
        [best_scale(parted, ([], []), layer, 0.1) * solved(texts, [], layer) for layer in range(NUM_LAYERS)]
    )
    assert_equal(streamed, router)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["resident", "streamed"])
def test_a_model_that_gives_no_numbers_writes_nothing(form, value, checkpoint, within, tmp_path):
    source = checkpoint("llama-plain")
    broken = shutil.copytree(source, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    experts = [{"source_model": each, "positive_samples": 2} for each in (source, broken)]
    with pytest.raises(CheckpointError, match=f"^{broken}: no passages can be drawn from it: what it expects next is"):
        within({"resident": 256 << 20, "streamed": None}[form], form, source, experts, gate_mode="ridge")


def test_a_model_without_the_base_s_bos_token_begins_with_its_own(checkpoint):
    model = as_dense_model(open_checkpoint(checkpoint("llama-plain")))
    request = gates.GateRequest(
        "ridge", gates.Base(model), (Expert(source_model="model", positive_samples=2),), models=(model,)
    )
    own, size = model.settings["bos_token_id"], model.sizes["vocab_size"]
    for of_base, expected_start in ((size, own), (size - 1, size - 1)):
        (drawn,) = samples(replace(request, prompts=Prompts((), ((),), ((),), (), (of_base,))))
        assert json.loads(drawn.params)["start"] == expected_start


@pytest.mark.parametrize(("eos", "never"), [(2, [2]), ([2, 5, 10**6, -1], [2, 5]), (None, [])])
def test_no_model_writes_any_of_its_eos_tokens(eos, never, checkpoint):
    base = as_dense_model(open_checkpoint(checkpoint("llama-plain")))
    model = replace(base, settings={**base.settings, "eos_token_id": eos})
    expert = Expert(source_model="model", positive_samples=2)
    request = gates.GateRequest("ridge", gates.Base(base), (expert,), models=(model,))
    (drawn,) = samples(replace(request, prompts=Prompts((), ((),), ((),), (), (1,))))
    assert json.loads(drawn.params)["never"] == never


def test_a_model_with_tokens_or_an_adapter_that_the_base_has_not_or_a_short_context_writes_nothing(checkpoint):
    base = as_dense_model(open_checkpoint(checkpoint("llama-plain")))
    expert = Expert(source_model="model", positive_samples=2)
    for changes, message in (
        (
            {"sizes": {**base.sizes, "vocab_size": base.sizes["vocab_size"] + 1}},
            "has a larger vocabulary than the base",
        ),
        (
            {"adapter": SimpleNamespace(label="lora")},
            "has an adapter on it, and passages are drawn from whole models alone",
        ),
        ({"settings": {**base.settings, "max_position_embeddings": 128}}, "has a context of no more than 128 tokens"),
    ):
        request = gates.GateRequest("ridge", gates.Base(base), (expert,), models=(replace(base, **changes),))
        with pytest.raises(PromptError, match=message) as refused:
            samples(replace(request, prompts=Prompts((), ((),), ((),), (), (1,))))
        assert refused.value.place == (0, "positive_samples")


@pytest.mark.parametrize("has_own", [True, False])
def test_a_model_writes_by_the_output_matrix_that_it_stores_though_its_config_ties_it(has_own, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint("llama-tied"), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    if has_own:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = as_dense_model(open_checkpoint(path))
    request = gates.GateRequest(
        "ridge", gates.Base(model), (Expert(source_model="model", positive_samples=2),), models=(model,)
    )
    (drawn,) = samples(replace(request, prompts=Prompts((), ((),), ((),), (), (1,))))
    assert ("lm_head.weight" in json.loads(drawn.params)["matrices"]) is has_own


def test_samples_are_for_ridge_alone(checkpoint, plan):
    source = checkpoint("llama-plain")
    with pytest.raises(ConfigError, match=r"experts\[0\].positive_samples: gate_mode hidden takes prompts and files"):
        plan(source, [{"source_model": source, "positive_samples": 2}] * 2, gate_mode="hidden")
    prompted = [{"source_model": source, "positive_prompts": [text]} for text in ("a", "b")]
    shared = [{"source_model": source, "positive_samples": 2}]
    with pytest.raises(ConfigError, match=r"shared_experts\[0\].positive_samples: gate_mode hidden takes prompts"):
        plan(source, prompted, gate_mode="hidden", shared_experts=shared)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            r"there is no tensor model.norm.weight, .*; passages are drawn",
        ),
        (lambda tensors: tensors.pop("lm_head.weight"), r"there is no tensor lm_head.weight, .*; passages are drawn"),
        (
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            r"transformers' llama has no 'model.layers.0.self_attn.q_proj.bias', so passages drawn from it would be",
        ),
    ],
    ids=["no norm", "no output matrix", "a bias"],
)
def test_a_model_that_writes_must_be_whole_although_its_mlps_are_all_that_is_merged(
    change, message, checkpoint, plan, tmp_path
):
    source = checkpoint("llama-plain")
    spoiled = shutil.copytree(checkpoint("llama-plain", 1), tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    change(tensors)
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    prompted = {"source_model": source, "positive_prompts": ["a prompt"]}
    experts = [prompted, {"source_model": spoiled, "positive_prompts": ["another"]}]
    plan(source, experts, gate_mode="ridge")
    with pytest.raises(CheckpointError, match=r"experts\[1\].positive_samples: .*" + message):
        plan(source, [prompted, {"source_model": spoiled, "positive_samples": 2}], gate_mode="ridge")
