"""What happens to a kernel step: the kernel gets its tensors, and its result is saved where a later kernel needs it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from functools import partial
from typing import TYPE_CHECKING

from executor import chunk_ops
from executor.buffers import WholeTensors
from executor.chunk_ops import ReadInto
from executor.journal import Journal
from executor.torch_threads import TorchThreads
from executor.weights import FileMatrix, Matrix, MeanMatrix, Weights, WholeMatrix
from planner.plan import BufferView, FileRoot, FileView, KernelStep, MeanRoot

if TYPE_CHECKING:
    import torch

Kernel = Callable[..., None]
"""`kernel(params, inputs, output)` computes the tensor `output` in place, from the tensors `inputs`. `params` is the
kernel step's JSON, parsed. Where the step works on blocks, a fourth argument is its `Weights`. In a run without torch
tensors are numpy's arrays."""


class KernelRunner:
    """Runs kernels, known by their names in the plan, one at a time. Their blocks go to `workers`.

    `result_keys` are the names that results are saved under, by their buffers.
    """

    def __init__(
        self,
        kernels: Mapping[str, Kernel],
        result_keys: Mapping[int, str],
        tensors: WholeTensors,
        journal: Journal,
        torch_threads: TorchThreads,
        workers: Executor,
    ) -> None:
        self._kernels = kernels
        self._result_keys = result_keys
        self._tensors = tensors
        self._journal = journal
        self._torch_threads = torch_threads
        self._workers = workers

    def prepare(self, step: KernelStep, read_into: ReadInto, check: Callable[[], None]) -> Callable[[], None]:
        """Allocate what the kernel fills and uses; returns what runs it. Each of its blocks comes by `read_into`, and
        `check` is called before: what that raises ends it."""
        self._torch_threads.use_all()
        inputs = [self._view(view) for view in step.inputs]
        output = self._view(step.output)

        def run() -> None:
            kernel, params = self._kernels[step.kernel], json.loads(step.params)
            if step.block_nbytes:
                kernel(params, inputs, output, self._weights(step, read_into, check))
            else:
                kernel(params, inputs, output)
            result = step.output.buffer
            if result in self._result_keys:
                self._journal.save_result(self._result_keys[result], self._tensors.get(result))

        return run

    def restore(self, step: KernelStep) -> None:
        """Have the result that an earlier run saved."""
        result = step.output.buffer
        self._journal.load_result(self._result_keys[result], self._tensors.get(result))

    def drop_results(self, buffers: Iterable[int]) -> None:
        """Nothing needs what was in these buffers any more."""
        for buffer in buffers:
            if buffer in self._result_keys:
                self._journal.drop_result(self._result_keys[buffer])

    def _weights(self, step: KernelStep, read_into: ReadInto, check: Callable[[], None]) -> Weights:
        return Weights(
            [self._matrix(view, read_into) for view in step.weights],
            workers=self._workers,
            blocks=step.workers,
            threads=self._torch_threads.count,
            block_nbytes=step.block_nbytes,
            check=check,
        )

    def _matrix(self, view: BufferView | FileView, read_into: ReadInto) -> Matrix:
        if isinstance(view, BufferView):
            return WholeMatrix(self._tensor(view))
        match view.root:
            case FileRoot(source, offset, dtype):
                return FileMatrix(view.shape, dtype, offset, partial(read_into, source))
            case MeanRoot(parts):
                return MeanMatrix(view.shape, view.dtype, parts, read_into)

    def _view(self, view: BufferView) -> torch.Tensor | chunk_ops.Array:
        if self._torch_threads.uses_torch:
            return self._tensor(view)
        memory = self._tensors.get(view.buffer)
        return chunk_ops.as_array(memory, view.dtype, len(memory) // view.dtype.itemsize).reshape(view.shape)

    def _tensor(self, view: BufferView) -> torch.Tensor:
        memory = self._tensors.get(view.buffer)
        return chunk_ops.as_tensor(memory, view.dtype, len(memory) // view.dtype.itemsize).view(view.shape)
