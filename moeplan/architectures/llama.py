"""Llama and Mistral, the dense families that most MoE families can be made of."""

from moeplan.architectures.dense import COMMON_DEFAULTS, DenseFamily

LLAMA = DenseFamily("llama", COMMON_DEFAULTS)

MISTRAL = DenseFamily(
    "mistral",
    {
        **COMMON_DEFAULTS,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "layer_types": None,
    },
)
