"""Qwen3 MoE, from Qwen3 models: norms on queries and keys, no shared expert."""

from moeplan.architectures.family import PACKED, SAME_NAMES, Family, Layout, separate
from moeplan.architectures.qwen import QWEN3
from moeplan.tensor_names import MLP

QWEN3_MOE = Family(
    names=("Qwen3 MoE",),
    sources=(QWEN3,),
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    layouts={
        "separate": Layout(MLP + "gate.weight", separate(MLP + "experts.{expert}.{matrix}.weight", SAME_NAMES)),
        "packed": Layout(MLP + "gate.weight", PACKED),
    },
    num_experts_key="num_experts",
    derived={"moe_intermediate_size": "intermediate_size"},
    constants={
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "use_sliding_window": False,
    },
    windowed={"use_sliding_window": True},
)
