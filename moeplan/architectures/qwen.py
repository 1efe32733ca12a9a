"""Qwen2 and Qwen3, dense: biases on query, key and value projections in one, norms on queries and keys in the other."""

from moeplan.architectures.dense import COMMON_DEFAULTS, DenseFamily, TensorSpec, attention_with
from moeplan.tensor_names import LAYER

QKV_BIASES = (
    TensorSpec(LAYER + "self_attn.q_proj.bias", ("q_size",)),
    TensorSpec(LAYER + "self_attn.k_proj.bias", ("kv_size",)),
    TensorSpec(LAYER + "self_attn.v_proj.bias", ("kv_size",)),
)

QK_NORMS = (
    TensorSpec(LAYER + "self_attn.q_norm.weight", ("head_dim",)),
    TensorSpec(LAYER + "self_attn.k_norm.weight", ("head_dim",)),
)

DEFAULTS = {
    **COMMON_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN2 = DenseFamily("qwen2", DEFAULTS, attention_with(*QKV_BIASES))
QWEN3 = DenseFamily("qwen3", {**DEFAULTS, "head_dim": 128}, attention_with(*QK_NORMS))
