"""Who takes part: moeplan, its peers, and what bounds them all."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Program(Enum):
    """What a contender runs."""

    WRITE_FLOOR = "write as many bytes as the output has, by direct I/O"
    READ_FLOOR = "read as many bytes as the merge reads, by direct I/O"
    READ_BASE = "read the base model once, by direct I/O"
    MATMUL = "multiply the prompts by the base's matrices"
    CP = "cp"
    MERGEKIT = "mergekit-moe"
    MOEPLAN = "moeplan"
    UNCHECKED = "moeplan without checksums and journal"


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do a case's work, or a part of it that bounds all of them. `options` are for the command line."""

    name: str
    program: Program
    gate_mode: str = "random"
    options: tuple[str, ...] = ()


def moeplan(*options: str, gate_mode: str = "random") -> Contender:
    """moeplan with these options, named as one would type it."""
    named = () if gate_mode == "random" else (gate_mode,)
    return Contender(" ".join(("moeplan", *named, *options)), Program.MOEPLAN, gate_mode, options)


def mergekit(gate_mode: str = "random") -> Contender:
    """The peer, with its defaults."""
    named = () if gate_mode == "random" else (gate_mode,)
    return Contender(" ".join(("mergekit-moe", *named)), Program.MERGEKIT, gate_mode)


WRITE_FLOOR = Contender("write floor", Program.WRITE_FLOOR)
READ_FLOOR = Contender("read floor", Program.READ_FLOOR)
READ_BASE = Contender("read base", Program.READ_BASE)
MATMUL = Contender("matmul", Program.MATMUL)
LIMITS = (WRITE_FLOOR, READ_FLOOR, READ_BASE, MATMUL)
"""Those that bound the others; their names need an explanation."""

CP = Contender("cp", Program.CP)
CP_COPYING = Contender("cp --reflink=never", Program.CP, options=("--reflink=never",))

UNCHECKED = Contender("unchecked", Program.UNCHECKED)

CAP = "384MiB"

COPY_CAPPED = moeplan("--max-memory", CAP)
HIDDEN_7B_CAPPED = moeplan("--max-memory", "1GiB", gate_mode="hidden")
HIDDEN_70B_CAPPED = moeplan("--max-memory", "1.25GiB", gate_mode="hidden")
RIDGE_7B_CAPPED = moeplan("--max-memory", "2GiB", gate_mode="ridge")
