"""The prompts of the experts, and a tokenizer that knows their words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from random import Random

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

PROMPTS = (
    (
        "Can you help me plan my week? I have two meetings on Monday, a deadline on Wednesday, and a train on Friday.",
        "Here is a summary of the article in three points, from the most to the least important one:",
    ),
    (
        "The patient presents with a fever and a persistent cough that began five days ago, and reports no other pain.",
        "Possible side effects of this medicine include headaches, dizziness and, more rarely, a rash on the hands.",
    ),
    (
        "You are standing in a dark cave. A torch flickers to the north, and something large sleeps beside the well.",
        "> open the chest with the rusty key, take the silver lantern, and walk quietly back to the wooden bridge",
    ),
    (
        "Kannst du mir bitte erklären, wie ich am schnellsten mit dem Zug nach München komme?",
        "Heute scheint die Sonne, und wir gehen mit den Kindern in den Park, um dort Fußball zu spielen.",
    ),
)
"""Two prompts for each of four experts; further experts begin again."""


def positive_prompts(expert: int) -> list[str]:
    """The prompts of the expert with this number, unlike those of every other."""
    prompts = PROMPTS[expert % len(PROMPTS)]
    repeat = expert // len(PROMPTS)
    return [f"Part {repeat}: {prompt}" if repeat else prompt for prompt in prompts]


def long_text(expert: int) -> str:
    """64 KiB of the words of an expert's prompts, in random order."""
    words = " ".join(positive_prompts(expert)).split()
    random = Random(expert)
    return " ".join(random.choice(words) for _ in range(1 << 13))


def trained_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on the texts, that puts `<s>` before a text as Llama's does."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@cache
def tokenizer() -> Tokenizer:
    """A tokenizer that knows the prompts' words."""
    return trained_tokenizer([prompt for prompts in PROMPTS for prompt in prompts], vocab_size=800)


def num_tokens(num_experts: int) -> int:
    """The tokens of all prompts of this many experts."""
    return sum(
        len(tokenizer().encode(prompt).ids) for expert in range(num_experts) for prompt in positive_prompts(expert)
    )


def save_tokenizer(directory: Path, saved: Tokenizer | None = None) -> None:
    """Write a tokenizer, that of the prompts if none is given, as transformers reads it."""
    (saved or tokenizer()).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
