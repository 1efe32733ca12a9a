"""Elementwise operations on chunks: cast, scale, add noise.

A chunk is worked on in place of a slab that the caller cuts up, so nothing here allocates::

    slab   ├─ chunk as read ─┤├─ float32 work ─┤├─ noise ─┤├─ result ─┤

Regions begin at pages, but for the first, which lies in its page as in the file it was read from, and the last, which
lies as in the file that it goes to: so both can be moved directly. Those that a stream's operations do not need are not
there (`planner.schedule` sizes chunks by the same rule).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from planner.expr import BLOCK, AddNoise, Cast, DType, Op, Scale
from planner.layout import PAGE

if TYPE_CHECKING:
    import torch


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of the same name."""
    import torch

    return {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}[dtype]


def as_tensor(memory: memoryview, dtype: DType, numel: int) -> torch.Tensor:
    """`numel` elements at the start of `memory`, as a flat tensor that shares it."""
    import torch

    if numel == 0:
        return torch.empty(0, dtype=torch_dtype(dtype))
    return torch.frombuffer(memory, dtype=torch_dtype(dtype), count=numel)


def clear(memory: memoryview) -> None:
    """Fill `memory` with zeros."""
    np.frombuffer(memory, np.uint8).fill(0)


def apply(
    ops: Sequence[Op], chunk: memoryview, dtype: DType, first: int, numel: int, scratch: memoryview, at: int = 0
) -> memoryview:
    """Run `ops` on a chunk of `numel` elements of `dtype`, the first of which is the tensor's element `first`.

    The chunk stays as it is: other operations may be run on it. The result lies in `scratch` until the next call, at
    byte `at` of a page.
    """
    arithmetic = any(not isinstance(op, Cast) for op in ops)
    noisy = any(isinstance(op, AddNoise) for op in ops)
    rounded = isinstance(ops[-1], Cast)
    work, scratch = cut(scratch, numel * 4 if arithmetic else 0, 0 if rounded else at)
    noise, scratch = cut(scratch, numel * 4 if noisy else 0)

    result, x = work, as_tensor(chunk, dtype, numel)
    if arithmetic:
        x = as_tensor(work, DType.F32, numel).copy_(x)
    for op in ops:
        match op:
            case Scale(factor):
                x.mul_(factor)
            case AddNoise(scale, seed):
                fill_normal(np.frombuffer(noise, np.float32), seed, first)
                x.add_(as_tensor(noise, DType.F32, numel), alpha=scale)
            case Cast(to):
                result, _ = cut(scratch, numel * to.itemsize, at)
                x = as_tensor(result, to, numel).copy_(x)
    return result


def cut(memory: memoryview, nbytes: int, at: int = 0) -> tuple[memoryview, memoryview]:
    """`nbytes` of `memory`, from byte `at` of its first page on, and what is left from the next page on."""
    return memory[at : at + nbytes], memory[-(-(at + nbytes) // PAGE) * PAGE :]


def fill_normal(out: np.ndarray, seed: int, first: int) -> None:
    """Fill flat float32 `out` with standard normal noise, of a tensor's elements from `first` on, where a block begins.

    Each block of `BLOCK` elements has a Philox stream of its own, keyed by `(seed, block)`, so that any chunk can
    be filled without those before it. Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    for begin in range(0, len(out), BLOCK):
        key = np.array([seed, (first + begin) // BLOCK], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        block = out[begin : begin + BLOCK]
        generator.standard_normal(dtype=np.float32, out=block)
