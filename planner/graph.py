"""The tensor graph: output name → expression, and the orders and drawings that follow from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.expr import Expr, Opaque, RemoteFile, SourceFile, field_names

if TYPE_CHECKING:
    import networkx as nx


@dataclass
class TensorGraph:
    """What to write: each output tensor's name and expression, in the order they should lie in the output."""

    outputs: dict[str, Expr] = field(default_factory=dict)

    def add(self, name: str, expr: Expr) -> None:
        """Declare the output tensor `name`. Raises ValueError for a name that is taken."""
        if name in self.outputs:
            raise ValueError(f"output tensor {name} is declared twice")
        self.outputs[name] = expr

    def to_networkx(self) -> nx.DiGraph[Expr | str]:
        """The graph with an edge from each expression to what is made of it, output names being the sinks."""
        import networkx as nx  # costs 0.15 s, and most plans need no general graph

        drawing: nx.DiGraph[Expr | str] = nx.DiGraph()
        for name, expr in self.outputs.items():
            drawing.add_edge(expr, name)
        for expr in walk(self.outputs):
            drawing.add_edges_from((part, expr) for part in expr.inputs)
        return drawing


def walk(outputs: Mapping[str, Expr]) -> Iterator[Expr]:
    """Each distinct expression once, after everything it is made of: a post-order walk from the first output on.

    So a kernel that several outputs need stands where the first of them needs it, which is what keeps whole tensors
    in memory for the shortest time when kernels form a chain (`hidden states 1 ← hidden states 0`, a gate off each).
    """
    seen: set[Expr] = set()
    for root in outputs.values():
        stack = [(root, iter(root.inputs))]
        while stack:
            expr, rest = stack[-1]
            if expr in seen:
                stack.pop()
            elif (part := next(rest, None)) is not None:
                if part not in seen:
                    stack.append((part, iter(part.inputs)))
            else:
                seen.add(expr)
                stack.pop()
                yield expr


def opaque_in_order(outputs: Mapping[str, Expr]) -> list[Opaque]:
    """The kernels to run, each after the kernels it depends on."""
    return [expr for expr in walk(outputs) if isinstance(expr, Opaque)]


def digest(outputs: Mapping[str, Expr]) -> str:
    """A digest of what every output is made of: equal for graphs that give equal bytes from equal files."""
    number: dict[Expr, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Expr):
            return number[value]
        if isinstance(value, SourceFile | RemoteFile):
            return value.lasting
        return tuple(map(plain, value)) if isinstance(value, tuple) else value

    content = hashlib.sha256()
    for expr in walk(outputs):
        number[expr] = len(number)
        values = [plain(getattr(expr, name)) for name in field_names(type(expr))]
        content.update(repr((type(expr).__name__, *values)).encode())
    content.update(repr([(name, number[expr]) for name, expr in outputs.items()]).encode())
    return content.hexdigest()
