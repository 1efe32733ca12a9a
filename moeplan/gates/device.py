"""Where the base is evaluated: on the CPU, or on a GPU, whose free memory is a budget of its own.

Weights come from the disk to the host's memory in any case, a block at a time, within the host's budget. A GPU holds
two blocks of them and what they give, the prompts' activations, and the vectors of one layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeVar

from moeplan.errors import MoeplanWarning
from moeplan.memory import MIB
from moeplan.options import OptionError, Options, memory_nbytes

BLOCKS = 2
"""How many blocks of weights are on a GPU at a time: one is multiplied while the next one comes."""

LIBRARIES_NBYTES = 256 * MIB
"""What is left beside that for cuBLAS, which has a workspace for each thread (32 MiB on an H100; there are three), and
for what torch's allocator rounds."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Device:
    """A device, as torch names it: `cpu`, or `cuda:N`; of a GPU also how much of its memory may be taken."""

    name: str = "cpu"
    budget_nbytes: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    def check(self, needed_nbytes: int) -> None:
        """Raises DeviceMemoryError where the budget is less than what it takes."""
        if self.is_gpu and needed_nbytes > self.budget_nbytes:
            raise DeviceMemoryError(self, needed_nbytes)

    @contextmanager
    def within_budget(self) -> Iterator[None]:
        """Within, torch takes no more of a GPU's memory than the budget, beside what it has; what asks for more
        fails."""
        if not self.is_gpu:
            yield
            return

        import torch

        most = torch.cuda.memory_reserved(self.name) + self.budget_nbytes
        total = torch.cuda.get_device_properties(self.name).total_memory
        torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), self.name)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.name)


CPU = Device()


class DeviceMemoryError(OptionError):
    """The prompts take more of a GPU's memory than may be taken; `why` says no more than that."""

    def __init__(self, device: Device, needed_nbytes: int) -> None:
        needed = -(-needed_nbytes // MIB)
        budget = device.budget_nbytes // MIB
        self.why = f"{budget} MiB of its memory may be taken, and evaluating the prompts takes {needed} MiB"
        super().__init__(
            f"--device {device.name}: {self.why}; give --max-device-memory {needed}MiB where it has that free, shorter "
            "prompts, or --device cpu"
        )


def evaluating(options: Options, plan: Callable[[Device], T]) -> tuple[Device, T]:
    """The device that `options` ask for, and what `plan` plans on it. Where any will do, and the GPU has too little
    memory, it is the CPU. Raises what `find` and `plan` do."""
    device = find(options.device, options.max_device_memory)
    try:
        return device, plan(device)
    except DeviceMemoryError as error:
        if options.device != "auto":
            raise
        warnings.warn(f"--device auto: not {device.name}: {error.why}; the CPU does it", MoeplanWarning, stacklevel=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeplanWarning)  # what there is to say has been said
        return CPU, plan(CPU)


def find(name: str, max_memory: str | int | None) -> Device:
    """The device that `--device` names, with the budget of `--max-device-memory`: by default what is free there.

    torch is imported where it may have a GPU, and one is asked for. Raises OptionError where it has none of that name.
    """
    if name == "cpu":
        return CPU
    lacking = _lacking(name)
    if lacking is not None:
        if name == "auto":
            return CPU
        raise OptionError(f"--device {name}: {lacking}, or leave the option out, and the CPU does it")

    import torch

    index = int(name.partition(":")[2] or 0)
    try:
        one = torch.ones(1, 1, device=f"cuda:{index}")
        torch.mm(one, one)  # what CUDA's libraries take of either memory is taken now, where it is counted
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if name == "auto":
            warnings.warn(f"--device auto: not cuda:{index}: {reason}; the CPU does it", MoeplanWarning, stacklevel=3)
            return CPU
        raise OptionError(f"--device {name}: it cannot be used: {reason}; see what nvidia-smi says") from error
    budget = free if max_memory is None else memory_nbytes(max_memory, total, "--max-device-memory")
    return Device(f"cuda:{index}", min(budget, free))


def _lacking(name: str) -> str | None:
    """Why torch cannot use the GPU `name`, and what to do about it; None where it can."""
    installed = version("torch")
    install = "install one for your GPU (https://pytorch.org/get-started)"
    if installed.endswith("+cpu"):
        return f"the installed torch {installed} is built for the CPU alone; {install}"

    import torch

    if not torch.cuda.is_available():
        return f"the installed torch {installed} finds no GPU; see what nvidia-smi says, {install}"
    count, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if index >= count:
        return f"torch finds {count} GPU{'s' if count > 1 else ''}, numbered from 0; name one of them"
    return None
