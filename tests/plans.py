"""Plans in small: of tensors in real files, run in one go or in several."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from executor.engine import RunResult, run
from executor.journal import Journal
from moeplan.safetensors_header import LENGTH_NBYTES
from planner.expr import DType, Expr, Read, SourceFile
from planner.graph import TensorGraph
from planner.plan import Plan
from planner.schedule import compile

DTYPES = {torch.float32: DType.F32, torch.float16: DType.F16, torch.bfloat16: DType.BF16}


class Stop(Exception):  # noqa: N818
    """Stops a run from within."""


def source(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Read]:
    """Save `tensors` at `path`; where each of them lies."""
    save_file(tensors, path)
    stat = path.stat()
    file = SourceFile(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, str(path))
    raw = path.read_bytes()
    start = LENGTH_NBYTES + int.from_bytes(raw[:LENGTH_NBYTES], "little")
    reads = {}
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        reads[name] = Read(file, raw.index(data, start), DTYPES[tensor.dtype], tuple(tensor.shape))
    return reads


def planned(outputs: dict[str, Expr], budget: int = 64 << 20, shard: int = 1 << 40) -> Plan:
    return compile(TensorGraph(outputs), budget_nbytes=budget, shard_nbytes=shard)


def load(plan: Plan, directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in plan.shards for name, t in load_file(directory / shard.filename).items()}


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def column_sums(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
    output.copy_(inputs[0].float().sum(dim=0) * params)


KERNELS = {"column_sums": column_sums}


def mean_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their float32 mean, in the order of `tensors`."""
    total = tensors[0].float()
    for tensor in tensors[1:]:
        total = total + tensor.float()
    return total / len(tensors)


def go_on(plan: Plan, place: Path, **how: Any) -> RunResult:
    """Run with the journal in `place`, into a directory beside it."""
    (place / "model").mkdir(parents=True, exist_ok=True)
    kept = Journal(place, {"plan": plan.fingerprint})
    try:
        return run(plan, place / "model", how.pop("kernels", KERNELS), journal=kept, **how)
    finally:
        kept.close()


def stopping_after(nbytes: int) -> Callable[[object], None]:
    def watch(state: Any) -> None:
        if state.written_nbytes >= nbytes:
            raise Stop

    return watch
