"""The shapes of the models that are merged: the field's usual sizes, and small ones for a quick run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a dense Llama model."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int = 32000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors, in the order of a file."""
        hidden = self.hidden_size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            for name, shape in self.layer_matrices().items():
                yield f"{prefix}{name}.weight", shape
            yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab_size, hidden)

    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of one decoder layer, `[out, in]` each."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        kv = hidden // self.num_heads * self.num_kv_heads
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def num_mlp_parameters(self) -> int:
        """Parameters of all MLPs, which are what each expert brings."""
        return 3 * self.num_layers * self.hidden_size * self.intermediate_size

    def config(self, dtype: str) -> dict[str, Any]:
        """What `config.json` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": dtype,
        }

    def with_layers(self, num_layers: int) -> Shape:
        """The same model with fewer or more layers."""
        return replace(self, name=f"{self.name} with {num_layers} layers", num_layers=num_layers)

    def tiny(self) -> Shape:
        """A model with as many layers, up to 8, that takes less than a megabyte."""
        return Shape(f"tiny {self.name}", 64, 128, min(self.num_layers, 8), 4, 2, vocab_size=1024)


LLAMA_1B = Shape("1.1B", 2048, 5632, 22, 32, 4)
LLAMA_7B = Shape("7B", 4096, 14336, 32, 32, 8)
LLAMA_70B = Shape("70B", 8192, 28672, 80, 64, 8)
