"""What a merge is run with beside its config, and the sizes that people write: `2GiB`, `500MB`, `5B`, `50%`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from moeplan.errors import UserError

_NUMBER = r"\s*(\d{1,20}(?:\.\d{1,20})?)"  # no more digits than arithmetic can take

_BYTES = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _BYTES |= {f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}
_MEMORY = _BYTES | {letter: 1024**power for power, letter in enumerate("KMGT", 1)}  # as Docker and Slurm have it
_LEAST_NBYTES = 1 << 20
_MOST_THREADS = 4096  # of tens of thousands OpenMP crashes
_COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9}


class OptionError(UserError):
    """An option's value that cannot be understood."""


DECISIVE = (
    "out_shard_size",
    "expert_layout",
    "random_seed",
    "load_in_8bit",
    "load_in_4bit",
    "trust_remote_code",
    "device",
)
"""The options that the bytes of the output depend on."""

EVALUATION = ("load_in_8bit", "load_in_4bit", "device")
"""Those of them that do not matter where the base is not evaluated."""


def flag(name: str) -> str:
    """An option's name on the command line."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class Options:
    """How to merge. The bytes of the output depend on the `DECISIVE` options alone."""

    max_memory: str | int | None = None
    """The most memory that the process may have resident: bytes, `2GiB` or `2G`, `512MB`, or a share of all memory,
    `50%`. None: a safe share of what is available."""

    out_shard_size: str | int = "5B"
    """The largest output file: a number of parameters (`5B`, `500M`) or of bytes (`10GB`, `2GiB`)."""

    expert_layout: str | None = None
    """`separate`: one tensor an expert, under the classic names. `packed`: the fused tensors of transformers 5.
    None: the first that the family has, which is `separate` for all that every program reads."""

    random_seed: int = 0
    """Seeds the random gate modes, the noise, and which text of files and models is drawn."""

    copy_tokenizer: bool = True
    """Put the base's tokenizer, chat template and generation_config.json beside the weights."""

    write_model_card: bool = True
    """Put a model card, README.md, and the YAML file, moeplan_config.yml, beside the weights."""

    num_threads: int | None = None
    """How many threads compute; None: as many as there are cores for this process."""

    load_in_8bit: bool = False
    """Quantise the base to 8 bits, with bitsandbytes, to evaluate the prompts of hidden gates."""

    load_in_4bit: bool = False
    """The same with 4 bits."""

    device: str = "cpu"
    """Where the base is evaluated: `cpu`, `cuda`, `cuda:N`, or `auto`: a GPU if torch finds one with memory enough."""

    max_device_memory: str | int | None = None
    """The most memory to take of a GPU, as `max_memory` is written. None: what is free there."""

    trust_remote_code: bool = False
    """Run the modelling and tokenizer code that the base brings with it (`auto_map`), to evaluate prompts."""

    clone_tensors: bool = False
    """Give every tensor physical extents of its own, also where the file system could share them with the sources or
    among equal tensors. The bytes are the same."""

    check_sources: bool = False
    """Read everything twice, and compare: finds disks and memory that fail."""

    restart: bool = False
    """Throw away what an interrupted merge left, instead of going on with it."""

    overwrite: bool = False
    """Let the model take the place of one that is in the output directory. It stands until the new one is complete."""

    stream: bool = False
    """Read what is needed of models on the Hub straight into the output, instead of downloading them into the cache."""

    transformers_cache: str | Path | None = None
    """The directory that models from the Hub are downloaded into. None: huggingface_hub's own (`HF_HUB_CACHE`)."""

    def __post_init__(self) -> None:
        if self.random_seed < 0:
            raise OptionError(f"--random-seed: {self.random_seed} is below zero")
        if self.num_threads is not None and not 1 <= self.num_threads <= _MOST_THREADS:
            raise OptionError(f"--num-threads: {self.num_threads} is not from 1 to {_MOST_THREADS:,}")
        if self.load_in_8bit and self.load_in_4bit:
            raise OptionError("--load-in-8bit and --load-in-4bit: only one can be used at the same time")
        if not re.fullmatch(r"cpu|auto|cuda(:\d{1,3})?", self.device):
            raise OptionError(f"--device: {self.device!r} is none of cpu, cuda, cuda:N (such as cuda:1) and auto")
        if self.max_device_memory is not None:
            memory_nbytes(self.max_device_memory, 1, "--max-device-memory")

    @property
    def bits(self) -> int:
        """What the base is quantised to; 0: it is not."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else 0

    @property
    def threads(self) -> int:
        """How many threads compute. OMP_NUM_THREADS counts, as for torch."""
        if self.num_threads is not None:
            return self.num_threads
        given = os.environ.get("OMP_NUM_THREADS", "")
        return min(int(given), _MOST_THREADS) if given.isdecimal() and int(given) else cores()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_nbytes(text: str | int, total_nbytes: int, option: str = "--max-memory") -> int:
    """The bytes that a memory size means, on what has `total_nbytes`. Raises OptionError, which names `option`."""
    if isinstance(text, str) and (share := re.fullmatch(_NUMBER + r"\s*%\s*", text)):
        percent = float(share[1])
        if not 0 < percent <= 100:
            raise OptionError(f"{option}: {text} is not between 0% and 100%")
        return int(total_nbytes * percent / 100)
    nbytes = _parse(text, _MEMORY, option, "such as 2GiB, 512MB or 50%")
    if nbytes < _LEAST_NBYTES and (number := str(text).strip()).isdecimal():
        meant = f"{number}% or {number}GiB" if nbytes <= 100 else f"{number}MiB"
        raise OptionError(f"{option}: {number} without a unit is so many bytes; write {meant} if you mean that")
    return nbytes


def shard_nbytes(text: str | int, itemsize: int) -> int:
    """The bytes that a shard size means, where a parameter takes `itemsize` bytes. Raises OptionError.

    `5B` is five billion parameters, as in mergekit; bytes are spelled out (`5GB`).
    """
    example = "such as 5B (parameters), 500MB or 2GiB"
    if isinstance(text, str) and (count := re.fullmatch(_NUMBER + r"\s*([KMBkmb])\s*", text)):
        return _positive(int(float(count[1]) * _COUNTS[count[2].upper()]) * itemsize, text, "--out-shard-size", example)
    if isinstance(text, int) or text.strip().isdecimal():
        return _parse(text, {"": itemsize}, "--out-shard-size", example)
    return _parse(text, _BYTES, "--out-shard-size", example)


def _parse(text: str | int, units: dict[str, int], option: str, example: str) -> int:
    match = re.fullmatch(_NUMBER + r"\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in units:
        raise OptionError(f"{option}: {text!r} is not a size; write one {example}")
    return _positive(int(float(match[1]) * units[match[2].upper()]), text, option, example)


def _positive(value: int, text: str | int, option: str, example: str) -> int:
    if value <= 0:
        raise OptionError(f"{option}: {text!r} is not above zero; write a size {example}")
    return value
