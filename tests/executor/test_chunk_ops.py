"""Operations on chunks, by what torch makes of the same numbers."""

import warnings

import numpy as np
import pytest
import torch

from executor.chunk_ops import apply
from planner.expr import BLOCK, Cast, DType, Scale
from planner.layout import PAGE
from planner.plan import ChunkOp

DTYPES = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}


def every_kind_of_number(dtype: torch.dtype) -> torch.Tensor:
    """Numbers of any bits: of all sizes, infinite, not a number, and halfway between two of fewer bits."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, BLOCK, np.uint32)
    bits[: BLOCK // 2] &= np.uint32(0xFFFF8000)
    numbers = torch.from_numpy(bits.view(np.float32))
    return numbers if dtype is torch.float32 else numbers.to(dtype)


def applied(ops: tuple[ChunkOp, ...], x: torch.Tensor, dtype: DType, to: DType) -> torch.Tensor:
    chunk = memoryview(bytearray(x.contiguous().view(torch.uint8).numpy().tobytes()))
    scratch = memoryview(bytearray(16 * len(x) + 8 * PAGE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = apply(ops, chunk, dtype, 0, len(x), scratch, lambda _: memoryview(b""), 0)
    return torch.frombuffer(result, dtype=DTYPES[to])


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_as_torch_rounds_them(dtype: DType, to: DType) -> None:
    x = every_kind_of_number(DTYPES[dtype])
    torch.testing.assert_close(applied((Cast(to),), x, dtype, to), x.to(DTYPES[to]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_multiplied_in_float32_and_what_is_too_large_becomes_infinite(dtype: DType) -> None:
    x = every_kind_of_number(DTYPES[dtype])
    product = applied((Scale(3e4), Cast(DType.F16)), x, dtype, DType.F16)
    torch.testing.assert_close(product, (x.float() * 3e4).half(), rtol=0, atol=0, equal_nan=True)
    assert product.isinf().any()
