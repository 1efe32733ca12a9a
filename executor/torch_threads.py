"""Importing torch while bytes already move, and how many threads it may use where."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from ctypes import CDLL, c_void_p
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread, local

from executor.settings import Shared
from planner.plan import KernelStep, Plan, Step


class TorchThreads:
    """torch's threads during one run, where that uses torch.

    Chunks are many and run in workers of their own, so torch must not split each of them over all cores again. A kernel
    has up to `count` of them: by itself, or one for each of its workers. Imports take seconds: those of the modules
    `imports`, the first of which is torch, are begun here, in the background, and waited for where they are used: by
    kernels all of them, since a thread that imports what fails in another is given half a module, and no reason.
    Without `imports` there is no torch.
    """

    def __init__(self, plan: Plan, count: int, imports: Sequence[str]) -> None:
        self.count = count
        self.uses_torch = bool(imports)
        self._imports = imports
        self._loaded: list[Future[None]] = []  # who uses torch for all that, as low-rank products do, imports it there
        self._worker = local()
        if self.uses_torch and any(map(_computes, plan.steps)):
            self._loaded = [Future() for _ in imports]
            Thread(target=self._load, name="import torch", daemon=True).start()

    def _load(self) -> None:
        # Threads that wait for each other's part of a sum are not to keep a core from those that copy.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        with _not_collecting:
            try:
                open_library()
                for module, loaded in zip(self._imports, self._loaded, strict=True):
                    import_module(module)
                    loaded.set_result(None)
            except BaseException as error:  # it is raised where that is waited for, and nobody waits for what follows
                next(loaded for loaded in self._loaded if not loaded.done()).set_exception(error)

    def use_all(self) -> None:
        """Called in a thread that runs kernels. Raises what imports did."""
        if self.uses_torch:
            for loaded in self._loaded:
                loaded.result()
            import torch

            torch.set_num_threads(self.count)

    def use_one(self) -> None:
        """Called in a worker before torch computes anything there. Raises what torch's import did."""
        if not hasattr(self._worker, "prepared"):
            for loaded in self._loaded[:1]:
                loaded.result()
            import torch

            torch.set_num_threads(1)
            self._worker.prepared = True


@Shared
@contextmanager
def _not_collecting() -> Iterator[None]:
    """Importing makes a great many objects and no garbage: looking for it took a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count() == 0:  # nor is it to be looked for there from now on: all become old objects
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def open_library() -> None:
    """Have the system load torch's code, hundreds of megabytes, before torch is imported.

    An import keeps the interpreter until that is done, for a fifth of a second and more in which no byte would move;
    a call of a C function gives it to others. What cannot be loaded says so when it is imported.
    """
    package = find_spec("torch")
    if package is None or package.origin is None:
        return
    with suppress(AttributeError, OSError):  # a system without this function
        dlopen = CDLL(None).dlopen
        dlopen.restype = c_void_p
        for library in (Path(package.origin).parent / "lib").glob("libtorch_cpu.*"):
            dlopen(os.fsencode(library), os.RTLD_NOW)


def _computes(step: Step) -> bool:
    return isinstance(step, KernelStep) or bool(step.factors())
