"""`random` and `uniform_random`: routers to be trained.

`random` draws from the standard normal distribution, `uniform_random` as `torch.nn.Linear` initialises its weight:
evenly within ±1/√hidden_size (torch/nn/modules/linear.py, `reset_parameters`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moeplan.gates import GateMode, GateRequest
from planner.expr import DType, Opaque

if TYPE_CHECKING:
    import numpy as np


def routers(request: GateRequest) -> list[Opaque]:
    """A router of its own for each layer, from the seed and the layer's number alone."""
    return [
        Opaque(request.mode, json.dumps({"seed": request.seed, "layer": layer}), (), DType.F32, request.router_shape)
        for layer in range(request.base.model.num_layers)
    ]


def normal(params: Any, inputs: Sequence[Any], output: Any) -> None:
    """Fill `output`, an array or a torch tensor, from N(0, 1)."""
    import numpy as np

    _generator(params).standard_normal(dtype=np.float32, out=np.asarray(output))


def uniform(params: Any, inputs: Sequence[Any], output: Any) -> None:
    """Fill `output`, an array or a torch tensor, from U(-1/√d, 1/√d), d being its last dimension."""
    import numpy as np

    values, bound = np.asarray(output), math.sqrt(1 / output.shape[-1])
    _generator(params).random(dtype=np.float32, out=values)
    values *= np.float32(2 * bound)
    values -= np.float32(bound)


def _generator(params: Any) -> np.random.Generator:
    import numpy as np

    return np.random.Generator(np.random.Philox(np.random.SeedSequence([params["seed"], params["layer"]])))


MODE = GateMode(routers, {"random": normal, "uniform_random": uniform}, imports=())
