"""The table's rows, as data: which program makes the routers, and from what."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from benchmarks.contenders import Program
from benchmarks.routing.settings import VARIANTS


class Given(Enum):
    """What of an expert its routers are made from."""

    NOTHING = "nothing"
    BEGINNINGS = "beginnings of paragraphs and definitions"
    PASSAGES = "passages that begin anywhere"
    FILE = "a file of all the text that the expert was trained on"
    SAMPLES = "samples of the expert itself"


@dataclass(frozen=True, slots=True)
class Row:
    """One way to get routers.

    `key` is what --only takes. `equal`: every expert gets the same weight, whatever the routers say. `seeded`: it
    depends on the seed.
    """

    key: str
    name: str
    program: Program
    gate_mode: str
    given: Given = Given.NOTHING
    backbone: str = "base"
    equal: bool = False
    seeded: bool = True
    variants: tuple[str, ...] = VARIANTS


MERGEKIT_RANDOM = Row("mergekit-random", "mergekit-moe random", Program.MERGEKIT, "random")
MERGEKIT_HIDDEN = Row(
    "mergekit-hidden", "mergekit-moe hidden, 8 prompts of 32 tokens", Program.MERGEKIT, "hidden", Given.BEGINNINGS
)
EQUAL = Row(
    "equal",
    "all four experts at equal weight, no router",
    Program.MOEPLAN,
    "random",
    equal=True,
    seeded=False,
)
HIDDEN = Row("hidden", "moeplan hidden, the same 8 prompts", Program.MOEPLAN, "hidden", Given.BEGINNINGS)
RIDGE = Row("ridge", "moeplan ridge, the same 8 prompts", Program.MOEPLAN, "ridge", Given.BEGINNINGS)
RIDGE_PASSAGES = Row(
    "ridge-passages",
    "moeplan ridge, 8 random passages of 32 tokens",
    Program.MOEPLAN,
    "ridge",
    Given.PASSAGES,
)
RIDGE_FILE = Row("ridge-file", "moeplan ridge, 4096 tokens of a file", Program.MOEPLAN, "ridge", Given.FILE)
RIDGE_SAMPLES = Row(
    "ridge-samples",
    "moeplan ridge, 16 samples of each expert, no prompts",
    Program.MOEPLAN,
    "ridge",
    Given.SAMPLES,
)
RIDGE_AVERAGE = Row(
    "ridge-average",
    "moeplan ridge, 4096 tokens of a file, averaged backbone",
    Program.MOEPLAN,
    "ridge",
    Given.FILE,
    backbone="average",
    variants=VARIANTS[1:],
)

ROWS = (
    MERGEKIT_RANDOM,
    MERGEKIT_HIDDEN,
    EQUAL,
    HIDDEN,
    RIDGE,
    RIDGE_PASSAGES,
    RIDGE_FILE,
    RIDGE_SAMPLES,
    RIDGE_AVERAGE,
)
