"""Linear layers whose weights are served a block of rows at a time, so that no whole matrix is ever needed.

What a block comes to depends on the block and the input alone. Blocks are cut by the matrix's shape: it makes no
difference whether it lies in memory or in a file, and how many blocks are under way at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from executor.weights import Matrix, Weights
from moeplan.gates.device import BLOCKS
from moeplan.gates.layers import block_rows

_GPU_WORKERS = ThreadPoolExecutor(BLOCKS, thread_name_prefix="GPU")
"""They give work to a GPU. Those that read blocks are more, and cuBLAS takes memory for each thread that uses it."""

_BY_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX2"
"""Which of torch's libraries multiplies on the CPU. With AVX-512 oneDNN is twice as fast as MKL on AMD, where MKL does
not use it; without, MKL is a tenth faster."""


@dataclass
class Padding:
    """Which rows of what linear layers are given are `tokens`, by their numbers (on `device`); None: all. The others
    are padding, for which nothing is computed."""

    device: torch.device
    tokens: torch.Tensor | None = None

    @contextmanager
    def of(self, lengths: Sequence[int]) -> Iterator[None]:
        """Within, prompts of these lengths are padded to the longest."""
        width = max(lengths)
        if min(lengths) < width:
            places = [number * width + token for number, length in enumerate(lengths) for token in range(length)]
            self.tokens = torch.tensor(places, device=self.device)
        try:
            yield
        finally:
            self.tokens = None


class BlockedLinear(nn.Module):
    """A linear layer in float32, which has its weight only while it is being served one, and without it gives zeros."""

    def __init__(self, linear: nn.Linear, padding: Padding) -> None:
        super().__init__()
        self._padding = padding
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
        tokens, rows = self._padding.tokens, x.reshape(-1, self.in_features)
        given = rows if tokens is None else rows[tokens]
        result = rows.new_empty(len(rows), self.out_features)

        def multiply(begin: int, block: torch.Tensor) -> None:
            with torch.inference_mode():  # which holds for one thread
                product, columns = _product(given, block), result[:, begin : begin + len(block)]
                if tokens is None:
                    columns.copy_(product)
                else:
                    columns.zero_().index_copy_(0, tokens, product)

        work = multiply if given.device.type == "cpu" else _on_gpu(given.device, multiply)
        weights.for_each_block(matrix, block_rows(self.in_features), work)
        if self.bias is not None:
            result.add_(self.bias)
        return result.view(*x.shape[:-1], self.out_features)


def _on_gpu(device: torch.device, work: Callable[[int, torch.Tensor], None]) -> Callable[[int, torch.Tensor], None]:
    """`work`, given its blocks on `device`: they come through pinned memory, which torch has ready. No more than
    `BLOCKS` are there at a time: `work` is finished there when it returns here."""

    def run(begin: int, block: torch.Tensor) -> None:
        work(begin, block.pin_memory().to(device, non_blocking=True))
        torch.cuda.current_stream(device).synchronize()

    return lambda begin, block: _GPU_WORKERS.submit(run, begin, block).result()


def _product(x: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """`x` · `block`ᵀ, in float32."""
    if x.device.type == "cpu" and _BY_ONEDNN:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, block, None, "none", [None], "")
        return product
    return x @ block.T
