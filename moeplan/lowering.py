"""From a config and its checkpoints to a tensor graph: what every output tensor is made of."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from moeplan.architectures.dense import MLP, DenseModel
from moeplan.architectures.family import Family
from moeplan.checkpoint import CheckpointError
from moeplan.config import Expert, MergeConfig
from moeplan.errors import MoeplanWarning
from planner.expr import DType, Expr, Read, add_noise, cast, scale
from planner.graph import TensorGraph

MUST_AGREE = ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
SHOULD_AGREE = ("rope_theta", "vocab_size")


@dataclass(frozen=True)
class Sources:
    """The models of a merge. `experts` are in the config's order; one model may stand there many times."""

    base: DenseModel
    experts: tuple[DenseModel, ...]


def check_fit(config: MergeConfig, family: Family, sources: Sources) -> None:
    """Refuse sources that cannot be put together, naming both sides; warn of differences that only deserve a word.

    Raises CheckpointError.
    """
    base = sources.base
    for index, expert in enumerate(sources.experts):
        where = config.where("experts", index, "source_model")
        if expert.name != base.name:
            raise CheckpointError(
                f"{where}: {expert.checkpoint.path} is a {expert.name} model and the base {base.checkpoint.path} a "
                f"{base.name} model; all must be of one family"
            )
        for key in MUST_AGREE:
            if expert.settings[key] != base.settings[key]:
                raise CheckpointError(
                    f"{where}: {key} is {expert.settings[key]} in {expert.checkpoint.path} and {base.settings[key]} in "
                    f"the base {base.checkpoint.path}; they must be equal"
                )
        for key in SHOULD_AGREE:
            if expert.settings[key] != base.settings[key]:
                warnings.warn(
                    f"{where}: {key} is {expert.settings[key]} in {expert.checkpoint.path} and {base.settings[key]} in "
                    f"the base {base.checkpoint.path}; the merged model has the base's",
                    MoeplanWarning,
                    stacklevel=2,
                )
        _refuse_what_is_lost(family, expert, [n for n in expert.unknown_tensors() if ".mlp." in n])
    _refuse_what_is_lost(family, base, base.unknown_tensors())
    if not base.settings["tie_word_embeddings"] and "lm_head.weight" not in base.checkpoint.tensors:
        raise CheckpointError(
            f"{base.checkpoint.path}: there is no tensor lm_head.weight, and config.json does not tie it to the "
            "embeddings (tie_word_embeddings)"
        )


def _refuse_what_is_lost(family: Family, model: DenseModel, names: Sequence[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(
            f"{model.checkpoint.path}: a {family.name} model cannot hold {names[0]}{more}, and without it the merged "
            f"model would compute something else"
        )


def lower(
    config: MergeConfig, family: Family, sources: Sources, routers: Sequence[Expr], dtype: DType, seed: int
) -> TensorGraph:
    """The output tensors, in `dtype`, layer after layer.

    `routers` has each layer's router, `[num_experts, hidden_size]`. Raises CheckpointError for a tensor that is missing
    or of another shape than its model's config says.
    """
    graph = TensorGraph()
    for name, spec, layer in sources.base.specs():
        mlp = next((proj for proj in MLP if name.endswith(f".mlp.{proj}.weight")), None)
        if mlp is None or layer is None:
            read = sources.base.tensor(name, spec)
            if read is not None:
                graph.add(name, cast(read, dtype))
            continue
        if mlp == MLP[0]:
            graph.add(family.router.format(layer=layer), cast(routers[layer], dtype))
        for number, (expert, model) in enumerate(zip(config.experts, sources.experts, strict=True)):
            read = model.tensor(name, spec)
            assert read is not None
            noise_seed = _seed(seed, f"layer {layer} expert {number} {mlp}")
            graph.add(
                family.experts[mlp].format(layer=layer, expert=number),
                cast(_adjusted(read, expert, mlp, noise_seed), dtype),
            )
    return graph


def _adjusted(read: Read, expert: Expert, mlp: str, seed: int) -> Expr:
    """An expert's tensor with its noise, and, where it writes to the residual stream, its scale."""
    noisy = add_noise(read, expert.noise_scale, seed)
    return scale(noisy, expert.residual_scale) if mlp == "down_proj" else noisy


def _seed(seed: int, what: str) -> int:
    """A seed of its own for each tensor, so that copies of one model get different noise."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:8], "little")
