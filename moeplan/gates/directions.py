"""What rows of routers are, where they are no weights of a fit: directions, vectors of one length."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def normalized(vector: torch.Tensor) -> torch.Tensor:
    """`vector` at length 1 along its last dimension; zero stays zero."""
    length: torch.Tensor = vector.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return vector / length
