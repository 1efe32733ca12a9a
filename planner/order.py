"""In which order streams and kernels run, and which whole tensors are in memory meanwhile.

First every stream that has nothing to do with kernels, copies before what is computed, in the order of the output
files, so that bytes move from the first moment on, while the libraries that compute are still being loaded; then the
kernels, each right after the streams that fill its inputs, so that whole tensors live for the shortest time. The
factors of a low-rank product are filled right before the stream that it is added to. The streams that fill the weights
of the next kernel may run beside one, not after it::

    streams  ├ layer 0 ┤├ layer 1 ┤├ layer 2 ┤
    kernels             ├ layer 0 ┤├ layer 1 ┤├ layer 2 ┤
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise

from planner.expr import Expr, Opaque
from planner.streams import Stream, result_of

Node = Stream | Opaque
"""What is done at a time: a stream, or a kernel's run."""


def in_order(
    streams: Sequence[Stream], kernels: Sequence[Opaque], buffers: Mapping[Expr, int], beside: bool
) -> Iterator[tuple[Node, Opaque | None]]:
    """Streams and kernel runs, each after what it depends on, and with the kernel that runs during it.

    `streams` are in the output's order. `beside`: kernels run beside streams that fill the weights of the next one.
    """
    of_result: dict[Opaque, list[Stream]] = defaultdict(list)
    for stream in streams:
        if (result := result_of(stream.root)) is not None:
            of_result[result].append(stream)
    feeding: dict[int, list[Stream]] = defaultdict(list)
    for stream in streams:
        for buffer in stream.buffers():
            feeding[buffer].append(stream)
    done: set[Stream] = set()

    def with_factors(stream: Stream) -> Iterator[Stream]:
        for needed in (*(feeder for buffer in stream.factors() for feeder in feeding[buffer]), stream):
            if needed not in done:
                done.add(needed)
                yield needed

    independent = [s for s in streams if not s.buffers() and result_of(s.root) is None]

    def after(*streams: Stream) -> Iterator[tuple[Stream, None]]:
        for stream in streams:
            for each in with_factors(stream):
                yield each, None

    yield from after(*sorted(independent, key=Stream.computes))
    following = _next_with_weights(kernels) if beside else {}
    for kernel in kernels:
        for whole in kernel.inputs:
            yield from after(*(feeding[buffers[whole]] if whole in buffers else ()))
        yield kernel, kernel
        for weight in following[kernel].weights if kernel in following else ():
            for stream in feeding[buffers[weight]]:
                if not stream.factors():
                    yield from ((each, kernel) for each in with_factors(stream))
        yield from after(*of_result[kernel])


def _next_with_weights(kernels: Sequence[Opaque]) -> dict[Opaque, Opaque]:
    """For each kernel, the first one after it that has weights, if there is one."""
    following: dict[Opaque, Opaque] = {}
    for kernel, after in reversed(list(pairwise(kernels))):
        if after.weights or after in following:
            following[kernel] = after if after.weights else following[after]
    return following


def uses_of(order: Sequence[Node], running: Sequence[Opaque | None], buffers: Mapping[Expr, int]) -> Iterator[set[int]]:
    """The buffers that must be there during each step. What runs beside each other counts as one."""
    for kernel, nodes in groupby(zip(order, running, strict=True), key=lambda pair: pair[1]):
        used = [_used(node, buffers) for node, _ in nodes]
        yield from used if kernel is None else [set().union(*used)] * len(used)


def _used(node: Node, buffers: Mapping[Expr, int]) -> set[int]:
    if isinstance(node, Opaque):
        return {buffers[expr] for expr in (*node.inputs, node) if expr in buffers}
    result = result_of(node.root)
    return node.buffers() | set(node.factors()) | (set() if result is None else {buffers[result]})


def last_uses(uses: Sequence[set[int]]) -> list[tuple[int, ...]]:
    """For each step, the buffers that no later step uses."""
    seen: set[int] = set()
    frees: list[tuple[int, ...]] = []
    for used in reversed(uses):
        frees.append(tuple(sorted(used - seen)))
        seen |= used
    return frees[::-1]


def held_nbytes(
    running: Sequence[Opaque | None],
    uses: Sequence[set[int]],
    frees: Sequence[tuple[int, ...]],
    buffer_nbytes: Sequence[int],
) -> Iterator[int]:
    """Bytes of whole tensors, workspace and one block during each step."""
    alive: set[int] = set()
    nbytes = 0
    for kernel, used, freed in zip(running, uses, frees, strict=True):
        nbytes += sum(buffer_nbytes[buffer] for buffer in used - alive)
        alive |= used
        yield nbytes + (0 if kernel is None else kernel.workspace_nbytes + kernel.block_nbytes)
        alive -= set(freed)
        nbytes -= sum(buffer_nbytes[buffer] for buffer in freed)
