"""Where memory goes: the cap that is kept by the whole process, and what it is reckoned from."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import moeplan, outcome, sparse_llama, start, write_config
from make_models import save_tokenizer
from safetensors.torch import save_file

from moeplan import Options, UserError, memory
from moeplan.memory import CapError, MemoryCap, cgroup_limit_nbytes, memory_cap
from moeplan.routes.after import routes_after

MIB = 1 << 20


@pytest.fixture
def cgroups(tmp_path):
    """`cgroups(membership, limits)`: the memory limit where a process is in these groups and these files exist."""

    def limit(membership: str, limits: dict[str, str]) -> int | None:
        (tmp_path / "cgroup").write_text(membership)
        for name, text in limits.items():
            (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "sys" / name).write_text(text + "\n")
        return cgroup_limit_nbytes(tmp_path / "sys", tmp_path / "cgroup")

    return limit


def test_a_container_s_limit_is_found(cgroups):
    assert cgroups("0::/\n", {"memory.max": str(4096 * MIB)}) == 4096 * MIB


def test_the_least_limit_of_a_group_and_those_around_it_counts(cgroups):
    limits = {
        "slurm/memory.max": str(900 * MIB),
        "slurm/job/memory.max": str(500 * MIB),
        "slurm/job/step/memory.max": "max",
        "other/memory.max": str(1 * MIB),
    }
    assert cgroups("0::/slurm/job/step\n", limits) == 500 * MIB


def test_a_limit_of_the_first_version_of_control_groups_is_found(cgroups):
    limits = {"memory/docker/1/memory.limit_in_bytes": str(700 * MIB), "cpu/docker/1/memory.limit_in_bytes": "1"}
    assert cgroups("5:cpu:/docker/1\n4:cpuset,memory:/docker/1\n0::/\n", limits) == 700 * MIB


def test_there_may_be_no_limit(cgroups, tmp_path):
    assert cgroups("0::/\n", {"memory.max": "max"}) is None
    assert cgroup_limit_nbytes(tmp_path, tmp_path / "no such file") is None


def test_a_share_and_the_default_keep_to_a_container_s_limit(monkeypatch):
    monkeypatch.setattr(memory, "cgroup_limit_nbytes", lambda: 1000 * MIB)
    monkeypatch.setattr(memory, "resident_nbytes", lambda: 96 * MIB)
    assert memory_cap("50%", ()).nbytes == 500 * MIB
    process = 96 * MIB + memory.GROWTH_NBYTES
    assert memory_cap(None, ()) == MemoryCap(process + 500 * MIB, process)
    monkeypatch.setattr(memory, "resident_nbytes", lambda: 896 * MIB)
    assert memory_cap(None, ()).nbytes == 1000 * MIB


def test_what_is_imported_already_is_not_counted_twice(monkeypatch):
    monkeypatch.setattr(memory, "resident_nbytes", lambda: 496 * MIB)
    assert "torch" in sys.modules
    assert memory_cap("1GiB", ("torch",)).process_nbytes == 496 * MIB + memory.GROWTH_NBYTES


def test_processes_that_differ_by_little_have_the_same_left_for_buffers(monkeypatch):
    caps = set()
    for nbytes in (300 * MIB, 303 * MIB + 17):
        monkeypatch.setattr(memory, "resident_nbytes", lambda nbytes=nbytes: nbytes)
        caps.add(memory_cap("1GiB", ()))
    assert len(caps) == 1


def test_a_container_s_limit_counts_for_a_finished_model_too(checkpoint, merge, monkeypatch):
    source = checkpoint("llama-plain")
    out = merge(source, [source, source])
    monkeypatch.setattr(memory, "cgroup_limit_nbytes", lambda: 100_000)
    with pytest.raises(UserError, match="and 0 MiB may be taken"):
        routes_after(out, Options())


def test_a_cap_that_is_too_small_names_the_smallest_that_works():
    message = str(CapError(MemoryCap(100 * MIB, 280 * MIB), 3 * MIB // 2))
    assert message == (
        "the process may take 100 MiB of memory, which is too little; the smallest that works is --max-memory 282MiB "
        "(280 MiB for Python and its libraries, 2 MiB for buffers)"
    )


def test_numbers_for_another_torch_than_is_installed_are_said_to_be_such(checkpoint, tmp_path, monkeypatch):
    base, other = checkpoint("llama-plain"), checkpoint("llama-plain", 1)
    monkeypatch.setattr(memory, "sys", SimpleNamespace(modules={}))  # as if torch were still to be imported
    for mode, known, is_said in (("cheap_embed", True, False), ("cheap_embed", False, True), ("random", False, False)):
        monkeypatch.setattr(memory, "runtime_is_known", lambda known=known: known)
        config = write_config(tmp_path / "config.yml", base, [base, other], gate_mode=mode)
        shown, refused = moeplan(config, "--plan").stdout, moeplan(config, "--plan", "--max-memory", "1MiB").error
        assert ("buffers)\n        (for torch's CPU build; the merge measures " in shown) is is_said
        assert ("MiB for buffers), for torch's CPU build; the merge measures " in refused) is is_said


# --------------------------------------------------------------------------------------- a process of its own, measured


MEASURED = (
    "import atexit, re\n"
    "from pathlib import Path\n"
    "status = Path('/proc/self/status')\n"
    "atexit.register(lambda: print('peak', re.search('VmHWM:\\\\s+(\\\\d+)', status.read_text())[1], 'KiB'))\n"
    "from moeplan.__main__ import main; main()"
)

THREADS_THAT_FREE = """
from threading import Barrier, Thread

import numpy as np

from executor.memory import give_back_what_is_freed, resident_nbytes

give_back_what_is_freed()
together = Barrier(8)


def compute():
    together.wait()
    arrays = [np.ones(3 << 20, np.uint8) for _ in range(5)]
    together.wait()
    del arrays


before = resident_nbytes()
threads = [Thread(target=compute) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print((resident_nbytes() - before) >> 20)
"""

# Stands in for a build of torch that takes more memory than the one that the numbers in `moeplan.memory` are of.
LARGER_TORCH = (
    "from moeplan import memory, merging\n"
    "memory.IMPORT_NBYTES['torch'] = 64 << 20\n"
    "memory.runtime_is_known = merging.runtime_is_known = lambda: False\n"
)

# The model is read once for each token: fewer take less time, and less memory, which the forecast counts.
SHORT_PASSAGES = "from moeplan.gates import samples; samples.TOKENS = 16\n"


def save_adapter(path, rank, hidden, wide):
    """Save a LoRA adapter on the MLPs of two layers."""
    path.mkdir()
    shapes = {"gate_proj": (wide, hidden), "up_proj": (wide, hidden), "down_proj": (hidden, wide)}
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [*shapes]}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for layer in range(2):
        for name, (rows, columns) in shapes.items():
            module = f"base_model.model.model.layers.{layer}.mlp.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.ones(rank, columns)
            tensors[f"{module}.lora_B.weight"] = torch.ones(rows, rank)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of one process")
@pytest.mark.parametrize(
    ("mode", "expert", "build"),
    [
        ("random", {"noise_scale": 0.01, "residual_scale": 0.5}, ""),
        ("hidden", {}, ""),
        ("ridge", {}, ""),
        ("ridge", {"positive_samples": 8}, SHORT_PASSAGES),
        ("hidden", {}, LARGER_TORCH),
        ("random", {"adapter": 64}, ""),
        ("hidden", {"adapter": 64}, ""),
    ],
    ids=["random", "hidden", "ridge", "ridge-samples", "hidden-larger torch", "random-adapter", "hidden-adapter"],
)
def test_the_smallest_cap_that_works_is_kept_by_the_whole_process(tmp_path, mode, expert, build):
    source = sparse_llama(
        tmp_path / "source", vocab_size=4000, hidden_size=1024, intermediate_size=4096, num_attention_heads=16
    )
    save_tokenizer(source)
    expert = dict(expert)
    rank = expert.pop("adapter", None)
    model = source if rank is None else f"{source}+{save_adapter(tmp_path / 'adapter', rank, 1024, 4096)}"
    experts = [{"source_model": model, **expert}] * 2
    long = "another prompt, " * 30
    experts[1] = experts[1] | {"positive_prompts": [long]}
    if mode == "ridge" and "positive_samples" not in expert:  # more tokens than dimensions
        experts[1] = experts[1] | {"positive_prompts": [f"{number} {long}" for number in range(12)]}
    config = write_config(tmp_path / "config.yml", source, experts, gate_mode=mode, dtype="float16")
    args = [config, tmp_path / "out", "--i-understand-this-is-not-useful-without-training", "--quiet"]

    refused = outcome(start(*args, "--max-memory", "1MiB", code=build + MEASURED))
    assert refused.status == 2
    assert not (tmp_path / "out").exists()
    smallest = int(re.search(r"the smallest that works is --max-memory (\d+)MiB", refused.stderr)[1])
    almost = outcome(start(*args, "--max-memory", f"{smallest - 1}MiB", code=build + MEASURED))
    assert almost.status == 2
    assert not (tmp_path / "out").exists()

    merged = outcome(start(*args, "--max-memory", f"{smallest}MiB", code=build + MEASURED))
    assert merged.status == 0, merged.stderr
    peak = int(re.fullmatch(r"peak (\d+) KiB\n", merged.stdout)[1]) / 1024
    # How much of a library is resident depends on the page cache, by 110 MiB: whether it is mapped in pages of 2 MiB.
    assert 0.5 * smallest < peak <= smallest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of one process")
def test_threads_keep_nothing_of_what_they_freed():
    ran = outcome(start(code=THREADS_THAT_FREE))
    assert ran.status == 0, ran.stderr
    assert int(ran.stdout) < 24  # MiB, of which the heap may keep 16; 8 threads had 120


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of one process")
def test_the_cap_that_a_plan_names_is_kept_by_a_merge_of_many_thousand_tensors(tmp_path):
    small = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 32) | {"num_attention_heads": 2}
    source = sparse_llama(tmp_path / "source", num_hidden_layers=48, num_key_value_heads=2, **small)
    experts = [{"source_model": source, "noise_scale": (number + 1) / 200} for number in range(128)]
    config = write_config(tmp_path / "config.yml", source, experts, gate_mode="random")
    planned = outcome(start(config, "--plan", "--max-memory", "1MiB"))
    cap = int(re.search(r"the smallest that works is --max-memory (\d+)MiB", planned.stderr)[1])
    merged = outcome(start(config, tmp_path / "out", "--quiet", "--max-memory", f"{cap}MiB", code=MEASURED))
    assert merged.status == 0, merged.stderr
    assert int(re.fullmatch(r"peak (\d+) KiB\n", merged.stdout)[1]) / 1024 <= cap


def test_a_merge_that_evaluates_nothing_does_without_torch(tmp_path):
    source = sparse_llama(tmp_path / "source")
    experts = [{"source_model": source, "noise_scale": 0.1, "residual_scale": 0.5}, {"source_model": source}]
    config = write_config(tmp_path / "config.yml", source, experts, gate_mode="uniform_random", dtype="bfloat16")
    code = "import atexit, sys\natexit.register(lambda: print(sorted({'torch', 'transformers'} & set(sys.modules))))\n"
    ran = outcome(start(config, tmp_path / "out", "--quiet", code=code + "from moeplan.__main__ import main; main()"))
    assert (ran.status, ran.stdout) == (0, "[]\n"), ran.stderr
