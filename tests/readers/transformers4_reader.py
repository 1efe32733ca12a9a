"""Reads models with the newest transformers 4, strictly.

Runs in the environment that `make test-transformers4` installs.
"""

from pathlib import Path

import numpy as np
import torch
from serve import serve
from transformers import AutoModelForCausalLM


def compute_logits(model: Path, tokens: list[int]) -> np.ndarray:
    """The logits `[num_tokens, vocab_size]` in float32. Raises RuntimeError where a key is missing or unexpected."""
    moe, loading = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
    if any(loading.values()):
        raise RuntimeError(f"not loaded strictly: {loading}")
    with torch.inference_mode():
        return moe(torch.tensor([tokens])).logits[0].numpy()


if __name__ == "__main__":
    serve(compute_logits)
