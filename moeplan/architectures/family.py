"""What an output family is: data. One file beside this one declares each; `moeplan.lowering` makes its tensors of that,
`moeplan.model_config` its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeplan.architectures.dense import DenseFamily, TensorSpec
from moeplan.tensor_names import MLP

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")

CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
)
"""Settings that every family calls what the dense families call them."""


@dataclass(frozen=True, slots=True)
class MlpTensor:
    """An output tensor under `name`, made of a source MLP's matrices named `parts`, one above the other.

    With `{expert}` in its name there is one for each expert; without, the experts' tensors are stacked under a new
    first dimension. `{layer}` stands for the layer.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the routed experts are laid out: the router `[num_experts, hidden_size]`, the experts' tensors."""

    router: str
    experts: tuple[MlpTensor, ...]


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """How a family holds a shared expert."""

    tensors: tuple[MlpTensor, ...]

    gate: str | None = None
    """Its sigmoid gate, `[1, hidden_size]`, which is made from prompts; None: it is always on."""

    required: bool = False

    present: Mapping[str, Any] = field(default_factory=dict)
    """Settings where there is one, and"""

    absent: Mapping[str, Any] = field(default_factory=dict)
    """settings where there is none."""

    derived: Mapping[str, str] = field(default_factory=dict)
    """Settings that, where there is one, are equal to another one of the base."""


@dataclass(frozen=True, slots=True)
class Caveat:
    """What some program that reads a family refuses or computes wrong: see docs/compatibility.md."""

    words: str

    applies: Callable[[Mapping[str, Any]], bool]
    """Whether it does so to a model with this config.json."""


ACTIVATION = Caveat(
    "the activation is not SiLU: llama.cpp computes SiLU all the same, and vLLM does, too, or refuses the model",
    lambda config: config["hidden_act"] != "silu",
)

HEAD_DIM = Caveat(
    "heads are not hidden_size / num_attention_heads wide: in this family transformers 5 alone reads that, and other "
    "programs refuse it or compute another model",
    lambda config: config["head_dim"] * config["num_attention_heads"] != config["hidden_size"],
)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of MoE models that merges can be written as. Tensors outside the MLPs keep their names."""

    names: tuple[str, ...]
    """What `architecture:` in the YAML may abbreviate, in any case; the first is what moeplan calls it."""

    sources: tuple[DenseFamily, ...]
    """What it can be made of."""

    model_type: str
    model_class: str

    layouts: Mapping[str, Layout]
    """By the name that `--expert-layout` takes; the first is the default."""

    num_experts_key: str
    """What config.json calls the number of routed experts."""

    shared: SharedExpert | None = None
    """None: it has no shared expert."""

    carried: tuple[str, ...] = CARRIED
    """Settings that config.json takes over from the base, complete with the base family's defaults."""

    derived: Mapping[str, str] = field(default_factory=dict)
    """Settings that are equal to another one of the base."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are always so."""

    windowed: Mapping[str, Any] | None = None
    """Settings that turn a sliding window of `sliding_window` tokens on in all layers; None: it cannot have one."""

    rope_types: tuple[str, ...] = ROPE_TYPES
    """The kinds of RoPE scaling that it can hold."""

    free_head_dim: bool = True
    """Whether heads may be of another width than hidden_size / num_attention_heads."""

    zeros: tuple[TensorSpec, ...] = ()
    """Tensors that it always has, zero where the base has none."""

    tied: bool = True
    """Whether it can tie the output matrix to the embeddings; otherwise it is written out, as their alias."""

    reads_tokenizers_of: tuple[DenseFamily, ...] | None = None
    """The sources whose tokenizers its `model_type` has transformers read right where they name no class; None: all."""

    ignores_tokenizer_class: bool = False
    """Whether transformers 5 reads its tokenizer with the plain class, whatever class is named (tokenization_auto.py),
    and so reads a sentencepiece model alone wrong."""

    readers: str | None = None
    """What to load it with, in words, where transformers has no class of its own for it; None: it has one."""

    caveats: tuple[Caveat, ...] = (ACTIVATION,)

    @property
    def name(self) -> str:
        return self.names[0]

    def warnings(self, config: Mapping[str, Any]) -> list[str]:
        """What its readers refuse or get wrong of a model with this config.json, in words."""
        return [caveat.words for caveat in self.caveats if caveat.applies(config)]


def separate(template: str, matrices: Mapping[str, str]) -> tuple[MlpTensor, ...]:
    """A tensor for each of an MLP's matrices: `template` with `{matrix}` replaced by what `matrices` calls it."""
    return tuple(MlpTensor(template.replace("{matrix}", name), (part,)) for part, name in matrices.items())


SAME_NAMES = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}

PACKED = (
    MlpTensor(MLP + "experts.gate_up_proj", ("gate_proj", "up_proj")),
    MlpTensor(MLP + "experts.down_proj", ("down_proj",)),
)
"""The fused experts of transformers 5: `[num_experts, 2 · intermediate_size, hidden_size]`, and
`[num_experts, hidden_size, intermediate_size]`."""
