"""Dense models, which merges are made from: which tensors a family has, and what its configs leave unsaid.

`config.json` may leave out what equals the family's default, and the defaults of two families differ (an absent
`sliding_window` is 4096 in Mistral; an absent `num_key_value_heads` is 8 there and the number of heads in Llama). So
each family lists its defaults, from its configuration class in transformers 5, and everything downstream sees
complete settings. The families themselves stand beside the MoE families that are made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moeplan.adapter import Adapter, open_adapter
from moeplan.architectures.setting_values import Kind, complete_settings
from moeplan.checkpoint import Checkpoint
from moeplan.places import CheckpointError, Place
from moeplan.tensor_names import EMBEDDING, LAYER, MLP, NORM, OUTPUT_MATRIX, is_mlp
from planner.expr import Expr, Read, Source

IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Buffers that old checkpoints hold and every reader computes for itself."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a family has, under `name`; `{layer}` in it stands for each layer's number.

    `shape` names the sizes: settings, or `q_size` and `kv_size`, all heads' rows of the projections.
    """

    name: str
    shape: tuple[str, ...]
    optional: bool = False


DECODER = (
    TensorSpec(EMBEDDING, ("vocab_size", "hidden_size")),
    TensorSpec(LAYER + "input_layernorm.weight", ("hidden_size",)),
    TensorSpec(LAYER + "self_attn.q_proj.weight", ("q_size", "hidden_size")),
    TensorSpec(LAYER + "self_attn.k_proj.weight", ("kv_size", "hidden_size")),
    TensorSpec(LAYER + "self_attn.v_proj.weight", ("kv_size", "hidden_size")),
    TensorSpec(LAYER + "self_attn.o_proj.weight", ("hidden_size", "q_size")),
    TensorSpec(LAYER + "post_attention_layernorm.weight", ("hidden_size",)),
    TensorSpec(MLP + "gate_proj.weight", ("intermediate_size", "hidden_size")),
    TensorSpec(MLP + "up_proj.weight", ("intermediate_size", "hidden_size")),
    TensorSpec(MLP + "down_proj.weight", ("hidden_size", "intermediate_size")),
    TensorSpec(NORM, ("hidden_size",)),
    TensorSpec(OUTPUT_MATRIX, ("vocab_size", "hidden_size"), optional=True),
)


def attention_with(*specs: TensorSpec) -> tuple[TensorSpec, ...]:
    """The decoder's tensors, and `specs` beside those of its attention."""
    after = DECODER.index(next(spec for spec in DECODER if spec.name.endswith("o_proj.weight"))) + 1
    return DECODER[:after] + specs + DECODER[after:]


@dataclass(frozen=True, slots=True)
class DenseFamily:
    """A dense family, under its `model_type`. `defaults` are its settings where config.json is silent."""

    model_type: str
    defaults: Mapping[str, Any]
    tensors: tuple[TensorSpec, ...] = DECODER

    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """What settings of its own must be; `setting_values.KINDS` has those of all families."""

    of_mlps: tuple[str, ...] = ()
    """Settings of its own that change what an MLP must learn: an expert's must be the base's."""

    of_backbone: tuple[str, ...] = ()
    """Settings of its own that change what all else must learn: where that is averaged, a difference is warned of."""


COMMON_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "rope_theta": 10000.0,
    "tokenizer_class": None,
}
"""Llama's, which most families start from."""


@dataclass(frozen=True)
class DenseModel:
    """A checkpoint seen as a model of its family, with an `adapter` on its MLPs or without.

    `settings` are complete: what config.json says, else the family's default. `sizes` are the numbers that shapes
    are named by.
    """

    checkpoint: Checkpoint
    family: DenseFamily
    settings: Mapping[str, Any]
    sizes: Mapping[str, int]
    adapter: Adapter | None = None

    @property
    def label(self) -> str:
        """What the YAML calls it: `MODEL`, or `MODEL+ADAPTER`."""
        return self.checkpoint.label + ("" if self.adapter is None else f"+{self.adapter.label}")

    @property
    def directories(self) -> list[Path]:
        """Where its small files are, and its adapter's."""
        return [self.checkpoint.path, *([] if self.adapter is None else [self.adapter.path])]

    @property
    def files(self) -> frozenset[Source]:
        """The files of its weights, and its adapter's."""
        return self.checkpoint.tensors.files() | {
            read.file for read in (() if self.adapter is None else self.adapter.reads)
        }

    def with_adapter(self, place: str | Path | Place) -> DenseModel:
        """This model with the LoRA adapter in directory `place` on it. Raises CheckpointError."""
        weights = {
            name: read
            for name, spec, _ in self.specs()
            if (read := self.tensor(name, spec) if is_mlp(name) else self.checkpoint.tensors.get(name)) is not None
        }
        if self.settings["tie_word_embeddings"] and EMBEDDING in weights:
            weights.setdefault(OUTPUT_MATRIX, weights[EMBEDDING])
        return replace(self, adapter=open_adapter(place, weights))

    @property
    def num_layers(self) -> int:
        return self.sizes["num_hidden_layers"]

    @property
    def hidden_size(self) -> int:
        return self.sizes["hidden_size"]

    @property
    def output_matrix(self) -> Read:
        """Its output matrix: the embeddings, where it stores none of its own.

        One that is stored counts though `tie_word_embeddings` may say otherwise, as in transformers 5
        (modeling_utils.py, `tie_weights`).
        """
        tensors = self.checkpoint.tensors
        return tensors[OUTPUT_MATRIX if OUTPUT_MATRIX in tensors else EMBEDDING]

    def windows(self) -> list[int | None]:
        """For each layer how many tokens back its attention sees; None: all.

        The rules are those of the configuration classes in transformers 5 (configuration_qwen2.py and others).
        """
        given = self.settings
        if not self._has_window:
            return [None] * self.num_layers
        window = self.checkpoint.integer("sliding_window", default=given["sliding_window"])
        kinds = given.get("layer_types")
        if isinstance(kinds, list) and len(kinds) == self.num_layers:
            return [window if kind == "sliding_attention" else None for kind in kinds]
        first = 0
        if "max_window_layers" in given:  # which not every family has, though a config.json may name it
            first = self.checkpoint.integer("max_window_layers", default=given["max_window_layers"], minimum=0)
        return [window if layer >= first else None for layer in range(self.num_layers)]

    @property
    def _has_window(self) -> bool:
        """Whether there is one in any layer that `layer_types` may give it."""
        return self.settings.get("sliding_window") is not None and self.settings.get("use_sliding_window", True)

    def check_windows(self) -> None:
        """Raises CheckpointError where layers are to have a window, and there is none: no reader can evaluate that."""
        if not self._has_window and "sliding_attention" in (self.settings.get("layer_types") or []):
            raise CheckpointError(
                f"{self.checkpoint.config_file}: layer_types names sliding_attention, and no sliding window is in "
                "force; remove layer_types if the model is used without one"
            )

    def specs(self) -> Iterator[tuple[str, TensorSpec, int | None]]:
        """Each tensor that the family has: its name, its spec, its layer if it is in one; layer after layer."""
        in_layer = [spec for spec in self.family.tensors if "{layer}" in spec.name]
        before = self.family.tensors.index(in_layer[0])
        for spec in self.family.tensors[:before]:
            yield spec.name, spec, None
        for layer in range(self.num_layers):
            for spec in in_layer:
                yield spec.name.format(layer=layer), spec, layer
        for spec in self.family.tensors[before + len(in_layer) :]:
            yield spec.name, spec, None

    def tensor(self, name: str, spec: TensorSpec) -> Read | None:
        """Where the tensor lies; None for an optional one that is not there.

        Raises CheckpointError for one that is missing or of another shape than the config says.
        """
        read = self.checkpoint.tensors.get(name)
        if read is None:
            if spec.optional:
                return None
            raise CheckpointError(
                f"{self.checkpoint.label}: there is no tensor {name}, which a {self.model_type} model has"
            )
        expected = tuple(self.sizes[size] for size in spec.shape)
        if read.shape != expected:
            raise CheckpointError(
                f"{self.checkpoint.label}: {name} has shape {list(read.shape)}, and config.json makes it "
                f"{list(expected)} ({' × '.join(spec.shape)})"
            )
        return read

    def check_tensors(self) -> None:
        """Raises CheckpointError where one is missing, or of another shape than the config says."""
        for name, spec, _ in self.specs():
            self.tensor(name, spec)
        if OUTPUT_MATRIX not in self.checkpoint.tensors and not self.settings["tie_word_embeddings"]:
            raise CheckpointError(
                f"{self.checkpoint.label}: there is no tensor {OUTPUT_MATRIX}, and config.json does not tie it to the "
                "embeddings (tie_word_embeddings)"
            )

    def mlp_matrix(self, layer: int, part: str) -> Expr:
        """The matrix `part` (`gate_proj`, `up_proj`, `down_proj`) of a layer's MLP, with the adapter on it."""
        spec = next(spec for spec in self.family.tensors if spec.name == f"{MLP}{part}.weight")
        name = spec.name.format(layer=layer)
        read = self.tensor(name, spec)
        assert read is not None  # no tensor of a layer is optional
        return read if self.adapter is None else self.adapter.applied_to(name, read)

    @property
    def model_type(self) -> str:
        return self.family.model_type

    def unknown_tensors(self) -> list[str]:
        """Tensors of the checkpoint that the family does not have, such as biases."""
        known = {name for name, _, _ in self.specs()}
        return [n for n in self.checkpoint.tensors if n not in known and not n.endswith(IGNORED_SUFFIXES)]


def dense_model(checkpoint: Checkpoint, family: DenseFamily) -> DenseModel:
    """See `checkpoint` as a model of `family`. Raises CheckpointError where its settings cannot be."""
    settings = complete_settings(checkpoint, family.defaults, family.kinds)
    if settings["num_key_value_heads"] is None:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if settings["head_dim"] is None:
        heads = checkpoint.integer("num_attention_heads", default=settings["num_attention_heads"])
        hidden = checkpoint.integer("hidden_size", default=settings["hidden_size"])
        if heads > hidden:
            raise checkpoint.wrong_value("num_attention_heads", f"at most hidden_size, which is {hidden:,}")
        settings["head_dim"] = hidden // heads
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    sizes = {name: checkpoint.integer(name, default=settings[name]) for name in names}
    sizes["num_hidden_layers"] = checkpoint.integer(
        "num_hidden_layers", default=settings["num_hidden_layers"], maximum=10_000
    )
    context = settings["max_position_embeddings"]
    settings["max_position_embeddings"] = checkpoint.integer("max_position_embeddings", default=context)
    pad = settings["pad_token_id"]
    if pad is not None and pad >= sizes["vocab_size"]:
        raise checkpoint.wrong_value("pad_token_id", f"below vocab_size, which is {sizes['vocab_size']:,}")
    sizes["q_size"] = sizes["num_attention_heads"] * sizes["head_dim"]
    sizes["kv_size"] = sizes["num_key_value_heads"] * sizes["head_dim"]
    tensors = checkpoint.tensors
    if settings["tie_word_embeddings"] and OUTPUT_MATRIX in tensors and EMBEDDING not in tensors:
        # A file has one name of what is tied; transformers 5 takes either (modeling_utils.py, `tie_weights`).
        checkpoint = replace(checkpoint, tensors=tensors.renamed(OUTPUT_MATRIX, EMBEDDING))
    return DenseModel(checkpoint, family, settings | {n: sizes[n] for n in (*names, "num_hidden_layers")}, sizes)
