"""Plans that several of these tests run."""

from pathlib import Path

import pytest
import torch
from plans import KERNELS, digest, planned, source

from executor.engine import RunResult, run
from planner.expr import DType, Expr, Opaque, Read, Zeros, add_low_rank, add_noise, cast, mean, rows, scale, stack
from planner.plan import Plan


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "large": torch.randn(3000, 1000, generator=generator).bfloat16(),
        "small": torch.randn(5, 7, generator=generator).half(),
        "column": torch.randn(5, 1, generator=generator),
        "row": torch.randn(1, 7, generator=generator),
        "b": torch.randn(3000, 6, generator=generator),
        "a": torch.randn(6, 1000, generator=generator).bfloat16(),
        "float32": torch.randn(700, 1001, generator=generator),
        "float16": torch.randn(700, 1001, generator=generator).half(),
        "bfloat16": torch.randn(700, 1001, generator=generator).bfloat16(),
    }


@pytest.fixture
def outputs(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Expr]:
    """One of everything that a graph can hold."""
    reads = source(tmp_path / "source.safetensors", tensors)
    large, small = reads["large"], reads["small"]
    sums = Opaque("column_sums", "2", (large,), DType.F32, (1000,))
    adapted = add_low_rank(large, reads["b"], reads["a"], 0.25)
    adapted_small = add_low_rank(small, reads["column"], reads["row"], 1.0)
    averaged = mean([reads[name] for name in ("float32", "float16", "bfloat16", "float32")])
    weights = (cast(averaged, DType.BF16),)
    return {
        "copy": large,
        "copy again": large,
        "halved": cast(scale(large, 0.5), DType.BF16),
        "noisy": cast(scale(add_noise(large, 0.1, seed=3), 2.0), DType.F16),
        "noise in full": add_noise(large, 0.1, seed=3),
        "wide": cast(small, DType.F32),
        "stacked": stack([small, small, small]),
        "sums": cast(sums, DType.BF16),
        "sums in full": sums,
        "adapted": cast(adapted, DType.BF16),
        "adapted in full": adapted,
        "adapted and noisy": add_noise(adapted, 0.1, seed=3),
        "adapted sums": Opaque("column_sums", "1", (adapted_small,), DType.F32, (7,)),
        "factor": reads["a"],
        "mean": cast(averaged, DType.BF16),
        "mean again": cast(averaged, DType.BF16),
        "mean in full": averaged,
        "half the mean and noise": cast(scale(add_noise(averaged, 0.1, seed=3), 0.5), DType.F16),
        "sums of a mean": Opaque("column_sums", "3", weights, DType.F32, (1001,)),
        "sums of some rows": Opaque("column_sums", "1", (rows(weights[0], 600, 603),), DType.F32, (1001,)),
        "some of the sums": rows(sums, 300, 700),
        "zeros": Zeros(DType.BF16, (5, 3)),
    }


@pytest.fixture
def reads(tmp_path: Path) -> dict[str, Read]:
    generator = torch.Generator().manual_seed(0)
    names = ("large", "other", "third")
    tensors = {name: torch.randn(3001, 1000, generator=generator).bfloat16() for name in names}
    return source(tmp_path / "source.safetensors", tensors)


@pytest.fixture
def plan(reads: dict[str, Read]) -> Plan:
    """Copies, copies of one thing in two places, casts, and a chain of kernels."""
    first = Opaque("column_sums", "1", (reads["large"],), DType.F32, (1, 1000))
    second = Opaque("column_sums", "2", (first,), DType.F32, (1000,))
    outputs: dict[str, Expr] = {
        "copy": reads["large"],
        "copy again": reads["large"],
        "other": reads["other"],
        "halved": cast(scale(reads["third"], 0.5), DType.F16),
        "third": reads["third"],
        "sums": second,
    }
    return planned(outputs, budget=40 << 20, shard=16 << 20)


@pytest.fixture
def whole(plan: Plan, tmp_path: Path) -> tuple[dict[str, str], RunResult]:
    """The digests of a run in one go, and its result."""
    (tmp_path / "whole").mkdir()
    result = run(plan, tmp_path / "whole", KERNELS)
    return digest(tmp_path / "whole"), result
