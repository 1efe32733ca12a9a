"""What rows of routers are, where they are no weights of a fit: directions, vectors of one length."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROUNDING = 2.0**-20
"""Of a vector's length: less than that is what float32 leaves where equal vectors were added up in other ways."""


def without(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """`positive` − `negative`; zero where they are equal but for rounding, which at length 1 would pass for a row."""
    rest = positive - negative
    return rest.zero_() if _length(rest) < ROUNDING * _length(positive) else rest


def normalized(vector: torch.Tensor) -> torch.Tensor:
    """`vector` at length 1; zero stays zero."""
    length = _length(vector)
    return vector if length == 0 else vector / length


def _length(vector: torch.Tensor) -> torch.Tensor:
    """In float64, which has room for the squares of all that float32 holds."""
    import torch

    length: torch.Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return length
