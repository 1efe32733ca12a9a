"""What each output family's files must hold, written down from the modelling code that reads them.

The names and keys are those of transformers' modelling files and of its `conversion_mapping.py`, never of moeplan's own
declarations. DeepSeek's, which transformers lacks, are those of the remote code that its `auto_map` names and of its
readers: vLLM (`vllm/model_executor/models/deepseek_v2.py`), llama.cpp's converter (`DeepseekModel`), and mergekit,
which writes them (`mergekit/moe/deepseek.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import RECIPES, read_tensors
from torch import Tensor

NUM_LAYERS = 3
PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Names:
    """The names, within a layer, of a router and its experts, or of a shared expert and its gate.

    `tensors` are those of the experts: of which matrices of an MLP each is made, one above the other. With `{}` in its
    name, each expert has one; without, the experts' are stacked.
    """

    router: str
    tensors: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Output:
    """An output family: what the YAML calls it, what it is made of, what its files hold."""

    architecture: str
    model_type: str
    model_class: str
    sources: Sequence[str]
    layouts: Mapping[str, Names]
    num_experts_key: str
    shared: Names | None = None  # its router is "" where it is always on
    shared_experts: Sequence[int] = (0,)  # how many there may be
    biases: Mapping[str, str] = field(default_factory=dict)  # zero where a source has none, and as high as which tensor
    tied: bool = True  # whether the output matrix can be left out where it is the embeddings


def _same_names(prefix: str) -> dict[str, Sequence[str]]:
    return {f"{prefix}.{part}.weight": (part,) for part in PARTS}


PACKED = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}

CLASSIC = {
    "separate": Names("mlp.gate.weight", _same_names("mlp.experts.{}")),
    "packed": Names("mlp.gate.weight", PACKED),
}

OUTPUTS = {
    "mixtral": Output(
        "mixtral",
        "mixtral",
        "MixtralForCausalLM",
        sources=("llama", "mistral"),
        layouts={
            "separate": Names(
                "block_sparse_moe.gate.weight",
                {
                    "block_sparse_moe.experts.{}.w1.weight": ("gate_proj",),
                    "block_sparse_moe.experts.{}.w2.weight": ("down_proj",),
                    "block_sparse_moe.experts.{}.w3.weight": ("up_proj",),
                },
            ),
            "packed": CLASSIC["packed"],
        },
        num_experts_key="num_local_experts",
    ),
    "deepseek": Output(
        "deepseek",
        "deepseek",
        "DeepseekForCausalLM",
        sources=("llama", "mistral"),
        layouts={"separate": CLASSIC["separate"]},
        num_experts_key="n_routed_experts",
        shared=Names("", _same_names("mlp.shared_experts")),
        shared_experts=(1, 0),
        tied=False,
    ),
    "qwen2-moe": Output(
        "qwen moe",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        sources=("llama", "mistral", "qwen2"),
        layouts=CLASSIC,
        num_experts_key="num_experts",
        shared=Names("mlp.shared_expert_gate.weight", _same_names("mlp.shared_expert")),
        shared_experts=(1,),
        biases={f"self_attn.{part}.bias": f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")},
        tied=False,
    ),
    "qwen3-moe": Output(
        "qwen3",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        sources=("qwen3",),
        layouts=CLASSIC,
        num_experts_key="num_experts",
    ),
    "granite": Output(
        "granite",
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        sources=("granite",),
        layouts={
            "packed": Names(
                "block_sparse_moe.router.layer.weight",
                {
                    "block_sparse_moe.input_linear.weight": ("gate_proj", "up_proj"),
                    "block_sparse_moe.output_linear.weight": ("down_proj",),
                },
            )
        },
        num_experts_key="num_local_experts",
        shared=Names(
            "",
            {
                "shared_mlp.input_linear.weight": ("gate_proj", "up_proj"),
                "shared_mlp.output_linear.weight": ("down_proj",),
            },
        ),
        shared_experts=(1, 0),
    ),
}


@dataclass(frozen=True)
class Case:
    """A way to merge: which output family, of which source family, in which layout, with how many shared experts."""

    output: str
    source: str
    layout: str
    shared: int

    def __str__(self) -> str:
        return f"{self.output}-of-{self.source}-{self.layout}{'-shared' * self.shared}"

    @property
    def names(self) -> Names:
        return OUTPUTS[self.output].layouts[self.layout]

    def settings(self, shared_source: Path, **shared: Any) -> dict[str, Any]:
        """What the `merge` fixture takes for this case; `shared` is what the YAML says of the shared expert."""
        settings: dict[str, Any] = {"architecture": OUTPUTS[self.output].architecture, "expert_layout": self.layout}
        if self.shared:
            settings["shared_experts"] = [{"source_model": shared_source, **shared}]
        return settings


CASES = [
    Case(name, source, layout, shared)
    for name, output in OUTPUTS.items()
    for source in output.sources
    for layout in output.layouts
    for shared in output.shared_experts
]
READABLE_CASES = [case for case in CASES if case.output != "deepseek"]
"""Those that transformers has a class for."""


def recipes_of(source: str) -> list[str]:
    """The recipes of a source family."""
    return [name for name, recipe in RECIPES.items() if recipe.family == source]


def plain_recipe(case: Case) -> str:
    """A recipe of the case's source with nothing that the output family lacks: DeepSeek has no sliding window."""
    return "mistral-no-window" if (case.output, case.source) == ("deepseek", "mistral") else f"{case.source}-plain"


def mlp(tensors: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """A dense model's MLP."""
    return {part: tensors[f"model.layers.{layer}.mlp.{part}.weight"] for part in PARTS}


def router_names(case: Case) -> set[str]:
    """The tensors that are made from prompts or drawn: routers, and shared experts' gates."""
    output = OUTPUTS[case.output]
    names = {case.names.router} | ({output.shared.router} if output.shared and case.shared else set())
    return {f"model.layers.{layer}.{name}" for layer in range(NUM_LAYERS) for name in names if name}


def expected_tensors(case: Case, base: Path, experts: Sequence[Path], shared: Path | None = None) -> dict[str, Tensor]:
    """Every tensor of a merged model but `router_names`, as it must be; `shared` counts where the case has one.

    The rotary frequencies that checkpoints of Llama 1's time hold are no weights, and belong in no model of today.
    """
    output = OUTPUTS[case.output]
    source = read_tensors(base)
    expected = {n: t for n, t in source.items() if ".mlp." not in n and not n.endswith(".rotary_emb.inv_freq")}
    if not output.tied:
        expected.setdefault("lm_head.weight", source["model.embed_tokens.weight"])
    loaded = [read_tensors(expert) for expert in experts]
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        for name, like in output.biases.items():
            expected.setdefault(prefix + name, torch.zeros_like(source[prefix + like][:, 0]))
        mlps = [mlp(tensors, layer) for tensors in loaded]
        expected |= {prefix + name: tensor for name, tensor in _experts(case.names, mlps).items()}
        if case.shared and output.shared and shared:
            parts = mlp(read_tensors(shared), layer)
            for name, made_of in output.shared.tensors.items():
                expected[prefix + name] = torch.cat([parts[part] for part in made_of])
    return expected


def _experts(names: Names, mlps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors = {}
    for name, made_of in names.tensors.items():
        each = [torch.cat([parts[part] for part in made_of]) for parts in mlps]
        if "{}" in name:
            tensors |= {name.format(number): tensor for number, tensor in enumerate(each)}
        else:
            tensors[name] = torch.stack(each)
    return tensors
