"""Qwen2 MoE, from Llama, Mistral and Qwen2 models: exactly one shared expert, behind a sigmoid gate of its own.

It has biases on the query, key and value projections, zero where the base has none. The output matrix is always written
out, because llama.cpp's Qwen2-MoE needs one.
"""

from moeplan.architectures.family import (
    ACTIVATION,
    HEAD_DIM,
    PACKED,
    SAME_NAMES,
    Family,
    Layout,
    SharedExpert,
    separate,
)
from moeplan.architectures.llama import LLAMA, MISTRAL
from moeplan.architectures.qwen import QKV_BIASES, QWEN2
from moeplan.tensor_names import MLP

QWEN2_MOE = Family(
    names=("Qwen2 MoE", "Qwen MoE"),
    sources=(LLAMA, MISTRAL, QWEN2),
    model_type="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    layouts={
        "separate": Layout(MLP + "gate.weight", separate(MLP + "experts.{expert}.{matrix}.weight", SAME_NAMES)),
        "packed": Layout(MLP + "gate.weight", PACKED),
    },
    num_experts_key="num_experts",
    shared=SharedExpert(
        separate(MLP + "shared_expert.{matrix}.weight", SAME_NAMES),
        gate=MLP + "shared_expert_gate.weight",
        required=True,
        derived={"shared_expert_intermediate_size": "intermediate_size"},
    ),
    derived={"moe_intermediate_size": "intermediate_size"},
    constants={
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "qkv_bias": True,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
    },
    windowed={"use_sliding_window": True, "max_window_layers": 0},
    zeros=QKV_BIASES,
    tied=False,
    reads_tokenizers_of=(QWEN2,),
    caveats=(ACTIVATION, HEAD_DIM),
)
