"""What comes out of a plan: the numbers of every kind of expression, whatever the budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plans import column_sums, digest, load, mean_of, planned, source
from safetensors import safe_open

from executor.engine import run
from executor.errors import OutOfRangeError
from planner.expr import DType, Expr, Opaque, Zeros, add_low_rank, add_noise, cast, mean, rows, scale
from planner.plan import Plan, StreamStep


def test_every_kind_of_expression_comes_out_as_torch_computes_it(
    tmp_path: Path, tensors: dict[str, torch.Tensor], outputs: dict[str, Expr]
) -> None:
    plan = planned(outputs)
    out = tmp_path / "out"
    out.mkdir()
    result = run(plan, out, {"column_sums": column_sums})
    loaded = load(plan, out)
    large, small = tensors["large"], tensors["small"]
    assert torch.equal(loaded["copy"], large)
    assert torch.equal(loaded["copy again"], large)
    assert torch.equal(loaded["halved"], (large.float() * 0.5).bfloat16())
    assert torch.equal(loaded["wide"], small.float())
    assert torch.equal(loaded["stacked"], torch.stack([small] * 3))
    assert torch.equal(loaded["sums in full"], large.float().sum(dim=0) * 2)
    assert torch.equal(loaded["sums"], loaded["sums in full"].bfloat16())
    noise = loaded["noise in full"] - large.float()
    assert abs(noise.mean()) < 1e-3
    assert abs(noise.std() - 0.1) < 1e-3
    assert torch.equal(loaded["noisy"], (loaded["noise in full"] * 2).half())
    adapted = (large.double() + 0.25 * (tensors["b"].double() @ tensors["a"].double())).float()
    torch.testing.assert_close(loaded["adapted in full"], adapted, rtol=1e-6, atol=1e-6)
    assert torch.equal(loaded["adapted"], loaded["adapted in full"].bfloat16())
    torch.testing.assert_close(loaded["adapted and noisy"] - loaded["adapted in full"], noise, rtol=0, atol=1e-5)
    adapted_small = small.float() + tensors["column"] * tensors["row"]
    torch.testing.assert_close(loaded["adapted sums"], adapted_small.sum(dim=0), rtol=1e-6, atol=1e-6)
    assert torch.equal(loaded["factor"], tensors["a"])
    averaged = mean_of([tensors[name] for name in ("float32", "float32", "float16", "bfloat16")])
    assert torch.equal(loaded["mean in full"], averaged)
    assert torch.equal(loaded["mean"], averaged.bfloat16())
    assert torch.equal(loaded["mean again"], loaded["mean"])
    rough = loaded["half the mean and noise"].float() - averaged / 2
    assert abs(rough.std() - 0.05) < 0.001
    assert torch.equal(loaded["sums of a mean"], loaded["mean"].float().sum(dim=0) * 3)
    assert torch.equal(loaded["sums of some rows"], loaded["mean"][600:603].float().sum(dim=0))
    assert torch.equal(loaded["some of the sums"], loaded["sums in full"][300:700])
    assert torch.equal(loaded["zeros"], torch.zeros(5, 3, dtype=torch.bfloat16))
    assert result.read_nbytes == plan.read_nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert result.written_nbytes == plan.written_nbytes
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {n: e.shape for n, e in outputs.items()}


def test_bytes_are_the_same_for_any_budget_and_shards_open_with_safetensors(
    tmp_path: Path, outputs: dict[str, Expr]
) -> None:
    digests = []
    for budget in (8 << 20, 11 << 20, 200 << 20):
        plan = planned(outputs, budget, shard=10 << 20)
        out = tmp_path / str(budget)
        out.mkdir()
        result = run(plan, out, {"column_sums": column_sums})
        assert result.peak_buffer_nbytes <= plan.peak_nbytes <= budget
        digests.append(digest(out))
    assert len(digests[0]) > 1
    assert digests[0] == digests[1] == digests[2]
    for shard in plan.shards:
        with safe_open(out / shard.filename, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_a_plan_from_json_runs_to_the_same_bytes(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    run(plan, tmp_path / "a", {"column_sums": column_sums})
    run(Plan.from_json(plan.to_json()), tmp_path / "b", {"column_sums": column_sums})
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_noise_is_drawn_by_position_so_it_is_the_same_however_a_tensor_is_cut(tmp_path: Path) -> None:
    reads = source(tmp_path / "source.safetensors", {"zeros": torch.zeros(1 << 20)})
    results = []
    for budget in (1 << 20, 64 << 20):
        plan = planned({"noise": add_noise(reads["zeros"], 1.0, seed=11)}, budget)
        out = tmp_path / str(budget)
        out.mkdir()
        run(plan, out)
        results.append(load(plan, out)["noise"])
    assert torch.equal(*results)
    halves = results[0].view(2, -1)
    assert not torch.equal(halves[0], halves[1])
    assert abs(torch.corrcoef(halves)[0, 1]) < 0.01


@pytest.mark.parametrize("shape", [(100, 5000), (3, 70_000), (5000, 90), (40_000, 1)])
def test_a_low_rank_product_is_the_same_to_the_bit_however_a_tensor_is_cut(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    num_rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": shape, "b": (num_rows, 7), "a": (7, columns)}
    tensors = {name: torch.randn(*size, generator=generator) for name, size in shapes.items()}
    reads = source(tmp_path / "source.safetensors", tensors)
    adapted = add_low_rank(reads["x"], reads["b"], reads["a"], 0.5)
    outputs = {
        "adapted": adapted,
        "noisy": scale(add_noise(adapted, 0.1, seed=3), 0.5),
        "twice": add_low_rank(adapted, reads["b"], reads["a"], -0.25),
        "cast": cast(adapted, DType.BF16),
    }
    results = []
    for budget in (1, 2, 5, 64):
        plan = planned(outputs, (budget << 20) + 12 * (num_rows + columns) * 7)
        out = tmp_path / str(budget)
        out.mkdir()
        run(plan, out)
        results.append(load(plan, out))
    assert len({plan.pool.slab_nbytes for plan in [planned(outputs, b << 20) for b in (8, 64)]}) == 2
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in outputs)
    x, b, a = (tensors[name].double() for name in "xba")
    torch.testing.assert_close(results[0]["adapted"], (x + 0.5 * b @ a).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0]["twice"], (x + 0.25 * b @ a).float(), rtol=1e-6, atol=1e-6)


def test_a_kernel_s_result_that_takes_several_chunks_is_written_as_it_is(tmp_path: Path) -> None:
    expected = torch.arange(700 * 1001, dtype=torch.float32).view(700, 1001)

    def count(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        output.copy_(expected)

    counted = Opaque("count", "0", (), DType.F32, (700, 1001))
    outputs = {"result": counted, "rounded": cast(counted, DType.BF16), "rows": rows(counted, 100, 650)}
    plan = planned(outputs, budget=4 << 20)
    assert all(step.chunk_numel < step.numel / 2 for step in plan.steps if isinstance(step, StreamStep))
    run(plan, tmp_path, {"count": count})
    loaded = load(plan, tmp_path)
    assert torch.equal(loaded["result"], expected)
    assert torch.equal(loaded["rounded"], expected.bfloat16())
    assert torch.equal(loaded["rows"], expected[100:650])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [65_536.0, -1e5])
@pytest.mark.parametrize("beside", [0.0, float("inf"), float("nan")])
def test_a_weight_that_float16_has_no_place_for_ends_the_run(
    tmp_path: Path, dtype: torch.dtype, weight: float, beside: float
) -> None:
    x = torch.zeros(3 << 20, dtype=dtype)
    x[-5], x[-6] = weight, beside
    reads = source(tmp_path / "source.safetensors", {"x": x})
    plan = planned({"zeros": Zeros(DType.F16, (5,)), "the weights": cast(reads["x"], DType.F16)})
    with pytest.raises(OutOfRangeError, match=r"the weights: has weights beyond 65,504"):
        run(plan, tmp_path)


def test_what_is_infinite_or_no_number_in_a_source_stays_so_in_float16(tmp_path: Path) -> None:
    x = torch.tensor([1.0, float("inf"), 65_504.0, float("-inf"), float("nan")])
    reads = source(tmp_path / "source.safetensors", {"x": x})
    plan = planned({"x": cast(reads["x"], DType.F16)})
    run(plan, tmp_path)
    torch.testing.assert_close(load(plan, tmp_path)["x"], x.half(), rtol=0, atol=0, equal_nan=True)


def test_a_mean_is_the_float32_mean_to_the_bit_whatever_lies_where_and_however_it_is_cut(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16]):
        of = {"odd": torch.zeros(number), "x": torch.randn(333, 1001, generator=generator).to(dtype)}
        parts.append((of["x"], source(tmp_path / f"{number}.safetensors", of)["x"]))
    expected = mean_of([tensor for tensor, _ in parts])
    # torch's own mean adds up five or more in another order; numpy's goes through them one by one.
    assert np.array_equal(expected.numpy(), np.stack([tensor.float().numpy() for tensor, _ in parts]).mean(axis=0))
    averaged = mean([read for _, read in parts])
    outputs: dict[str, Expr] = {
        "odd": Zeros(DType.BF16, (3,)),
        "float32": averaged,
        "bfloat16": cast(averaged, DType.BF16),
        "float16": cast(averaged, DType.F16),
    }
    for budget in (1 << 20, 3 << 20, 64 << 20):
        plan = planned(outputs, budget)
        out = tmp_path / str(budget)
        out.mkdir()
        result = run(plan, out, check_sources=True)
        assert result.peak_buffer_nbytes <= plan.peak_nbytes <= budget
        assert result.read_nbytes == plan.read_nbytes == sum(tensor.nbytes for tensor, _ in parts)
        loaded = load(plan, out)
        assert torch.equal(loaded["float32"], expected)
        assert torch.equal(loaded["bfloat16"], expected.bfloat16())
        assert torch.equal(loaded["float16"], expected.half())


def test_a_mean_that_nothing_else_is_computed_beside_is_computed(tmp_path: Path) -> None:
    reads = source(tmp_path / "source.safetensors", {"a": torch.full((3,), 0.1), "b": torch.full((3,), 0.2)})
    plan = planned({"mean": mean([reads["a"], reads["b"]])})
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "out")
    assert torch.equal(load(plan, tmp_path / "out")["mean"], (torch.full((3,), 0.1) + torch.full((3,), 0.2)) / 2)
