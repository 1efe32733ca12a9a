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
    return rest.zero_() if rest.norm() < ROUNDING * positive.norm() else rest


def normalized(vector: torch.Tensor) -> torch.Tensor:
    """`vector` at length 1; zero stays zero."""
    length: torch.Tensor = vector.norm().clamp(min=1e-8)
    return vector / length
