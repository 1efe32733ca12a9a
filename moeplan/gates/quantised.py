"""Layers whose matrices are held in 8 or 4 bits: quantised by bitsandbytes as they are read, once for all prompts.

Only what the router is made from is quantised; what is copied stays as it is. The formats are those that transformers
loads a model in: `load_in_8bit`, a scale for each row; `load_in_4bit`, FP4 with a scale for 64 elements. Rows are
turned back into float32 a block at a time. Activations stay in float32, though bitsandbytes by itself would round them
to 8 bits beside weights of 8 bits.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses packages that nothing here uses

from bitsandbytes import functional  # noqa: E402

from executor.chunk_ops import as_tensor  # noqa: E402
from executor.weights import Matrix, Weights  # noqa: E402
from moeplan.gates.layers import block_rows  # noqa: E402
from planner.expr import DType, Shape  # noqa: E402

GROUP = 64
"""Elements that share a scale in 4 bits. Blocks have a multiple of so many rows, so no group is in two of them."""

PIECE_NUMEL = 1 << 16
"""Elements that are quantised at a time; it takes some 30 bytes for each."""


@dataclass(frozen=True)
class QuantisedMatrix:
    """A matrix, `[rows, columns]`, as `codes` (int8 of that shape, or uint8, flat, two to a byte) and `scales`."""

    shape: Shape
    bits: int
    codes: torch.Tensor
    scales: torch.Tensor

    def read(self, begin: int, end: int, memory: memoryview) -> None:
        pass

    def rows(self, begin: int, end: int, memory: memoryview) -> torch.Tensor:
        columns = self.shape[1]
        first, stop = begin * columns, end * columns
        block = as_tensor(memory, DType.F32, stop - first).view(end - begin, columns)
        if self.bits == 8:
            return block.copy_(self.codes[begin:end]).mul_(self.scales[begin:end, None] / 127)
        codes = self.codes[first // 2 : math.ceil(stop / 2)]
        scales = self.scales[first // GROUP : math.ceil(stop / GROUP)]
        state = functional.QuantState(scales, shape=block.shape, dtype=block.dtype, blocksize=GROUP, quant_type="fp4")
        return block.copy_(functional.dequantize_4bit(codes[:, None], state))


def quantise(matrix: Matrix, weights: Weights, bits: int) -> QuantisedMatrix:
    """`matrix` in so many bits, in one go through it."""
    rows, columns = matrix.shape
    if bits == 8:
        quantised = QuantisedMatrix(matrix.shape, bits, torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows))
        store = _store_8bit
    else:
        numel = rows * columns
        codes = torch.empty(math.ceil(numel / 2), dtype=torch.uint8)
        quantised = QuantisedMatrix(matrix.shape, bits, codes, torch.empty(math.ceil(numel / GROUP)))
        store = _store_4bit
    weights.for_each_block(matrix, block_rows(columns), lambda begin, block: store(quantised, begin, block))
    return quantised


def _store_8bit(to: QuantisedMatrix, begin: int, block: torch.Tensor) -> None:
    step = max(1, PIECE_NUMEL // block.shape[1])
    for piece in block.split(step):
        end = begin + len(piece)
        to.codes[begin:end], to.scales[begin:end], _ = functional.int8_vectorwise_quant(piece)
        begin = end


def _store_4bit(to: QuantisedMatrix, begin: int, block: torch.Tensor) -> None:
    first = begin * block.shape[1]
    for piece in block.flatten().split(PIECE_NUMEL):
        codes, state = functional.quantize_4bit(piece, blocksize=GROUP, quant_type="fp4")
        to.codes[first // 2 :][: len(codes)] = codes[:, 0]
        to.scales[first // GROUP :][: len(state.absmax)] = state.absmax
        first += len(piece)
