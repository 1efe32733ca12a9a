"""Weights that nothing computes arrive bit for bit; what is cast, scaled or noised is rounded once, from float32."""

import pytest
import torch
from models import read_tensors
from safetensors.torch import save_file
from torch import Tensor

NEW_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
NUM_LAYERS = 3


def is_router(name: str) -> bool:
    return name.endswith("block_sparse_moe.gate.weight")


def merged_tensors(out) -> dict[str, Tensor]:
    """All of the merged model but its router."""
    return {name: tensor for name, tensor in read_tensors(out).items() if not is_router(name)}


def expert_tensors(source, expert: int) -> dict[str, Tensor]:
    """The MLPs of `source`, under the names they have in a Mixtral as its `expert`."""
    tensors = read_tensors(source)
    return {
        f"model.layers.{n}.block_sparse_moe.experts.{expert}.{new}.weight": tensors[
            f"model.layers.{n}.mlp.{old}.weight"
        ]
        for n in range(NUM_LAYERS)
        for old, new in NEW_NAMES.items()
    }


def expected_tensors(base, experts) -> dict[str, Tensor]:
    """All tensors, but the router, of the Mixtral that has `base`'s attention and the experts' MLPs.

    The rotary frequencies that checkpoints of Llama 1's time hold are no weights, and belong in no model of today.
    """
    not_shared = (".mlp.", ".rotary_emb.inv_freq")
    shared = {name: tensor for name, tensor in read_tensors(base).items() if not any(n in name for n in not_shared)}
    return shared | {
        name: tensor for n, source in enumerate(experts) for name, tensor in expert_tensors(source, n).items()
    }


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    "recipe",
    ["llama-plain", "llama-sharded", "llama-off-page", "llama-f16", "mistral-bf16", "llama-tied", "llama-old"],
)
def test_every_tensor_of_distinct_experts_is_its_source_s_bit_for_bit(recipe, checkpoint, merge):
    base, *experts = (checkpoint(recipe, seed) for seed in range(5))
    out = merge(base, experts)
    assert_same_bits(merged_tensors(out), expected_tensors(base, experts))


def test_experts_may_be_stored_in_other_ways_than_the_base(checkpoint, merge):
    base = checkpoint("llama-plain")
    experts = [checkpoint("llama-sharded", 1), checkpoint("llama-tied", 2)]
    assert_same_bits(merged_tensors(merge(base, experts)), expected_tensors(base, experts))


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_a_cast_rounds_as_torch_does(source, target, checkpoint, merge, tmp_path):
    recipe = {"f32": "llama-plain"}.get(source, f"llama-{source}")
    base = with_awkward_numbers(checkpoint(recipe), tmp_path / "awkward")
    out = merge(base, [base] * 2, dtype=target)
    expected = expected_tensors(base, [base] * 2)
    tensors = merged_tensors(out)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        cast = tensor.to(getattr(torch, target))
        torch.testing.assert_close(tensors[name], cast, rtol=0, atol=0, equal_nan=True, msg=name)
        assert torch.equal(tensors[name].signbit(), cast.signbit()) or cast.isnan().any()


def with_awkward_numbers(source, path):
    """A copy of `source` with numbers that a cast must round to even, to infinity, to a subnormal or to zero."""
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = read_tensors(path)
    ties = [sign * (1 + odd * 2.0**-bit) for bit in (8, 9, 11, 12) for odd in (1, 3) for sign in (1, -1)]
    extremes = [65519.0, 65520.0, -7e4, 3.4e38, 1e-8, 3e-8, -1e-7, 1e-40, -1e-42, 0.0, -0.0]
    numbers = torch.tensor([*ties, *extremes, float("inf"), float("-inf"), float("nan")])
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[0, : len(numbers)] = numbers.to(weight.dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("llama-plain", "float32"), ("llama-bf16", "bfloat16"), ("llama-plain", "float16")]
)
@pytest.mark.parametrize("factor", [0.3, 0.0, -2.5])
def test_residual_scale_multiplies_the_down_projections_in_float32(recipe, dtype, factor, checkpoint, merge):
    base, expert = checkpoint(recipe), checkpoint(recipe, 1)
    out = merge(base, [base, {"source_model": expert, "residual_scale": factor}], dtype=dtype)
    tensors = merged_tensors(out)
    for name, tensor in expected_tensors(base, [base, expert]).items():
        if ".experts.1.w2." in name:
            tensor = tensor.float() * factor
        assert torch.equal(tensors[name], tensor.to(getattr(torch, dtype))), name


def noise(out, source, expert: int, scale: float, residual_scale: float = 1.0) -> dict[str, Tensor]:
    """What was added to the matrices of `expert`, in units of `scale`."""
    tensors = merged_tensors(out)
    return {
        name: (tensors[name] / (residual_scale if ".w2." in name else 1) - tensor) / scale
        for name, tensor in expert_tensors(source, expert).items()
    }


def test_noise_is_normal_with_the_scale_asked_for_and_different_everywhere(checkpoint, merge):
    base = checkpoint("llama-plain")
    noisy = {"source_model": base, "noise_scale": 0.05}
    out = merge(base, [noisy, noisy, {**noisy, "residual_scale": 0.5}, base])

    added = (
        noise(out, base, 0, 0.05)
        | noise(out, base, 1, 0.05)
        | noise(out, base, 2, 0.05, residual_scale=0.5)  # noise first, then the scale, as mergekit has it
    )
    assert len(added) == 3 * 3 * NUM_LAYERS
    for name, tensor in added.items():
        assert abs(tensor.mean()) < 0.06, name
        assert abs(tensor.std() - 1) < 0.05, name
        assert abs((tensor.abs() < 1).float().mean() - 0.683) < 0.03, name
    flat = torch.stack([tensor.flatten() for tensor in added.values()])
    likeness = torch.corrcoef(flat) - torch.eye(len(flat))
    assert likeness.abs().max() < 0.08

    others = {name: tensor for name, tensor in merged_tensors(out).items() if ".experts." not in name}
    assert_same_bits(others, expected_tensors(base, experts=[]))


def test_noise_is_the_same_for_the_same_seed_and_another_for_another(checkpoint, merge):
    base = checkpoint("llama-bf16")
    experts = [{"source_model": base, "noise_scale": 0.1}, base]
    first, again, other = (merged_tensors(merge(base, experts, random_seed=seed)) for seed in (1, 1, 2))
    assert_same_bits(first, again)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == set(expert_tensors(base, 0))
