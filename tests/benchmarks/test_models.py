"""The models that benchmarks are run on are real checkpoints, and distinct ones."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.cases import CASES, MEMORY_CAPS
from benchmarks.models import Models, make_models
from benchmarks.programs import Task
from benchmarks.shapes import LLAMA_1B, LLAMA_7B


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_models_have_the_tensors_of_their_shape_and_data_of_their_own(dtype: str, tmp_path: Path) -> None:
    models = Models(LLAMA_1B.tiny(), 2, dtype)
    first, second = (load_file(path / "model.safetensors") for path in make_models(models, tmp_path))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == dict(models.shape.tensors())
    seen = set()
    for name, tensor in first.items():
        assert tensor.dtype == getattr(torch, dtype)
        if tensor.dim() == 1:
            assert (tensor == 1).all()
        else:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.1)
            assert not torch.equal(tensor, second[name])
            seen.add(tensor.float().numpy().tobytes()[:256])
    assert len(seen) == sum(tensor.dim() > 1 for tensor in first.values())


def test_sparse_models_have_true_headers_and_take_no_space(tmp_path: Path) -> None:
    models = Models(LLAMA_7B, 1, sparse=True)
    (path,) = make_models(models, tmp_path)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) > models.model_nbytes
    assert sum(file.stat().st_blocks * 512 for file in files) < 1 << 20


def test_each_memory_cap_leaves_fewer_buffers_than_the_one_above(tmp_path: Path) -> None:
    memory = next(case for case in CASES if case.name == "memory")
    sources = make_models(replace(memory.models, sparse=True), tmp_path / "sources")
    config = Task(memory, tuple(sources), tmp_path).config("random")
    command = [sys.executable, "-m", "moeplan", config, tmp_path / "out", "--plan", "--json", "--quiet", "--max-memory"]
    planning = [subprocess.Popen([*command, cap], stdout=subprocess.PIPE) for cap in MEMORY_CAPS]
    plans = [json.loads(process.communicate()[0])["plan"] for process in planning]
    buffers = [plan["memory"]["buffers_nbytes"] for plan in plans]
    assert buffers == sorted(set(buffers))


def test_what_a_case_reads_and_writes_is_known_beforehand(tmp_path: Path) -> None:
    upcycling = next(case for case in CASES if case.name == "upcycling").tiny()
    tensors = load_file(make_models(upcycling.models, tmp_path)[0] / "model.safetensors")
    mlp = sum(tensor.nbytes for name, tensor in tensors.items() if ".mlp." in name)
    everything = sum(tensor.nbytes for tensor in tensors.values())
    assert upcycling.read_nbytes == everything
    routers = 8 * upcycling.models.shape.num_layers * upcycling.models.shape.hidden_size * 2
    assert upcycling.output_nbytes == everything + 7 * mlp + routers
