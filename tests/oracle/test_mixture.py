"""What a merged model of different experts computes, against a mixture that is written down here a second time.

The mixture is put into the dense model in the place of its MLPs: top-k routing whose chosen weights sum to 1, and the
shared expert, behind a sigmoid gate or always on. Experts that are swapped show in the logits, as gate and up
projections do.
"""

import json
from collections.abc import Sequence

import pytest
import torch
from families import OUTPUTS, READABLE_CASES, Case, plain_recipe
from models import VOCAB_SIZE, read_tensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TOP_K = 2


class Mixture(nn.Module):
    """A mixture of MLPs for hidden states `[..., hidden_size]`, whose modules are called what DeepSeek calls them.

    `gate` is the router; `shared_gate`, `[1, hidden_size]`, the shared expert's: without, it is always on.
    """

    def __init__(
        self,
        gate: nn.Linear,
        experts: Sequence[nn.Module],
        shared_experts: nn.Module | None = None,
        shared_gate: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(experts)
        self.shared_experts = shared_experts
        self.shared_gate = shared_gate

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.gate(x), dim=-1)
        chosen = scores >= scores.topk(TOP_K).values[..., -1:]
        weights = torch.where(chosen, scores, 0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        result = sum(weights[..., n, None] * expert(x) for n, expert in enumerate(self.experts))
        if self.shared_experts is not None:
            share = 1.0 if self.shared_gate is None else torch.sigmoid(x @ self.shared_gate.T)
            result = result + share * self.shared_experts(x)
        return result


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.load_state_dict({"weight": weight})
    return layer


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")


def mixture_of(case: Case, out, base, experts, shared):
    """The model of `base` with mixtures of the sources' MLPs, routed by what `out` holds."""
    model, sources = load(base), [load(source) for source in experts]
    shared_model = load(shared) if case.shared else None
    routed, gate = read_tensors(out), getattr(OUTPUTS[case.output].shared, "router", "")
    for n, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{n}."
        layer.mlp = Mixture(
            linear(routed[prefix + case.names.router]),
            [source.model.layers[n].mlp for source in sources],
            shared_model.model.layers[n].mlp if shared_model else None,
            routed[prefix + gate] if gate else None,
        )
    return model


@torch.inference_mode()
def assert_same_logits(model, expected) -> None:
    tokens = torch.randint(VOCAB_SIZE, (1, 80), generator=torch.Generator().manual_seed(0))
    logits, wanted = model(tokens).logits, expected(tokens).logits
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", READABLE_CASES, ids=str)
def test_a_merged_model_is_the_mixture_of_its_experts(case, checkpoint, merge):
    base, shared, *experts = (checkpoint(plain_recipe(case), seed) for seed in range(6))
    out = merge(base, experts, experts_per_token=TOP_K, **case.settings(shared))
    assert_same_logits(load(out), mixture_of(case, out, base, experts, shared))


def deepseek(out) -> LlamaForCausalLM:
    """The DeepSeek MoE in `out`, as DeepSeek's code has it: Llama's attention, and a mixture where Llama has an MLP.

    Built from `out` alone: its config.json and, strictly, its tensors.
    """
    config = json.loads((out / "config.json").read_text())
    known = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map", "dtype")}
    mlp_config = LlamaConfig(**known | {"intermediate_size": config["moe_intermediate_size"]})
    model = LlamaForCausalLM(LlamaConfig(**known))
    for layer in model.model.layers:
        mlps = [type(layer.mlp)(mlp_config) for _ in range(config["n_routed_experts"] + 1)]
        gate = nn.Linear(config["hidden_size"], config["n_routed_experts"], bias=False)
        layer.mlp = Mixture(gate, mlps[1:], mlps[0] if config["n_shared_experts"] else None)
    tensors = read_tensors(out)
    if config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        *("llama-plain", "llama-old", "llama-tied", "llama-off-page", "llama-rope-old-linear"),
        *("llama-rope-new-dynamic", "mistral-no-window"),
    ],
)
def test_a_deepseek_of_copies_computes_what_the_dense_model_does(recipe, with_shared, checkpoint, merge):
    source = checkpoint(recipe)
    shared = {"shared_experts": [{"source_model": source, "residual_scale": 0}]} if with_shared else {}
    out = merge(source, [source] * 4, architecture="deepseek", **shared)
    assert_same_logits(deepseek(out), load(source))


@pytest.mark.parametrize("with_shared", [False, True])
def test_a_deepseek_is_the_mixture_of_its_experts(with_shared, checkpoint, merge):
    case = Case("deepseek", "llama", "separate", int(with_shared))
    base, shared, *experts = (checkpoint("llama-plain", seed) for seed in range(6))
    out = merge(base, experts, experts_per_token=TOP_K, **case.settings(shared))
    assert_same_logits(deepseek(out), mixture_of(case, out, base, experts, shared))
