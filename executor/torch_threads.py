"""Importing torch while bytes already move, and how many threads it may use where."""

from __future__ import annotations

from threading import Event, Thread, local

from planner.plan import KernelStep, Plan


class TorchThreads:
    """torch's threads during one run, where the plan computes anything at all.

    Chunks are many and run in workers of their own, so torch must not split each of them over all cores again. A kernel
    runs alone, in the main thread, and has all of them. torch's import takes a second or two: it is begun here, in the
    background, and waited for when something is computed.
    """

    def __init__(self, plan: Plan) -> None:
        self._all = 1
        self._loaded = Event()
        self._worker = local()
        if any(isinstance(step, KernelStep) or any(branch.ops for branch in step.branches) for step in plan.steps):
            Thread(target=self._load, name="import torch", daemon=True).start()

    def _load(self) -> None:
        try:
            import torch

            self._all = torch.get_num_threads()
        finally:
            self._loaded.set()  # a torch that cannot be imported says so where it is used

    def use_all(self) -> None:
        """Called in the main thread before a kernel."""
        self._loaded.wait()
        import torch

        torch.set_num_threads(self._all)

    def use_one(self) -> None:
        """Called in a worker before anything is computed there."""
        if not hasattr(self._worker, "prepared"):
            self._loaded.wait()
            import torch

            torch.set_num_threads(1)
            self._worker.prepared = True
