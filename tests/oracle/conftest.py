"""Merges within a given budget, where the layers of the base are evaluated in a given form."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moeplan import planning
from moeplan.memory import CapError, MemoryCap
from planner.plan import KernelStep


@pytest.fixture
def within(monkeypatch, plan, merge) -> Callable[..., Path]:
    """`within(budget, form, ...)`: a merge with so many bytes for buffers, where layers are in that form.

    None: the least budget that works.
    """

    def run(budget: int | None, form: str, base: Path, experts: list[dict[str, Any]], **settings: Any) -> Path:
        def cap(_: Any, packages: tuple[str, ...], num_tensors: int) -> MemoryCap:
            return MemoryCap(budget, 0, packages)

        monkeypatch.setattr(planning, "memory_cap", cap)
        if budget is None:
            budget = 1
            with pytest.raises(CapError) as refused:
                plan(base, experts, **settings)
            budget = refused.value.__cause__.needed_nbytes
        planned = plan(base, experts, **settings).plan
        kernels = [step for step in planned.steps if isinstance(step, KernelStep)]
        assert {bool(step.streamed) for step in kernels if step.weights} == {form == "streamed"}
        assert (planned.reread_nbytes == 0) is (form == "resident")
        return merge(base, experts, **settings)

    return run


@pytest.fixture
def in_every_form(within) -> Callable[..., Iterator[Path]]:
    """`in_every_form(base, experts, **settings)`: merges that must be the same to the bit."""

    def run(*args: Any, **settings: Any) -> Iterator[Path]:
        for budget, form in ((None, "streamed"), (256 << 20, "resident")):
            for threads in (1, 4):
                yield within(budget, form, *args, num_threads=threads, **settings)

    return run
