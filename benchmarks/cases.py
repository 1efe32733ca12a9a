"""What is measured, as data: which models are merged how, and who takes part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.contenders import (
    CAP,
    COPY_CAPPED,
    CP,
    CP_COPYING,
    HIDDEN_7B_CAPPED,
    HIDDEN_70B_CAPPED,
    MATMUL,
    READ_BASE,
    READ_FLOOR,
    RIDGE_7B_CAPPED,
    UNCHECKED,
    WRITE_FLOOR,
    Contender,
    Program,
    mergekit,
    moeplan,
)
from benchmarks.models import ITEMSIZE, Models
from benchmarks.shapes import LLAMA_1B, LLAMA_7B, LLAMA_70B, Shape

LIMIT_SECONDS = 1800.0


@dataclass(frozen=True, slots=True)
class Case:
    """Contenders that are run in turn, round by round, on the same models.

    `experts` are numbers of models; the base is model 0. The first contender that is moeplan is the reference: its
    output is what `cp` copies. `warm`: what a program reads is in the page cache when it starts; else it is not.
    `volume` is a file system to make for the case, on a loop device. `check_bytes` has the outputs of all moeplan
    contenders digested. `smoke`: part of the run on tiny models. A contender that stands there twice takes two turns a
    round.
    """

    name: str
    group: str
    about: str
    models: Models
    experts: tuple[int, ...]
    contenders: tuple[Contender, ...]
    warm: bool = False
    volume: str | None = None
    check_bytes: bool = False
    smoke: bool = True
    large: bool = False
    limit_seconds: float = LIMIT_SECONDS

    @property
    def reference(self) -> Contender:
        return next(contender for contender in self.contenders if contender.program is Program.MOEPLAN)

    @property
    def read_nbytes(self) -> int:
        """The bytes of all distinct source tensors that the merged model is made of."""
        shape = self.models.shape
        shared = shape.num_parameters - shape.num_mlp_parameters
        return (shared + len(set(self.experts)) * shape.num_mlp_parameters) * ITEMSIZE[self.models.dtype]

    @property
    def output_nbytes(self) -> int:
        """The bytes of all tensors of the merged model, in bfloat16."""
        shape, num_experts = self.models.shape, len(self.experts)
        shared = shape.num_parameters - shape.num_mlp_parameters
        routers = num_experts * shape.num_layers * shape.hidden_size
        return (shared + num_experts * shape.num_mlp_parameters + routers) * ITEMSIZE["bfloat16"]

    @property
    def is_copied(self) -> bool:
        """Whether the reference's output has to stay until it has been copied."""
        return any(contender.program is Program.CP for contender in self.contenders)

    @property
    def volume_nbytes(self) -> int:
        """What a file system has to hold for the case: the sources and all outputs that are there at a time."""
        return self.models.disk_nbytes + (1 + self.is_copied) * self.output_nbytes

    @property
    def disk_nbytes(self) -> int:
        """What of that takes space on the disk: of sparse files nothing, as long as nothing is copied."""
        return 0 if self.models.sparse else self.volume_nbytes

    def tiny(self) -> Case:
        """The same case with models of less than a megabyte, and a turn a round for each contender."""
        return replace(self, models=self.models.tiny(), contenders=tuple(dict.fromkeys(self.contenders)))


CLOWN_CAR = Models(LLAMA_1B, 4)
MEMORY_CAPS = ("104MiB", "120MiB", CAP)
"""100 MiB is the least that 4 × 1.1B can be merged in; from 131 MiB on, a cap leaves as many buffers as none does."""

PLANNED_EXPERTS = (2, 8, 32, 128)
PLANNING_TURNS = 3
"""Turns a round: they are short, and how the curve bends is a difference of differences."""


def growth_name(shape: Shape, layers: int, gate_mode: str = "random") -> str:
    """The name of the case of a model cut down to so many layers."""
    kind = "" if gate_mode == "random" else f"{gate_mode}-"
    return f"growth-{kind}{shape.name.lower()}-{layers}"


def _growth(shape: Shape, layers: int, *contenders: Contender, smoke: bool = False) -> Case:
    gate_mode = contenders[0].gate_mode
    return Case(
        growth_name(shape, layers, gate_mode),
        "growth",
        f"2 × {shape.name} with {layers} layers, {gate_mode} gates, under a fixed cap",
        Models(shape.with_layers(layers), 2),
        (0, 1),
        contenders,
        check_bytes=len(contenders) > 1,
        smoke=smoke,
    )


def _on_volume(kind: str, title: str) -> tuple[Case, Case]:
    return (
        Case(
            f"{kind}-clown-car",
            kind,
            f"4 × 1.1B bf16 on {title}",
            CLOWN_CAR,
            (0, 1, 2, 3),
            (WRITE_FLOOR, READ_FLOOR, moeplan(), moeplan("--clone-tensors"), CP, CP_COPYING),
            volume=kind,
            check_bytes=True,
            smoke=kind == "xfs",
        ),
        Case(
            f"{kind}-8x7b",
            kind,
            f"8 × 7B on {title}, from sparse files",
            Models(LLAMA_7B, 8, sparse=True),
            tuple(range(8)),
            (moeplan(),),
            volume=kind,
            smoke=kind == "xfs",
            limit_seconds=30.0,  # three times the target; without reflinks it would fill the disk
        ),
    )


def _planning(num_experts: int) -> Case:
    return Case(
        f"plan-70b-{num_experts}",
        "planning",
        f"--plan, {num_experts} experts, each another 70B (sparse files with true headers)",
        Models(LLAMA_70B, max(PLANNED_EXPERTS), sparse=True),
        tuple(range(num_experts)),
        (moeplan("--plan"),) * PLANNING_TURNS,
        smoke=num_experts == PLANNED_EXPERTS[-1],
    )


CASES: tuple[Case, ...] = (
    Case(
        "random",
        "clown-car",
        "4 × 1.1B bf16, random gates: the copy path, warm",
        CLOWN_CAR,
        (0, 1, 2, 3),
        (WRITE_FLOOR, moeplan(), CP, mergekit()),
        warm=True,
    ),
    Case(
        "cold",
        "clown-car",
        "the same, cold: all is read from the disk",
        CLOWN_CAR,
        (0, 1, 2, 3),
        (WRITE_FLOOR, READ_FLOOR, moeplan(), CP, mergekit()),
        smoke=False,
    ),
    Case(
        "checks",
        "clown-car",
        "4 × 1.1B bf16, warm: what checksums and the journal cost",
        CLOWN_CAR,
        (0, 1, 2, 3),
        (moeplan(), UNCHECKED, UNCHECKED, moeplan()),  # so that what comes first has no advantage
        warm=True,
    ),
    Case(
        "cheap_embed",
        "clown-car",
        "4 × 1.1B bf16, cheap_embed gates, 8 prompts, warm",
        CLOWN_CAR,
        (0, 1, 2, 3),
        (WRITE_FLOOR, moeplan(gate_mode="cheap_embed"), mergekit("cheap_embed")),
        warm=True,
    ),
    Case(
        "hidden",
        "clown-car",
        "4 × 1.1B bf16, hidden gates, 8 prompts, warm",
        CLOWN_CAR,
        (0, 1, 2, 3),
        (WRITE_FLOOR, READ_BASE, MATMUL, moeplan(), moeplan(gate_mode="hidden"), mergekit("hidden")),
        warm=True,
    ),
    Case(
        "memory",
        "memory",
        "4 × 1.1B bf16 under several memory caps",
        CLOWN_CAR,
        (0, 1, 2, 3),
        (WRITE_FLOOR, READ_FLOOR, moeplan(), *(moeplan("--max-memory", cap) for cap in MEMORY_CAPS)),
        check_bytes=True,
    ),
    Case(
        "packed",
        "packed",
        "4 × 1.1B bf16 in the packed layout",
        CLOWN_CAR,
        (0, 1, 2, 3),
        (WRITE_FLOOR, READ_FLOOR, moeplan("--expert-layout", "packed"), CP),
    ),
    Case(
        "upcycling",
        "upcycling",
        "8 × the same 1.1B bf16",
        Models(LLAMA_1B, 1),
        (0,) * 8,
        (WRITE_FLOOR, READ_FLOOR, moeplan(), CP, mergekit()),
    ),
    Case(
        "f32",
        "f32",
        "4 × 1.1B, f32 to bf16",
        Models(LLAMA_1B, 4, dtype="float32"),
        (0, 1, 2, 3),
        (WRITE_FLOOR, READ_FLOOR, moeplan(), CP, mergekit()),
    ),
    _growth(LLAMA_7B, 2, COPY_CAPPED),
    _growth(LLAMA_7B, 4, COPY_CAPPED),
    _growth(LLAMA_7B, 4, HIDDEN_7B_CAPPED),
    _growth(LLAMA_7B, 8, COPY_CAPPED, smoke=True),
    _growth(LLAMA_7B, 8, HIDDEN_7B_CAPPED),
    _growth(LLAMA_70B, 2, HIDDEN_70B_CAPPED),
    _growth(LLAMA_70B, 4, moeplan(), COPY_CAPPED),  # tensors of 470 MB
    _growth(LLAMA_70B, 4, HIDDEN_70B_CAPPED),
    *_on_volume("xfs", "XFS"),
    *_on_volume("btrfs", "Btrfs"),
    Case(
        "plan-8x7b",
        "planning",
        "--plan, 8 × 7B (sparse files with true headers)",
        Models(LLAMA_7B, 8, sparse=True),
        tuple(range(8)),
        (moeplan("--plan"),),
        smoke=False,
    ),
    *(_planning(num_experts) for num_experts in PLANNED_EXPERTS),
    Case(
        "ridge-7b-4",
        "ridge",
        "4 experts of 7B with 4 layers, ridge gates from 4096 tokens each, under a fixed cap",
        Models(LLAMA_7B.with_layers(4), 2),
        (0, 1, 0, 1),
        (RIDGE_7B_CAPPED,),
        large=True,  # in minutes
    ),
    Case(
        "large",
        "large",
        "8 × 7B bf16, real data",
        Models(LLAMA_7B, 8),
        tuple(range(8)),
        (WRITE_FLOOR, READ_FLOOR, moeplan(), CP, mergekit(), HIDDEN_7B_CAPPED),
        large=True,
    ),
)
"""All cases. Neighbours of equal models share their sources."""
