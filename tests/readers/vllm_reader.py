"""Reads models with vLLM, on the CPU.

Runs in the environment that `make test-vllm` installs.
"""

import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import numpy as np
from serve import serve
from transformers import AutoConfig, PretrainedConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


class DeepseekConfig(PretrainedConfig):
    """Stands for the class that `auto_map` names on the Hub, which keeps what config.json says as it is, too."""

    model_type = "deepseek"


AutoConfig.register("deepseek", DeepseekConfig)

EVERY_TOKEN = SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)


def compute_logits(model: Path, tokens: list[int]) -> np.ndarray:
    """vLLM's logits `[num_tokens, vocab_size]`, computed in float32."""
    llm = None
    try:
        llm = LLM(
            str(model),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_num_seqs=1,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
        )
        (result,) = llm.generate([{"prompt_token_ids": tokens}], EVERY_TOKEN, use_tqdm=False)
    finally:
        del llm
        cleanup_dist_env_and_memory()
    rows = [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]  # the first token is predicted by nothing
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows], np.float32)


if __name__ == "__main__":
    serve(compute_logits)
