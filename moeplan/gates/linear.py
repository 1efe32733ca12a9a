"""Linear layers whose weights are served a block of rows at a time, so that no whole matrix is ever needed.

What a block comes to depends on the block and the input alone. Blocks are cut by the matrix's shape: it makes no
difference whether it lies in memory or in a file, and how many blocks are under way at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from executor.weights import Matrix, Weights
from moeplan.gates.layers import block_rows


class BlockedLinear(nn.Module):
    """A linear layer in float32, which has its weight only while it is being served one, and without it gives zeros."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self._served: tuple[Matrix, Weights] | None = None

    @contextmanager
    def serving(self, matrix: Matrix, weights: Weights) -> Iterator[None]:
        """Multiply by `matrix`, `[out_features, in_features]`, within; `weights` goes through it."""
        self._served = matrix, weights
        try:
            yield
        finally:
            self._served = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._served is None:
            return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)
        matrix, weights = self._served
        flat = x.reshape(-1, self.in_features)
        result = flat.new_empty(len(flat), self.out_features)

        def multiply(begin: int, block: torch.Tensor) -> None:
            with torch.inference_mode():  # which holds for one thread
                result[:, begin : begin + len(block)] = _product(flat, block)

        weights.for_each_block(matrix, block_rows(self.in_features), multiply)
        if self.bias is not None:
            result.add_(self.bias)
        return result.view(*x.shape[:-1], self.out_features)


def _product(x: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """`x` · `block`ᵀ, in float32. By oneDNN where torch has it: on AMD twice as fast as MKL, which torch would use."""
    if torch.backends.mkldnn.is_available():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, block, None, "none", [None], "")
        return product
    return x @ block.T
