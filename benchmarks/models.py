"""Makes the checkpoints that are merged: real random data, or sparse files that only have true headers.

A model's data are one block of random numbers, of a seed of its own, that is repeated; each tensor begins at another
place in it. That is as good as fresh numbers for a file system that neither compresses nor dedupes, and is made as fast
as the disk writes. Norms are ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.prompts import save_tokenizer
from benchmarks.shapes import Shape

ITEMSIZE = {"bfloat16": 2, "float32": 4}
SAFETENSORS_DTYPE = {"bfloat16": "BF16", "float32": "F32"}

SHARD_NBYTES = 5 * 10**9
"""The largest file of a checkpoint, as transformers saves them."""

BLOCK_NUMEL = 8 * 10**6 + 1
"""Odd, so that tensors of round sizes do not all begin at the same places."""

STRIDE = 1_000_003
"""How far apart, in elements of the block, consecutive tensors begin."""

Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Models:
    """`count` distinct checkpoints of one shape."""

    shape: Shape
    count: int
    dtype: str = "bfloat16"
    sparse: bool = False

    @property
    def model_nbytes(self) -> int:
        """The size of one checkpoint."""
        return self.shape.num_parameters * ITEMSIZE[self.dtype]

    @property
    def disk_nbytes(self) -> int:
        """What all of them take on the disk."""
        return 0 if self.sparse else self.count * self.model_nbytes

    def tiny(self) -> Models:
        """The same in less than a megabyte each."""
        return replace(self, shape=self.shape.tiny())


def make_models(models: Models, directory: Path) -> list[Path]:
    """Write the checkpoints below `directory`; returns the directory of each. Data are on the disk then."""
    paths = [directory / f"model-{number}" for number in range(models.count)]
    for seed, path in enumerate(paths):
        path.mkdir(parents=True)
        data = None if models.sparse else _random_block(models, seed)
        _write_weights(models, path, data)
        (path / "config.json").write_text(json.dumps(models.shape.config(models.dtype), indent=2), encoding="utf-8")
        save_tokenizer(path)
    return paths


def _random_block(models: Models, seed: int) -> memoryview:
    numel = min(BLOCK_NUMEL, models.shape.num_parameters)
    values = np.random.default_rng(seed).standard_normal(numel, dtype=np.float32) * np.float32(0.02)
    return _encoded(values, models.dtype)


def _encoded(values: np.ndarray[tuple[int], np.dtype[np.float32]], dtype: str) -> memoryview:
    """The bytes of `values` in `dtype`."""
    if dtype == "float32":
        return values.data.cast("B")
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).data.cast("B")


def _write_weights(models: Models, path: Path, data: memoryview | None) -> None:
    itemsize = ITEMSIZE[models.dtype]
    files = list(_sharded(models.shape, itemsize))
    if len(files) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
        index = {
            "metadata": {"total_size": models.model_nbytes},
            "weight_map": {tensor: name for name, tensors in zip(names, files, strict=True) for tensor, _ in tensors},
        }
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name, tensors in zip(names, files, strict=True):
        _write_file(path / name, tensors, models.dtype, data)


def _sharded(shape: Shape, itemsize: int) -> Iterator[list[Tensor]]:
    """The tensors of each file."""
    file: list[Tensor] = []
    nbytes = 0
    for tensor in shape.tensors():
        tensor_nbytes = math.prod(tensor[1]) * itemsize
        if file and nbytes + tensor_nbytes > SHARD_NBYTES:
            yield file
            file, nbytes = [], 0
        file.append(tensor)
        nbytes += tensor_nbytes
    yield file


def _write_file(path: Path, tensors: list[Tensor], dtype: str, data: memoryview | None) -> None:
    entries = {}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": SAFETENSORS_DTYPE[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if data is None:
            file.truncate(8 + len(header) + end)
        else:
            for number, (_, shape) in enumerate(tensors):
                for chunk in _tensor_bytes(number, shape, dtype, data):
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())


def _tensor_bytes(number: int, shape: tuple[int, ...], dtype: str, data: memoryview) -> Iterator[memoryview]:
    if len(shape) == 1:
        yield _encoded(np.ones(shape[0], dtype=np.float32), dtype)
        return
    position = number * STRIDE * ITEMSIZE[dtype] % len(data)
    left = math.prod(shape) * ITEMSIZE[dtype]
    while left:
        chunk = data[position : position + left]
        yield chunk
        left -= len(chunk)
        position = 0
