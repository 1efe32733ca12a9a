"""Mixtral, from Llama and Mistral models: top-k routing with the weights renormalised, no shared expert.

Names are the classic ones, which transformers 4 and 5, vLLM, SGLang and llama.cpp's converter all read.
"""

from moeplan.architectures.family import Family

MIXTRAL = Family(
    name="Mixtral",
    sources=("llama", "mistral"),
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    router="model.layers.{layer}.block_sparse_moe.gate.weight",
    experts={
        "gate_proj": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        "down_proj": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        "up_proj": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    },
    num_experts_key="num_local_experts",
    carried=(
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
        "tie_word_embeddings",
        "attention_dropout",
        "sliding_window",
    ),
    constants={"output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
)
