"""Gate modes: how each layer's router gets its weights. `moeplan.gate_modes` says which file makes those of each.

A mode turns the config's prompts into expressions, which the planner orders like any other, and brings the kernels
that compute the opaque ones. Planning imports neither torch nor transformers: kernels import what they need when run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING

from moeplan.gate_modes import MODES
from moeplan.gates.device import CPU, Device
from moeplan.gates.prompts import Prompts

if TYPE_CHECKING:
    from executor.kernel_runner import Kernel
    from moeplan.architectures.dense import DenseModel
    from moeplan.config import Expert
    from planner.expr import Expr, Opaque, Shape


@dataclass(frozen=True)
class Base:
    """The base `model`, and how it is evaluated.

    `averaged` has the weights that the merged model has in the place of its own, by their names: it is evaluated with
    those. `bits` is 8 or 4 where that is to be done quantised, else 0; `device` is where it is done. With
    `trust_remote_code` code that the model brings with it is run.
    """

    model: DenseModel
    averaged: Mapping[str, Expr] = field(default_factory=dict)
    bits: int = 0
    device: Device = CPU
    trust_remote_code: bool = False

    def weight(self, name: str) -> Expr:
        """The weight `name`, as it is to be evaluated."""
        return self.averaged.get(name, self.model.checkpoint.tensors[name])


@dataclass(frozen=True)
class GateRequest:
    """What routers are made for: the gate `mode`, the `base` whose residual stream they will see, the experts.

    A `shared` expert that has a gate stands behind the routed ones. `prompts` are those of both, none where the mode
    reads no text. `ridge` is the config's. `models` are those of the rows, for modes that draw text from them.

    For `moeplan routes`, routers are made `without` a fold of the prompts, 0 or 1: see `moeplan.gates.folds`.
    """

    mode: str
    base: Base
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...] = ()
    models: tuple[DenseModel, ...] = ()
    prompts: Prompts = field(default_factory=Prompts)
    ridge: float = 0.1
    seed: int = 0
    without: int | None = None

    @property
    def rows(self) -> tuple[Expert, ...]:
        """What a router's rows are for, one after the other."""
        return self.experts + self.shared

    @property
    def router_shape(self) -> Shape:
        """`(num_rows, hidden_size)`."""
        return len(self.rows), self.base.model.hidden_size

    def on(self, device: Device) -> GateRequest:
        """The same, with the base evaluated on `device`."""
        return replace(self, base=replace(self.base, device=device))


@dataclass(frozen=True)
class GateMode:
    """A way to make routers.

    `routers` gives a kernel's result for each layer, `[num_rows, hidden_size]` float32. `kernels` are the functions of
    its own that compute them, by name; `imports` are the heavy packages that those use, torch first (without any, they
    are given numpy's arrays, not tensors). Where it `evaluates` the base, that is done by kernels that it need not
    name, with packages of theirs.
    """

    routers: Callable[[GateRequest], Sequence[Opaque]]
    kernels: Mapping[str, Kernel]
    imports: tuple[str, ...] = ("torch",)
    evaluates: bool = False

    def all_kernels(self) -> dict[str, Kernel]:
        """Its own, and those that it takes to evaluate the base, if it does."""
        if not self.evaluates:
            return dict(self.kernels)
        from moeplan.gates.evaluation import KERNELS  # here, because it is made of what is above

        return {**KERNELS, **self.kernels}

    def modules(self, bits: int) -> tuple[str, ...]:
        """The heavy packages that are used with a base of so many bits."""
        if not self.evaluates:
            return self.imports
        from moeplan.gates.evaluation import modules

        return modules(bits)


def gate_mode(name: str) -> GateMode:
    """The gate mode that the YAML calls `name`."""
    mode: GateMode = import_module(f"moeplan.gates.{MODES[name].module}").MODE
    return mode
