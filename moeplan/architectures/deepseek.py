"""DeepSeek MoE, the first of the name, from Llama and Mistral models: none or one shared expert, which has no gate.

transformers has no class for it; `auto_map` names the modelling code in DeepSeek's own repository, which transformers 5
cannot run (docs/compatibility.md). That code says what the family can hold: heads of hidden_size / num_attention_heads,
linear and dynamic RoPE scaling, no sliding window. Of its configuration class transformers 4 knows no tokenizer. vLLM
(`deepseek_v2.py`) does not tie the output matrix to the embeddings: where it is not there, anything is in it.
"""

from moeplan.architectures.family import ACTIVATION, SAME_NAMES, Caveat, Family, Layout, SharedExpert, separate
from moeplan.architectures.llama import LLAMA, MISTRAL
from moeplan.tensor_names import MLP

CODE = "deepseek-ai/deepseek-moe-16b-base--"

ONE_EXPERT = Caveat(
    "with one expert per token, DeepSeek's code scales it by the router's softmax, and vLLM does not; not so with two",
    lambda config: config["num_experts_per_tok"] == 1,
)

DEEPSEEK = Family(
    names=("DeepSeek MoE",),
    sources=(LLAMA, MISTRAL),
    model_type="deepseek",
    model_class="DeepseekForCausalLM",
    layouts={
        "separate": Layout(MLP + "gate.weight", separate(MLP + "experts.{expert}.{matrix}.weight", SAME_NAMES)),
    },
    num_experts_key="n_routed_experts",
    shared=SharedExpert(
        separate(MLP + "shared_experts.{matrix}.weight", SAME_NAMES),
        present={"n_shared_experts": 1},
        absent={"n_shared_experts": None},
    ),
    derived={"moe_intermediate_size": "intermediate_size"},
    constants={
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": CODE + "configuration_deepseek.DeepseekConfig",
            "AutoModel": CODE + "modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": CODE + "modeling_deepseek.DeepseekForCausalLM",
        },
    },
    rope_types=("default", "linear", "dynamic"),
    free_head_dim=False,
    tied=False,
    reads_tokenizers_of=(),
    readers="transformers 4.57 with use_cache=False, or vLLM, both with trust_remote_code=True",
    caveats=(ACTIVATION, ONE_EXPERT),
)
