"""Where prompts are evaluated. What needs a GPU is skipped where there is none, and says so."""

import json
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from commands import moeplan, snapshot, write_config
from models import read_tensors

from executor.errors import RunError
from moeplan import MoeplanWarning, Options
from moeplan.gates import device
from moeplan.gates.device import CPU, MIB, Device
from moeplan.gates.evaluation import _within_memory_of
from moeplan.options import OptionError

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
CPU_BUILD = pytest.mark.skipif(not version("torch").endswith("+cpu"), reason="torch is not built for the CPU alone")

PROMPTS = (["Where does it hurt?", "x"], ["Guten Tag", "I can help with that, and with much else."])


@pytest.fixture
def experts(checkpoint):
    models = [checkpoint("llama-plain", seed) for seed in (0, 1)]
    return [{"source_model": model, "positive_prompts": each} for model, each in zip(models, PROMPTS, strict=True)]


@pytest.fixture
def config(experts, tmp_path):
    return write_config(tmp_path / "config.yml", experts[0]["source_model"], experts, gate_mode="hidden")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "xpu", ""])
def test_a_device_is_the_cpu_a_gpu_by_its_number_or_whatever_is_there(name):
    with pytest.raises(OptionError, match=f"--device: '{name}' is none of cpu, cuda, cuda:N"):
        Options(device=name)


@pytest.mark.parametrize("size", ["much", "0", "120%"])
def test_a_gpu_s_memory_is_a_size_like_any_other(size):
    with pytest.raises(OptionError, match="--max-device-memory: "):
        Options(max_device_memory=size)


@CPU_BUILD
@pytest.mark.parametrize("typed", [["--device", "cuda:1"], ["--cuda"], ["--gpu-rich"]])
def test_a_gpu_is_refused_where_torch_can_use_none(config, tmp_path, typed):
    before = snapshot(tmp_path)
    result = moeplan(config, tmp_path / "out", *typed)
    assert result.status == 2
    assert result.error.startswith(f"--device {typed[1] if len(typed) > 1 else 'cuda'}: the installed torch ")
    assert "is built for the CPU alone; install one for your GPU" in result.error
    assert snapshot(tmp_path) == before


@NO_GPU
@pytest.mark.parametrize(
    "typed",
    [["--device", "auto"], ["--cuda", "--device", "cpu"], ["--gpu-rich", "--device", "cpu"], ["--no-cuda"]],
)
def test_without_a_gpu_the_cpu_does_it_unless_one_is_asked_for(config, typed):
    result = moeplan(config, "--plan", "--json", *typed)
    assert (result.status, result.stderr) == (0, "")
    assert json.loads(result.stdout)["plan"]["router"]["device"] == "cpu"


def test_a_device_is_not_looked_for_where_nothing_is_evaluated(config):
    config.write_text(config.read_text().replace('"hidden"', '"random"'))
    assert moeplan(config, "--plan", "--cuda").status == 0


def test_what_a_gpu_needs_is_refused_where_it_may_not_take_it(experts, plan, monkeypatch):
    """The least that is named is enough, and a byte less is not."""
    monkeypatch.setattr(device, "find", lambda name, most: Device(name, most))
    settings = {"gate_mode": "hidden", "device": "cuda:1"}
    with pytest.raises(OptionError, match="--device cuda:1: 1 MiB of its memory may be taken") as refused:
        plan(experts[0]["source_model"], experts, max_device_memory=MIB, **settings)
    least = int(str(refused.value).partition("--max-device-memory ")[2].partition("MiB")[0])
    assert plan(experts[0]["source_model"], experts, max_device_memory=least * MIB, **settings).device.name == "cuda:1"
    with pytest.raises(OptionError, match=f"takes {least} MiB"):
        plan(experts[0]["source_model"], experts, max_device_memory=(least - 1) * MIB, **settings)


def test_whatever_is_there_is_the_cpu_where_a_gpu_has_too_little_memory(experts, plan, monkeypatch, tmp_path):
    """What there is to warn of beside that is said once, though it is planned twice."""
    monkeypatch.setattr(device, "find", lambda name, _: Device("cuda:1", MIB))
    base = shutil.copytree(experts[0]["source_model"], tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoModel": "modeling_own.Own"}}))
    with pytest.warns(MoeplanWarning) as said:
        planned = plan(base, experts, gate_mode="hidden", device="auto")
    assert planned.device == CPU
    assert "cuda" not in "".join(step.params for step in planned.plan.kernels)
    messages = [str(warning.message) for warning in said]
    assert sum("auto_map names code" in message for message in messages) == 1
    assert "--device auto: not cuda:1: 1 MiB of its memory may be taken, and evaluating" in messages[-1]


@pytest.mark.parametrize("name", ["auto", "cuda:0"])
def test_whatever_is_there_is_the_cpu_where_a_gpu_cannot_be_used(config, monkeypatch, name):
    def full(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(device, "_lacking", lambda name: None)
    monkeypatch.setattr(torch, "ones", full)
    result = moeplan(config, "--plan", "--json", "--device", name)
    if name == "auto":
        assert result.stderr == "warning: --device auto: not cuda:0: CUDA error: out of memory; the CPU does it\n"
        assert json.loads(result.stdout)["plan"]["router"]["device"] == "cpu"
    else:
        assert result.status == 2
        assert "--device cuda:0: it cannot be used: CUDA error: out of memory; see" in result.stderr


@pytest.mark.parametrize(
    ("most", "budget_mib"), [(None, 300), ("100MiB", 100), ("50%", 300), ("25%", 250), ("2GiB", 300)]
)
def test_no_more_of_a_gpu_s_memory_is_taken_than_is_free(monkeypatch, most, budget_mib):
    monkeypatch.setattr(device, "_lacking", lambda name: None)
    for function in ("ones", "mm"):
        monkeypatch.setattr(torch, function, lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (300 * MIB, 1000 * MIB))
    assert device.find("cuda:1", most) == Device("cuda:1", budget_mib * MIB)


@pytest.mark.parametrize(("budget_mib", "fraction"), [(300, 0.4), (1000, 1.0)])
def test_torch_may_take_no_more_than_the_budget_meanwhile_and_all_afterwards(monkeypatch, budget_mib, fraction):
    fractions = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda name: 100 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: SimpleNamespace(total_memory=1000 * MIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: fractions.append(given))
    with Device("cuda:1", budget_mib * MIB).within_budget():
        assert fractions == [(fraction, "cuda:1")]
    assert fractions[1:] == [(1.0, "cuda:1")]


def test_a_gpu_s_name_is_part_of_the_plan_and_its_free_memory_is_not(experts, plan, monkeypatch):
    budgets = iter((1 << 30, 1 << 31))
    monkeypatch.setattr(device, "find", lambda name, _: CPU if name == "cpu" else Device("cuda:0", next(budgets)))
    cpu, one, other = (
        plan(experts[0]["source_model"], experts, gate_mode="hidden", device=name) for name in ("cpu", "cuda", "cuda")
    )
    assert one.plan.fingerprint == other.plan.fingerprint != cpu.plan.fingerprint


def test_a_gpu_without_memory_left_ends_the_run_with_a_message():
    message = "cuda:1: its memory, or what --max-device-memory leaves of it, is used up"
    with pytest.raises(RunError, match=message), _within_memory_of(torch.device("cuda:1")):
        raise torch.cuda.OutOfMemoryError


@CPU_BUILD
def test_routes_evaluate_the_base_in_every_mode_so_a_gpu_is_looked_for(config):
    config.write_text(config.read_text().replace('"hidden"', '"random"'))
    assert moeplan("routes", config, "--cuda").error.startswith("--device cuda: the installed torch ")


@GPU
@pytest.mark.parametrize("bits", [{}, {"load_in_8bit": True}, {"load_in_4bit": True}], ids=["", "8bit", "4bit"])
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "ridge"])
def test_a_gpu_makes_the_routers_that_the_cpu_makes(experts, merge, mode, bits):
    settings = {"gate_mode": mode, "dtype": "float32", **bits}
    there, here = (
        read_tensors(merge(experts[0]["source_model"], experts, device=device, **settings))
        for device in ("cuda", "cpu")
    )
    routers = [name for name in here if name.endswith("block_sparse_moe.gate.weight")]
    assert routers
    for name in routers:
        assert torch.cosine_similarity(there[name], here[name], dim=-1).min() >= 0.9999


@GPU
def test_torch_takes_no_more_of_a_gpu_than_it_may(experts, merge):
    most = 512 * MIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    merge(experts[0]["source_model"], experts, gate_mode="hidden", device="auto", max_device_memory=most)
    assert 0 < torch.cuda.max_memory_reserved() <= most


@GPU
def test_a_gpu_that_is_not_there_is_refused_by_its_number(config):
    result = moeplan(config, "--plan", "--device", "cuda:99")
    assert result.status == 2
    assert f"torch finds {torch.cuda.device_count()} GPU" in result.error
