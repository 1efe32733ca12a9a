"""Mixtral, from Llama and Mistral models: top-k routing with the weights renormalised, no shared expert.

Names are the classic ones, which transformers 4 and 5, vLLM, SGLang and llama.cpp's converter all read.
"""

from moeplan.architectures.family import PACKED, Family, Layout, separate
from moeplan.architectures.llama import LLAMA, MISTRAL
from moeplan.tensor_names import LAYER, MLP

MOE = LAYER + "block_sparse_moe."

MIXTRAL = Family(
    names=("Mixtral",),
    sources=(LLAMA, MISTRAL),
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    layouts={
        "separate": Layout(
            MOE + "gate.weight",
            separate(MOE + "experts.{expert}.{matrix}.weight", {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}),
        ),
        "packed": Layout(MLP + "gate.weight", PACKED),
    },
    num_experts_key="num_local_experts",
    constants={"output_router_logits": False, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0},
    windowed={},
    ignores_tokenizer_class=True,
)
