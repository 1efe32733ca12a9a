"""A merge of legacy `.bin` files holds what a merge of the same models in safetensors holds, bit for bit."""

from pathlib import Path

import pytest
import torch
from models import as_bin, read_tensors


def assert_same(out: Path, expected: Path) -> None:
    """All files are the same, but for how weights are laid out: that follows from where they lie in their sources."""
    tensors, others = read_tensors(out), read_tensors(expected)
    assert tensors.keys() == others.keys()
    for name, tensor in others.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for file in expected.iterdir():
        if file.suffix in (".json", ".model", ".jinja") and not {"index", "moeplan"} & set(file.name.split(".")):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("num_shards", [1, 3], ids=["single", "sharded"])
@pytest.mark.parametrize(
    "recipe", ["llama-plain", "llama-f16", "llama-bf16", "llama-tied", "mistral-old", "qwen3-tied"]
)
def test_bin_files_give_the_bytes_that_safetensors_give(recipe, num_shards, checkpoint, merge, tmp_path):
    sources = [checkpoint(recipe, seed) for seed in range(2)]
    bins = [as_bin(source, tmp_path / f"bin-{n}", num_shards) for n, source in enumerate(sources)]
    prompts = [{"positive_prompts": ["one prompt"]}, {"positive_prompts": ["another"]}]
    merged = [
        merge(base, [{"source_model": base, **prompts[0]}, {"source_model": other, **prompts[1]}], gate_mode="hidden")
        for base, other in (sources, bins)
    ]
    assert_same(merged[1], merged[0])


def test_what_is_cast_scaled_noised_and_packed_is_the_same_too(checkpoint, merge, tmp_path):
    source = checkpoint("qwen2-tied")
    settings = {"architecture": "qwen2", "expert_layout": "packed", "dtype": "float16", "gate_mode": "random"}
    experts = {"noise_scale": 0.1, "residual_scale": 0.5}
    merged = []
    for model in (source, as_bin(source, tmp_path / "bin")):
        shared = [{"source_model": model}]
        merged.append(merge(model, [{"source_model": model, **experts}] * 2, shared_experts=shared, **settings))
    assert_same(merged[1], merged[0])
