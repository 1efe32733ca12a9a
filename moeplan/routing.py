"""How well routers can tell experts apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from planner.layout import Shard

MAX_CONDITION = 5.0
"""Routers with a larger condition number are called degenerate, as in mergekit (`warn_degenerate_gates`)."""


def degenerate_layers(directory: Path, shards: Iterable[Shard], routers: Sequence[str]) -> list[int]:
    """The layers whose router, `[num_experts, hidden_size]`, has nearly dependent rows, or rows that are not finite.

    `routers` names each layer's, and they are read from the written `shards` in `directory`.
    """
    import torch

    from executor.kernels import as_tensor

    places = {tensor.name: (shard.filename, tensor) for shard in shards for tensor in shard.tensors}
    degenerate = []
    for layer, name in enumerate(routers):
        filename, tensor = places[name]
        with open(directory / filename, "rb") as file:
            file.seek(tensor.offset)
            data = memoryview(bytearray(file.read(tensor.nbytes)))
        router = as_tensor(data, tensor.dtype, len(data) // tensor.dtype.itemsize).view(tensor.shape).float()
        if not router.isfinite().all() or torch.linalg.cond(router) > MAX_CONDITION:
            degenerate.append(layer)
    return degenerate
