"""Text as tokens: what models are trained on and judged by, and the prompts that routers are made from."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.prompts import trained_tokenizer
from benchmarks.routing.settings import Settings
from benchmarks.routing.texts import Text, TooLittleTextError

Ids = NDArray[np.int64]

BOS = 1
SEED = 30_000

BEGINNINGS = re.compile(r"\n\n\s*")
"""What prompts that one would choose follow: they begin a paragraph or a definition."""

ANYWHERE = re.compile(r"\s+")
"""What passages follow: they begin with any word."""

MAX_TOKEN_CHARS = 16
"""A prompt's tokens are longer than this in the mean of no text."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A domain as tokens.

    `train` [num_tokens] is all that models are trained on; `windows` [num_windows, window], each with the BOS token
    first, what they are judged by.
    """

    train: Ids
    windows: Ids


@dataclass(frozen=True, slots=True)
class Corpus:
    """All domains as text and as tokens, and the one tokenizer of all models."""

    tokenizer: Tokenizer
    texts: tuple[Text, ...]
    tokens: tuple[Tokens, ...]


def corpus(texts: tuple[Text, ...], settings: Settings) -> Corpus:
    """The tokenizer is trained on what models are trained on."""
    tokenizer = trained_tokenizer((block for text in texts for block in text.train), settings.vocab_size)
    return Corpus(tokenizer, texts, tuple(_tokens(text, tokenizer, settings) for text in texts))


def _tokens(text: Text, tokenizer: Tokenizer, settings: Settings) -> Tokens:
    length = settings.window - 1
    windows = [
        ids[start : start + length]
        for ids in (_encoded(tokenizer, block) for block in text.held_out)
        for start in range(0, len(ids) - length + 1, length)
    ]
    if len(windows) < settings.num_windows:
        raise TooLittleTextError(f"{text.domain}: {settings.num_windows} windows are needed, {len(windows)} are there")
    chosen = sorted(np.random.default_rng(SEED).permutation(len(windows))[: settings.num_windows])
    return Tokens(
        np.concatenate([_encoded(tokenizer, block) for block in text.train]),
        with_bos(np.stack([windows[number] for number in chosen])),
    )


def _encoded(tokenizer: Tokenizer, text: str) -> Ids:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def with_bos(rows: Ids) -> Ids:
    """[rows, tokens] with the BOS token before each row."""
    return np.pad(rows, ((0, 0), (1, 0)), constant_values=BOS)


def prompts(text: Text, tokenizer: Tokenizer, settings: Settings, seed: int, after: re.Pattern[str]) -> list[str]:
    """Distinct texts of `prompt_tokens` tokens that follow `after` in what models are trained on."""
    places = [(block, match.end()) for block in text.train for match in after.finditer(block)]
    found: list[str] = []
    for number in np.random.default_rng(SEED + 1 + seed).permutation(len(places)):
        block, start = places[number]
        cut = block[start : start + MAX_TOKEN_CHARS * settings.prompt_tokens]
        ids = _encoded(tokenizer, cut)[: settings.prompt_tokens].tolist()
        prompt = tokenizer.decode(ids)
        # A text that is cut out of another may become other tokens; all prompts are to be equally long.
        if len(ids) == settings.prompt_tokens and _encoded(tokenizer, prompt).tolist() == ids and prompt not in found:
            found.append(prompt)
        if len(found) == settings.num_prompts:
            return found
    raise TooLittleTextError(f"{text.domain}: {settings.num_prompts} prompts are needed, {len(found)} were found")
