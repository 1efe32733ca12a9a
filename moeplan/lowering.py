"""From a config and its checkpoints to a tensor graph: what every output tensor is made of."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeplan.adapter_config import MERGE_ADAPTER
from moeplan.architectures.attention import rope
from moeplan.architectures.dense import DenseModel, TensorSpec
from moeplan.architectures.family import Family, MlpTensor
from moeplan.config import Expert, MergeConfig
from moeplan.errors import MoeplanWarning
from moeplan.places import CheckpointError
from moeplan.tensor_names import EMBEDDING, OUTPUT_MATRIX, is_mlp
from moeplan.untrusted_json import show
from planner.expr import Concat, DType, Expr, Opaque, Read, Zeros, add_noise, cast, mean, rows, scale, stack
from planner.graph import TensorGraph

MUST_AGREE = ("hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
SHOULD_AGREE = ("rope_theta", "vocab_size")
MUST_AGREE_TO_AVERAGE = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SHOULD_AGREE_TO_AVERAGE = ("rope_scaling", "sliding_window", "rms_norm_eps")
"""Settings of the base's that its MLPs, or all that is averaged, were not trained under, if they differ. A family may
have more of its own."""


@dataclass(frozen=True)
class Sources:
    """The models of a merge, in the config's order; one model may stand there many times."""

    base: DenseModel
    experts: tuple[DenseModel, ...]
    shared: tuple[DenseModel, ...]

    def named(self) -> Iterator[tuple[tuple[str | int, ...], DenseModel]]:
        """Each model with the place in the config that names it."""
        yield ("base_model",), self.base
        for key, models in (("experts", self.experts), ("shared_experts", self.shared)):
            for index, model in enumerate(models):
                yield (key, index, "source_model"), model


def check_fit(config: MergeConfig, family: Family, sources: Sources) -> None:
    """Refuse sources that cannot be put together, naming both sides; warn of differences that only deserve a word.

    Raises CheckpointError.
    """
    base = sources.base
    _refuse_what_is_lost(family, base, base.unknown_tensors())
    base.check_tensors()  # gates may need any of them
    checked = {id(base)}
    for place, expert in sources.named():
        if id(expert) in checked:
            continue
        checked.add(id(expert))
        where = config.where(*place)
        if expert.name != base.name:
            raise CheckpointError(
                f"{where}: {expert.checkpoint.label} is a {expert.name} model and the base {base.checkpoint.label} a "
                f"{base.name} model; all must be of one family"
            )
        is_averaged = config.backbone == "average" and place[0] == "experts"
        of_mlps, of_backbone = (*MUST_AGREE, *base.family.of_mlps), (*SHOULD_AGREE_TO_AVERAGE, *base.family.of_backbone)
        must_agree = (*of_mlps, *(MUST_AGREE_TO_AVERAGE if is_averaged else ()))
        should_agree = (*SHOULD_AGREE, *(of_backbone if is_averaged else ()))
        for key in dict.fromkeys((*must_agree, *should_agree)):
            its, bases = _setting(expert, key), _setting(base, key)
            if its == bases:
                continue
            difference = (
                f"{where}: {key} is {show(its)} in {expert.checkpoint.label} and {show(bases)} in the base "
                f"{base.checkpoint.label}"
            )
            if key in must_agree:
                why = "" if key in of_mlps else ", since all that is not an MLP is averaged (backbone: average)"
                raise CheckpointError(f"{difference}; they must be equal{why}")
            warnings.warn(f"{difference}; the merged model has the base's", MoeplanWarning, stacklevel=2)
        _refuse_what_is_lost(family, expert, [n for n in expert.unknown_tensors() if is_averaged or is_mlp(n)])
        if is_averaged:
            _check_backbone(family, base, expert, where)


def _check_backbone(family: Family, base: DenseModel, expert: DenseModel, where: str) -> None:
    """Refuse what cannot be a part of the mean over the experts' backbones."""
    label = expert.checkpoint.label
    if expert.adapter is not None and expert.adapter.left_out:
        name, *others = expert.adapter.left_out
        more = f" (and {len(others)} more)" if others else ""
        raise CheckpointError(
            f"{where}: {expert.adapter.label} has {show(name)}{more}, and adapters are applied to MLPs alone, so the "
            f"mean of all else (backbone: average) would be without it; {MERGE_ADAPTER}"
        )
    try:
        expert.check_tensors()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if base.settings["tie_word_embeddings"] and not expert.settings["tie_word_embeddings"] and family.tied:
        raise CheckpointError(
            f"{where}: {label} has a tensor {OUTPUT_MATRIX} of its own, and the base {base.checkpoint.label} ties "
            "it to the embeddings (tie_word_embeddings), so the merged model cannot hold the mean (backbone: "
            "average); untie it in the base"
        )


def _setting(model: DenseModel, key: str) -> Any:
    """A setting, complete with its default; None of what the family does not have.

    RoPE's base may stand among the other parameters of RoPE.
    """
    config = model.checkpoint.config
    given = config.get("rope_scaling") or config.get("rope_parameters")
    if key == "rope_theta" and isinstance(given, dict) and key in given:
        return given[key]
    if key == "rope_scaling":
        return rope(model)[1]
    if key == "sliding_window":
        windows = model.windows()
        return windows[0] if len({*windows}) == 1 else windows
    return model.settings.get(key)


def _refuse_what_is_lost(family: Family, model: DenseModel, names: Sequence[str]) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(
            f"{model.checkpoint.label}: a {family.name} model cannot hold {show(names[0])}{more}, and without it the "
            "merged model would compute something else"
        )


def averaged(config: MergeConfig, sources: Sources, dtype: DType) -> dict[str, Expr]:
    """What the merged model has in the place of the base's tensors that are no MLPs, by their names, in `dtype`.

    That is the mean over the experts where the config wants it, else nothing.
    """
    if config.backbone == "base":
        return {}
    return {
        name: cast(mean([_of_backbone(expert, name, spec) for expert in sources.experts]), dtype)
        for name, spec, _ in sources.base.specs()
        if not is_mlp(name)
    }


def _of_backbone(model: DenseModel, name: str, spec: TensorSpec) -> Read:
    """A tensor that is no MLP's, as the model has it."""
    read = model.tensor(name, spec) or (model.output_matrix if name == OUTPUT_MATRIX else None)
    assert read is not None  # or `check_fit` would have refused the model
    return read


@dataclass(frozen=True)
class Lowering:
    """A merge to be put into expressions, every output tensor in `dtype`.

    `routers` has a kernel for each layer: a row for each expert, then one for the shared expert where it has a gate,
    `[num_rows, hidden_size]`. `averaged` is what the function of that name gives.
    """

    config: MergeConfig
    family: Family
    sources: Sources
    routers: Sequence[Opaque]
    dtype: DType
    layout: str
    seed: int
    averaged: Mapping[str, Expr] = field(default_factory=dict)

    def graph(self) -> TensorGraph:
        """The output tensors, layer after layer.

        Raises CheckpointError for a tensor that is missing or of another shape than its model's config says.
        """
        graph = TensorGraph()
        base = self.sources.base
        current: int | None = None
        for name, spec, layer in base.specs():
            if layer is not None and layer != current:
                current = layer
                self._add_moe(graph, layer)
                self._add_zeros(graph, layer)
            if is_mlp(name):
                continue
            expr = self.averaged.get(name) or base.tensor(name, spec)
            if name == OUTPUT_MATRIX:
                expr = self._output_matrix(expr)
            if expr is not None:
                graph.add(name, cast(expr, self.dtype))
        return graph

    def _output_matrix(self, stored: Expr | None) -> Expr | None:
        """The output matrix; None where the output leaves it to the embeddings, which it is tied to.

        `.bin` files name the embeddings a second time for it; safetensors leave it out.
        """
        is_tied = self.sources.base.settings["tie_word_embeddings"]
        embeddings = self.averaged.get(EMBEDDING) or self.sources.base.checkpoint.tensors[EMBEDDING]
        if stored is not None and not (is_tied and stored is embeddings):
            return stored
        return None if self.family.tied else embeddings

    def _add_zeros(self, graph: TensorGraph, layer: int) -> None:
        base = self.sources.base
        for spec in self.family.zeros:
            if spec not in base.family.tensors:
                shape = tuple(base.sizes[size] for size in spec.shape)
                graph.add(spec.name.format(layer=layer), Zeros(self.dtype, shape))

    def _add_moe(self, graph: TensorGraph, layer: int) -> None:
        layout, shared = self.family.layouts[self.layout], self.family.shared
        count = len(self.config.experts)
        graph.add(layout.router.format(layer=layer), cast(rows(self.routers[layer], 0, count), self.dtype))
        for tensor in layout.experts:
            experts = [self._mlp(tensor, "experts", number, layer) for number in range(count)]
            if "{expert}" in tensor.name:
                for number, expr in enumerate(experts):
                    graph.add(tensor.name.format(layer=layer, expert=number), expr)
            else:
                graph.add(tensor.name.format(layer=layer), stack(experts))
        if shared is None or not self.config.shared_experts:
            return
        if shared.gate is not None:
            graph.add(shared.gate.format(layer=layer), cast(rows(self.routers[layer], count, count + 1), self.dtype))
        for tensor in shared.tensors:
            graph.add(tensor.name.format(layer=layer), self._mlp(tensor, "shared_experts", 0, layer))

    def _mlp(self, tensor: MlpTensor, role: str, number: int, layer: int) -> Expr:
        """One expert's matrices, in its layer, as `tensor` puts them together."""
        experts, models = (
            (self.config.experts, self.sources.experts)
            if role == "experts"
            else (self.config.shared_experts, self.sources.shared)
        )
        parts = []
        for part in tensor.parts:
            expr = _adjusted(
                models[number].mlp_matrix(layer, part),
                experts[number],
                is_residual=part == "down_proj",
                seed=_seed(self.seed, f"layer {layer} {role} {number} {part}"),
            )
            parts.append(cast(expr, self.dtype))
        if len(parts) == 1:
            return parts[0]
        return Concat(tuple(parts), (sum(part.shape[0] for part in parts), *parts[0].shape[1:]))


def _adjusted(expr: Expr, expert: Expert, *, is_residual: bool, seed: int) -> Expr:
    """An expert's matrix with its noise, and, where it writes to the residual stream, its scale."""
    noisy = add_noise(expr, expert.noise_scale, seed)
    return scale(noisy, expert.residual_scale) if is_residual else noisy


def _seed(seed: int, what: str) -> int:
    """A seed of its own for each matrix, so that copies of one model get different noise."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:8], "little")
