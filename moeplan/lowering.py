"""From a config and its checkpoints to a tensor graph: what every output tensor is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeplan.architectures.dense import DenseModel, TensorSpec
from moeplan.architectures.family import Family, MlpTensor
from moeplan.config import Expert, MergeConfig
from moeplan.fit import Sources
from moeplan.tensor_names import EMBEDDING, OUTPUT_MATRIX, is_mlp
from planner.expr import Concat, DType, Expr, Opaque, Read, Zeros, add_noise, cast, mean, rows, scale, stack
from planner.graph import TensorGraph


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
    return model.tensor(name, spec) or model.output_matrix  # no other may be missing


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
