"""Experts that are a model with a LoRA adapter on it: what peft makes of the two, rounded once."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from commands import moeplan, snapshot, write_config
from families import Case, expected_tensors, mlp, router_names
from models import read_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moeplan.errors import MoeplanWarning
from moeplan.memory import memory_cap

MIXTRAL = Case("mixtral", "llama", "separate", 0)
PACKED = Case("mixtral", "llama", "packed", 0)
QWEN2 = Case("qwen2-moe", "qwen2", "separate", 1)
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """`adapter(base, seed, **config)`: the directory of an adapter as peft saves it, every weight of it drawn."""

    def make(base: Path, seed: int = 0, **config: Any) -> Path:
        path = tmp_path / f"adapter-{seed}"
        model = AutoModelForCausalLM.from_pretrained(base)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": MLP, "task_type": "CAUSAL_LM", **config}
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        model.save_pretrained(path)
        return path

    return make


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The model that peft makes of both, all of it computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that fan_in_fan_out is ignored
        model = peft.PeftModel.from_pretrained(model, adapter)
    return dict(model.merge_and_unload().state_dict())


def experts_of(out: Path, case: Case, count: int, layer: int) -> list[dict[str, Tensor]]:
    """Each expert's matrices in a layer of a merged model."""
    tensors = read_tensors(out)
    prefix = f"model.layers.{layer}."
    experts = []
    for number in range(count):
        matrices: dict[str, Tensor] = {}
        for name, parts in case.names.tensors.items():
            one = tensors[prefix + name.format(number)] if "{}" in name else tensors[prefix + name][number]
            matrices |= dict(zip(parts, one.chunk(len(parts)), strict=True))
        experts.append(matrices)
    return experts


def assert_is(tensor: Tensor, expected: Tensor, name: str) -> None:
    """`tensor` is `expected`, float32, rounded to its dtype, but for what order float32 sums are taken in."""
    if tensor.dtype is torch.float32:
        torch.testing.assert_close(tensor, expected, rtol=2e-6, atol=2e-6, msg=name)
        return
    rounded = expected.to(tensor.dtype)
    # A sum next to the middle between two numbers may be rounded to the other one.
    differing = (tensor != rounded).float().mean()
    assert differing < 2e-3, name
    torch.testing.assert_close(
        tensor.float(), expected, rtol=2**-8 if tensor.dtype is torch.bfloat16 else 2**-11, atol=1e-6
    )


KINDS: dict[str, Mapping[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "one matrix": {"target_modules": ["up_proj"]},
    "everything": {"target_modules": "all-linear"},
    "patterns": {
        "rank_pattern": {"up_proj": 2, r"layers\.\d\.mlp\.down_proj": 7, "model.layers.1.mlp.gate_proj": 1},
        "alpha_pattern": {"0.mlp.gate_proj": 3, r"^model.layers.1.mlp.(up|gate)_proj": 0.5, r".*down_proj": 20},
    },
    "patterns, rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"up_proj": 9},
        "alpha_pattern": {"proj": 100, "[a-z_]+": 11},
    },
    "modules_to_save": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["down_proj", "lm_head"]},
    "a saved MLP": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "some layers": {"layers_to_transform": [1]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "recipe"), [(MIXTRAL, "llama-plain"), (QWEN2, "qwen2-bf16")], ids=lambda v: str(v))
def test_an_adapted_expert_is_what_peft_makes_of_it(case, recipe, kind, checkpoint, adapter, merge):
    base, other, shared = (checkpoint(recipe, seed) for seed in range(3))
    lora = adapter(other, **KINDS[kind])
    out = merge(base, [f"{other}+{lora}", other], **case.settings(shared))
    expected = merged_by_peft(other, lora)
    changed = False
    for layer in range(3):
        adapted, plain = experts_of(out, case, 2, layer)
        for name, tensor in adapted.items():
            assert_is(tensor, mlp(expected, layer)[name], f"{layer} {name}")
        for name, tensor in plain.items():
            assert torch.equal(tensor, mlp(read_tensors(other), layer)[name])
            changed |= not torch.equal(tensor, adapted[name])
    assert changed


def test_everything_but_the_adapted_experts_is_as_without_adapters(checkpoint, adapter, merge):
    base = checkpoint("llama-plain")
    lora = adapter(base, target_modules="all-linear")
    tensors = read_tensors(merge(base, [base, f"{base}+{lora}"]))
    expected = expected_tensors(MIXTRAL, base, [base, base])
    for name in tensors.keys() - router_names(MIXTRAL):
        assert torch.equal(tensors[name], expected[name]) == (".experts.1." not in name), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_of_half_precision_are_added_in_float32(dtype, checkpoint, adapter, merge):
    base = checkpoint("llama-bf16")
    lora = adapter(base)
    file = lora / "adapter_model.safetensors"
    save_file({name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}, file)
    (matrices,) = experts_of(merge(base, [f"{base}+{lora}"], experts_per_token=1), MIXTRAL, 1, 2)
    expected = mlp(merged_by_peft(base, lora), 2)
    for name, tensor in matrices.items():
        assert tensor.dtype is torch.bfloat16
        assert_is(tensor, expected[name], name)


def test_an_adapter_may_be_a_bin_file(checkpoint, adapter, merge):
    base = checkpoint("llama-plain")
    lora = adapter(base, modules_to_save=["down_proj"], target_modules=["up_proj"])
    outs = [merge(base, [base, f"{base}+{lora}"])]
    file = lora / "adapter_model.safetensors"
    torch.save(load_file(file), lora / "adapter_model.bin")
    file.unlink()
    outs.append(merge(base, [base, f"{base}+{lora}"]))
    first, second = map(read_tensors, outs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fan_in_fan_out_is_ignored_for_linear_layers_as_peft_does(checkpoint, adapter, merge):
    base = checkpoint("llama-plain")
    lora = adapter(base)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    (matrices,) = experts_of(merge(base, [f"{base}+{lora}"], experts_per_token=1), MIXTRAL, 1, 0)
    expected = mlp(merged_by_peft(base, lora), 0)
    for name, tensor in matrices.items():
        assert_is(tensor, expected[name], name)


@pytest.mark.parametrize("case", [MIXTRAL, PACKED], ids=str)
def test_noise_and_scale_come_on_top_in_both_layouts(case, checkpoint, adapter, merge):
    base = checkpoint("llama-off-page")
    adapters = [adapter(base, seed) for seed in (1, 2)]
    settings = {"noise_scale": 0.05, "residual_scale": 0.5}
    names = [f"{base}+{lora}" for lora in adapters]
    plain = merge(base, names, expert_layout=case.layout)
    noisy = merge(base, [{"source_model": name, **settings} for name in names], expert_layout=case.layout)
    scaled = merge(base, [{"source_model": name, "residual_scale": 0.5} for name in names], expert_layout=case.layout)
    for number, lora in enumerate(adapters):
        expected = mlp(merged_by_peft(base, lora), 1)
        for name, tensor in experts_of(plain, case, 2, 1)[number].items():
            assert_is(tensor, expected[name], name)
            factor = 0.5 if name == "down_proj" else 1
            assert torch.equal(experts_of(scaled, case, 2, 1)[number][name], tensor * factor)
            noise = (experts_of(noisy, case, 2, 1)[number][name] - tensor * factor) / (0.05 * factor)
            assert abs(noise.std() - 1) < 0.05


def test_a_merge_with_adapters_is_the_same_under_any_memory_cap(checkpoint, adapter, merge):
    base = checkpoint("llama-bf16")
    names = [f"{base}+{adapter(base, seed)}" for seed in range(4)]
    process = memory_cap(None, ()).process_nbytes
    outs = [merge(base, names, max_memory=process + (buffers << 20)) for buffers in (3, 64, 1024)]
    first, *others = ((out / "model.safetensors").read_bytes() for out in outs)
    assert all(other == first for other in others)


def test_eight_adapters_on_one_model_read_it_once(checkpoint, adapter, plan):
    base = checkpoint("llama-plain")
    loras = [adapter(base, seed) for seed in range(8)]
    merge_plan = plan(base, [f"{base}+{lora}" for lora in loras])
    factors = sum(tensor.nbytes for lora in loras for tensor in load_file(lora / "adapter_model.safetensors").values())
    assert merge_plan.plan.read_nbytes == sum(t.nbytes for t in read_tensors(base).values()) + factors
    assert merge_plan.plan.reread_nbytes == 0


def test_an_adapter_that_changes_attention_alone_changes_nothing_and_a_warning_says_so(checkpoint, adapter, merge):
    base = checkpoint("qwen2-plain")
    lora = adapter(base, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], bias="all")
    with pytest.warns(
        MoeplanWarning, match=r"experts\[1\].source_model: .*adapter-0 changes no MLP, .* is .*qwen2-plain"
    ):
        out = merge(base, [base, f"{base}+{lora}"], **QWEN2.settings(base))
    for layer in range(3):
        one, other = experts_of(out, QWEN2, 2, layer)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_oracle_holds_for_gates_of_the_base_that_adapters_share(checkpoint, adapter, merge):
    """With hidden gates a layer of the base is read for its evaluation, its copy and every adapter's sum."""
    base = checkpoint("llama-bf16")
    names = [f"{base}+{adapter(base, seed)}" for seed in range(3)]
    prompts = [[f"prompt number {number}"] for number in range(4)]
    experts = [{"source_model": m, "positive_prompts": p} for m, p in zip([base, *names], prompts, strict=True)]
    hidden, random = (read_tensors(merge(base, experts, gate_mode=mode)) for mode in ("hidden", "random"))
    for name in hidden.keys() - router_names(MIXTRAL):
        assert torch.equal(hidden[name], random[name]), name


def test_an_adapter_is_a_source_that_is_never_overwritten(checkpoint, adapter, tmp_path):
    base = checkpoint("llama-plain")
    lora = adapter(base)
    before = snapshot(lora)
    config = write_config(tmp_path / "config.yml", base, [base, f"{base}+{lora}"])
    ran = moeplan(config, lora, "--overwrite")
    assert ran.error.startswith(f"{lora}: holds an adapter (adapter_config.json), ")
    assert snapshot(lora) == before
