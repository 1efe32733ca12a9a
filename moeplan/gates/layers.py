"""What it takes to evaluate a model a layer at a time: its weights by their names, its skeleton, what blocks of weights
and activations take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from executor.regions import block_nbytes
from moeplan.architectures.attention import rope_parameters
from moeplan.architectures.dense import DenseModel
from moeplan.errors import MoeplanWarning
from moeplan.tensor_names import LAYER
from planner.expr import Expr, reads_of

if TYPE_CHECKING:
    from moeplan.gates.skeleton import Skeleton

BLOCK_NBYTES = 2 << 20
"""Linear layers multiply by about so many bytes of their weight at a time, in float32: what a core's cache holds."""

RUNS_CODE = "--trust-remote-code runs it"


def block_rows(num_columns: int) -> int:
    """How many rows of a matrix are multiplied at a time. Fewer than 64 would waste the arithmetic units."""
    return max(1, BLOCK_NBYTES // (64 * 4 * num_columns)) * 64


def matrix_block_nbytes(matrix: Expr, num_tokens: int) -> int:
    """What it takes to multiply so many tokens by a block of `matrix`: the block and the product."""
    rows = min(block_rows(matrix.shape[1]), matrix.shape[0])
    return rows_nbytes(rows, matrix) + 4 * rows * num_tokens


def rows_nbytes(num_rows: int, matrix: Expr) -> int:
    """What it takes to read so many rows of `matrix`."""
    widest = max((read.dtype for read in reads_of(matrix)), key=lambda dtype: dtype.itemsize)
    return block_nbytes(num_rows, matrix.shape[1], widest)


def token_nbytes(base: DenseModel) -> int:
    """The most memory that a token's activations take in a layer, in float32: in its attention or in its MLP."""
    sizes = base.sizes
    attention = 4 * sizes["q_size"] + 4 * sizes["kv_size"]
    return 4 * (6 * sizes["hidden_size"] + max(attention, 4 * sizes["intermediate_size"]))


def layer_weights(
    model: DenseModel, layer: int, weight: Callable[[str], Expr]
) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """The matrices and the other tensors of a layer, by their names in it; `weight` gives each, by its whole name."""
    prefix = LAYER.format(layer=layer)
    weights = {
        name.removeprefix(prefix): weight(name)
        for name in model.checkpoint.tensors
        if name.startswith(prefix) and "rotary_emb" not in name
    }
    matrices = {name: tensor for name, tensor in weights.items() if len(tensor.shape) == 2}
    return matrices, {name: tensor for name, tensor in weights.items() if name not in matrices}


def model_params(model: DenseModel, trust_remote_code: bool, otherwise: str = RUNS_CODE) -> dict[str, Any]:
    """What the kernels know a model by: its settings, complete, or, of one that is made by its own code, the directory.

    Code that it brings with it is run where that is trusted, and warned about `otherwise`: transformers has a model of
    the same type, which need not be the same model.
    """
    checkpoint = model.checkpoint
    own = own_model_class(checkpoint.config) is not None
    if own and not trust_remote_code:
        warnings.warn(
            f"{checkpoint.config_file}: auto_map names code of the model's own, which is not run: prompts are "
            f"evaluated with transformers' {checkpoint.model_type}; {otherwise}",
            MoeplanWarning,
            stacklevel=2,
        )
    path = str(checkpoint.path.resolve())
    if own and trust_remote_code:
        return {"model": {"path": path, "config": checkpoint.config_sha256, "own_code": True}}
    settings = {key: value for key, value in model.settings.items() if key != "rope_theta"} | rope_parameters(model)
    return {"model": {"path": path, "model_type": model.model_type, "settings": settings}}


def own_model_class(config: Mapping[str, Any]) -> str | None:
    """The key of `auto_map` under which a config.json names modelling code of the model's own."""
    named = config.get("auto_map")
    keys = ("AutoModel", "AutoModelForCausalLM")
    return next((key for key in keys if key in named), None) if isinstance(named, dict) else None


def skeleton_of(params: Mapping[str, Any]) -> Skeleton:
    """The skeleton of the model that `model_params` names, on the CPU if these name no device."""
    from moeplan.gates.skeleton import skeleton

    return skeleton(params["model"], params.get("device", "cpu"))
