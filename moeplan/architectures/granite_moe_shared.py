"""Granite MoE with a shared expert, from Granite models: experts stacked in two tensors, the shared expert always on.

Granite scales its embeddings, attention, residual stream and logits by settings of its own, which both families have.
"""

from moeplan.architectures.dense import COMMON_DEFAULTS, DenseFamily
from moeplan.architectures.family import ACTIVATION, CARRIED, HEAD_DIM, Family, Layout, MlpTensor, SharedExpert
from moeplan.architectures.setting_values import DIVISOR, MULTIPLIER
from moeplan.tensor_names import LAYER

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

GRANITE = DenseFamily(
    "granite",
    {**COMMON_DEFAULTS, **dict.fromkeys(MULTIPLIERS, 1.0)},
    kinds={**dict.fromkeys(MULTIPLIERS, MULTIPLIER), "logits_scaling": DIVISOR},
    of_mlps=("residual_multiplier",),
    of_backbone=("attention_multiplier", "embedding_multiplier", "logits_scaling"),
)

GRANITE_MOE_SHARED = Family(
    names=("Granite MoE",),
    sources=(GRANITE,),
    model_type="granitemoeshared",
    model_class="GraniteMoeSharedForCausalLM",
    layouts={
        "packed": Layout(
            LAYER + "block_sparse_moe.router.layer.weight",
            (
                MlpTensor(LAYER + "block_sparse_moe.input_linear.weight", ("gate_proj", "up_proj")),
                MlpTensor(LAYER + "block_sparse_moe.output_linear.weight", ("down_proj",)),
            ),
        ),
    },
    num_experts_key="num_local_experts",
    shared=SharedExpert(
        (
            MlpTensor(LAYER + "shared_mlp.input_linear.weight", ("gate_proj", "up_proj")),
            MlpTensor(LAYER + "shared_mlp.output_linear.weight", ("down_proj",)),
        ),
        derived={"shared_intermediate_size": "intermediate_size"},
        absent={"shared_intermediate_size": 0},
    ),
    carried=(*CARRIED, *MULTIPLIERS),
    constants={"attention_bias": False, "output_router_logits": False, "router_aux_loss_coef": 0.001},
    caveats=(ACTIVATION, HEAD_DIM),
    ignores_tokenizer_class=True,
)
