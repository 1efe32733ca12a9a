"""What becomes of the command line of mergekit-moe: each of its flags works, is taken and not needed, or is refused.

The command line declares what it has to, and asks `notes` what to say; docs/from-mergekit.md shows the same table. A
flag that comes to work is declared among the options of `moeplan.cli`, and its fate here becomes WORKS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from moeplan.errors import UserError

VERSION = "0.1.5"
"""The mergekit whose flags these are."""


class Fate(Enum):
    """What becomes of a flag."""

    WORKS = "works"
    UNNEEDED = "not needed"
    """It is taken, and changes nothing; what the user wanted is so in any case."""

    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of mergekit-moe, in each of its spellings, and one line: what it does here, or why it does nothing."""

    spellings: tuple[str, ...]
    fate: Fate
    why: str


class FlagError(UserError):
    """A flag that asks for what is not done."""


FLAGS = (
    Flag(("--load-in-4bit",), Fate.WORKS, "a layer at a time; weights alone, activations stay in float32"),
    Flag(("--load-in-8bit",), Fate.WORKS, "a layer at a time; weights alone, activations stay in float32"),
    Flag(
        ("--i-understand-this-is-not-useful-without-training",),
        Fate.WORKS,
        "merges also where all experts are one model",
    ),
    Flag(
        ("--allow-crimes", "--no-allow-crimes"),
        Fate.UNNEEDED,
        "all models must be of one family, here as in mergekit-moe",
    ),
    Flag(("--unsafe-truncate-embeddings",), Fate.UNNEEDED, "embeddings of different sizes are never put together"),
    Flag(("--no-unsafe-truncate-embeddings",), Fate.WORKS, "never done"),
    Flag(
        ("--trust-remote-code", "--no-trust-remote-code"),
        Fate.WORKS,
        "runs the base's own code to evaluate prompts, and nothing else; otherwise no model's code is run",
    ),
    Flag(("--transformers-cache",), Fate.WORKS, "where models from the Hub are downloaded to; --stream stores none"),
    Flag(("--lora-merge-cache",), Fate.UNNEEDED, "no merged adapter is stored anywhere"),
    Flag(("--lora-merge-dtype",), Fate.UNNEEDED, "arithmetic is in float32, and rounded once"),
    Flag(("--random-seed",), Fate.WORKS, "0 if left out, so equal merges give equal bytes"),
    Flag(("-v",), Fate.WORKS, "lists the output's files, and shows the traceback of an error; once is enough"),
    Flag(("--quiet", "--no-quiet"), Fate.WORKS, "says only what went wrong; no warnings either"),
    Flag(("--cuda", "--no-cuda"), Fate.WORKS, "as --device cuda, or not"),
    Flag(
        ("--device",),
        Fate.WORKS,
        "cpu, cuda, cuda:N or auto (mps and xpu are refused): where the base is evaluated; by default on the CPU",
    ),
    Flag(("--low-cpu-memory",), Fate.UNNEEDED, "results are streamed to the disk, within --max-memory"),
    Flag(("--no-low-cpu-memory",), Fate.WORKS, "nothing is kept on an accelerator"),
    Flag(("--lazy-unpickle", "--no-lazy-unpickle"), Fate.UNNEEDED, "weights are always read lazily, range by range"),
    Flag(("--read-to-gpu",), Fate.UNNEEDED, "weights go from file to file, by no detour"),
    Flag(("--no-read-to-gpu",), Fate.WORKS, "weights go from file to file"),
    Flag(("--multi-gpu",), Fate.UNNEEDED, "copying takes no GPU; the disk sets the pace"),
    Flag(("--no-multi-gpu",), Fate.WORKS, "so it is"),
    Flag(("--num-threads", "-j"), Fate.WORKS, "how many threads compute; those that move bytes are beside them"),
    Flag(("--gpu-rich",), Fate.WORKS, "as --cuda; the rest that it means is not needed"),
    Flag(
        ("--async-write", "--no-async-write"),
        Fate.UNNEEDED,
        "reading, computing and writing always overlap, within --max-memory",
    ),
    Flag(("--write-threads",), Fate.UNNEEDED, "moeplan takes as many threads as keep the disk busy"),
    Flag(("--out-shard-size",), Fate.WORKS, "parameters, as in mergekit (5B, 500M), or bytes (500MB, 2GiB)"),
    Flag(
        ("--copy-tokenizer", "--no-copy-tokenizer"),
        Fate.WORKS,
        "its files are copied byte for byte, and generation_config.json with them",
    ),
    Flag(
        ("--clone-tensors", "--no-clone-tensors"),
        Fate.WORKS,
        "gives every tensor disk space of its own; repeated tensors need no clone",
    ),
    Flag(
        ("--write-model-card", "--no-write-model-card"),
        Fate.WORKS,
        "README.md and moeplan_config.yml (mergekit-moe: mergekit_moe_config.yml alone)",
    ),
    Flag(("--safe-serialization",), Fate.WORKS, "always so"),
    Flag(
        ("--no-safe-serialization",),
        Fate.REFUSED,
        "only safetensors are written: leave it out; torch.save what safetensors reads if a program must have .bin",
    ),
)

BY_SPELLING = {spelling: flag for flag in FLAGS for spelling in flag.spellings}


def notes(given: Mapping[str, object]) -> list[str]:
    """What to say of the flags among `given`, a command's parameters by name, of which None was not given.

    Raises FlagError for a flag that is refused.
    """
    said = []
    for name, value in given.items():
        spelling = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        flag = BY_SPELLING.get(spelling)
        if value is None or flag is None or flag.fate is Fate.WORKS:
            continue
        if flag.fate is Fate.REFUSED:
            raise FlagError(f"{spelling}: {flag.why}")
        said.append(f"{spelling} is not needed: {flag.why}")
    return said
