"""Weights that nothing computes arrive bit for bit; what is cast, scaled or noised is rounded once, from float32."""

import pytest
import torch
from families import CASES, NUM_LAYERS, OUTPUTS, Case, expected_tensors, plain_recipe, router_names
from models import read_tensors
from safetensors.torch import save_file
from torch import Tensor

MIXTRAL = Case("mixtral", "llama", "separate", 0)
QWEN2_OF_LLAMA = Case("qwen2-moe", "llama", "separate", 1)
SHARED_CASES = [case for case in CASES if case.shared]

DISTINCT = [
    *((case, plain_recipe(case)) for case in CASES),
    *((MIXTRAL, f"llama-{name}") for name in ("sharded", "off-page", "f16", "tied", "old")),
    (Case("mixtral", "mistral", "separate", 0), "mistral-bf16"),
    (Case("mixtral", "llama", "packed", 0), "llama-off-page"),
    (Case("deepseek", "llama", "separate", 1), "llama-tied"),
    # Biases of zeros as high as the projections, and an output matrix of its own.
    *((QWEN2_OF_LLAMA, f"llama-{name}") for name in ("wide-heads", "off-page", "tied", "bf16")),
    (Case("qwen2-moe", "qwen2", "packed", 1), "qwen2-tied"),
    (Case("qwen3-moe", "qwen3", "packed", 0), "qwen3-tied"),
    (Case("granite", "granite", "packed", 1), "granite-off-page"),
]


def merged_tensors(out, case: Case = MIXTRAL) -> dict[str, Tensor]:
    """All of the merged model but its routers, and its shared experts' gates."""
    return {name: tensor for name, tensor in read_tensors(out).items() if name not in router_names(case)}


def expert_tensors(source, expert: int) -> dict[str, Tensor]:
    """The MLPs of `source`, under the names they have in a Mixtral as its `expert`."""
    tensors = expected_tensors(MIXTRAL, source, [source] * (expert + 1))
    return {name: tensor for name, tensor in tensors.items() if f".experts.{expert}." in name}


def assert_same_bits(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].shape == tensor.shape, name
        assert torch.equal(tensors[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(("case", "recipe"), DISTINCT, ids=lambda value: str(value))
def test_every_tensor_of_distinct_experts_is_its_source_s_bit_for_bit(case, recipe, checkpoint, merge):
    base, shared, *experts = (checkpoint(recipe, seed) for seed in range(6))
    out = merge(base, experts, **case.settings(shared))
    assert_same_bits(merged_tensors(out, case), expected_tensors(case, base, experts, shared))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routers_have_a_row_for_each_expert_and_gates_have_one(case, checkpoint, merge):
    source = checkpoint(plain_recipe(case))
    tensors = read_tensors(merge(source, [source] * 8, **case.settings(source)))
    gate = OUTPUTS[case.output].shared.router if case.shared else ""
    for layer in range(NUM_LAYERS):
        assert tensors[f"model.layers.{layer}.{case.names.router}"].shape == (8, 64)
        assert not gate or tensors[f"model.layers.{layer}.{gate}"].shape == (1, 64)


def test_experts_may_be_stored_in_other_ways_than_the_base(checkpoint, merge):
    base = checkpoint("llama-plain")
    experts = [checkpoint("llama-sharded", 1), checkpoint("llama-tied", 2)]
    assert_same_bits(merged_tensors(merge(base, experts)), expected_tensors(MIXTRAL, base, experts))


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
def test_a_cast_rounds_as_torch_does(source, target, checkpoint, merge, tmp_path):
    recipe = {"f32": "llama-plain"}.get(source, f"llama-{source}")
    base = with_awkward_numbers(checkpoint(recipe), tmp_path / "awkward", getattr(torch, target))
    out = merge(base, [base] * 2, dtype=target)
    expected = expected_tensors(MIXTRAL, base, [base] * 2)
    tensors = merged_tensors(out)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        cast = tensor.to(getattr(torch, target))
        torch.testing.assert_close(tensors[name], cast, rtol=0, atol=0, equal_nan=True, msg=name)
        assert torch.equal(tensors[name].signbit(), cast.signbit()) or cast.isnan().any()


def with_awkward_numbers(source, path, target):
    """A copy of `source` with numbers that a cast to `target` must round to even, to a subnormal or to zero; and to
    infinity, but in float16, where that is refused."""
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = read_tensors(path)
    ties = [sign * (1 + odd * 2.0**-bit) for bit in (8, 9, 11, 12) for odd in (1, 3) for sign in (1, -1)]
    extremes = [65519.0, 65520.0, -7e4, 3.4e38, 1e-8, 3e-8, -1e-7, 1e-40, -1e-42, 0.0, -0.0]
    numbers = torch.tensor([*ties, *extremes, float("inf"), float("-inf"), float("nan")])
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    numbers = numbers.to(weight.dtype)
    if target == torch.float16:
        numbers = numbers[numbers.to(target).isfinite() | ~numbers.isfinite()]
    weight[0, : len(numbers)] = numbers
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
    for name, tensor in expected_tensors(MIXTRAL, base, [base, expert]).items():
        if ".experts.1.w2." in name:
            tensor = tensor.float() * factor
        assert torch.equal(tensors[name], tensor.to(getattr(torch, dtype))), name


@pytest.mark.parametrize("case", SHARED_CASES, ids=str)
def test_residual_scale_of_a_shared_expert_multiplies_its_down_projections_alone(case, checkpoint, merge):
    base, shared = checkpoint(plain_recipe(case)), checkpoint(plain_recipe(case), 1)
    out = merge(base, [base] * 2, **case.settings(shared, residual_scale=-0.5))
    expected = expected_tensors(case, base, [base] * 2, shared)
    down = {name for name, made_of in OUTPUTS[case.output].shared.tensors.items() if made_of == ("down_proj",)}
    scaled = {n: t * -0.5 for n, t in expected.items() if any(n.endswith(name) for name in down)}
    assert len(scaled) == NUM_LAYERS
    assert_same_bits(merged_tensors(out, case), expected | scaled)


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
    assert_same_bits(others, expected_tensors(MIXTRAL, base, experts=[]))


@pytest.mark.parametrize("case", SHARED_CASES, ids=str)
def test_noise_of_a_shared_expert_is_normal_and_unlike_the_experts(case, checkpoint, merge):
    base = checkpoint(plain_recipe(case))
    noisy = {"source_model": base, "noise_scale": 0.05}
    out = merge(base, [noisy, noisy], **case.settings(base, noise_scale=0.05))

    tensors = merged_tensors(out, case)
    expected = expected_tensors(case, base, [base] * 2, base)
    changed = [(tensors[n] - tensor) / 0.05 for n, tensor in expected.items() if not torch.equal(tensors[n], tensor)]
    added = torch.cat([tensor.reshape(-1, 96 * 64) for tensor in changed])
    assert len(added) == 3 * 3 * NUM_LAYERS  # three matrices of three MLPs a layer
    assert added.mean(dim=1).abs().max() < 0.06
    assert (added.std(dim=1) - 1).abs().max() < 0.05
    assert (torch.corrcoef(added) - torch.eye(len(added))).abs().max() < 0.08


def test_noise_is_the_same_for_the_same_seed_and_another_for_another(checkpoint, merge):
    base = checkpoint("llama-bf16")
    experts = [{"source_model": base, "noise_scale": 0.1}, base]
    first, again, other = (merged_tensors(merge(base, experts, random_seed=seed)) for seed in (1, 1, 2))
    assert_same_bits(first, again)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == set(expert_tensors(base, 0))
