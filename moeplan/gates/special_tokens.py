"""What the files beside tokenizer.json say of special tokens: which is BOS, and which are to be added.

transformers adds tokens to those of tokenizer.json where other files name more: fine-tunes that only learnt two tokens
of chat markup often keep the tokenizer.json of their base. All is as transformers 5 does it (`_from_pretrained` in
tokenization_utils_base.py, `TokenizersBackend.__init__`), but that a BOS token must be in the vocabulary, or be listed
with its id: one that is only named would get an id that no model was trained with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.places import CheckpointError, read_json
from moeplan.tokenizer_files import ADDED_TOKENS, MAX_READ_NBYTES, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG
from moeplan.untrusted_json import show

LLAMA_CLASSES, LLAMA_BOS = ("LlamaTokenizer", "LlamaTokenizerFast"), "<s>"
"""Where tokenizer_config.json does not speak of BOS, these classes of transformers have one, unless the tokenizer works
on bytes, which they do not (tokenization_auto.py, `_tokenizer_json_has_byte_level`)."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The keys of tokens that have a part to play, in transformers' order; others end in `_token`, too."""

ID = re.compile(r"[0-9]{1,18}")

AddedToken = Mapping[str, Any]
"""The arguments of `tokenizers.AddedToken`: `content`, and what is said of the `FLAGS`."""


@dataclass(frozen=True)
class SpecialTokens:
    """What is said of them: which is BOS, and in which file (the one that has the last word, None where there is none).

    `bos_of_class` is BOS where the files are silent and the tokenizer does not work on bytes. `listed` are to be added
    even where tokenizer.json says something else of them, `added` where it has none of that text; both in the order in
    which they get their ids. With `split` their text is like any.
    """

    bos: str | None
    bos_file: str | None
    bos_of_class: str | None
    listed: tuple[AddedToken, ...]
    added: tuple[AddedToken, ...]
    split: bool


def special_tokens(path: Path) -> SpecialTokens:
    """What the files in `path` say. Raises CheckpointError where they cannot be read."""
    newer = _read(path, TOKENIZER_CONFIG)
    lists_added = newer is not None and "added_tokens_decoder" in newer
    # special_tokens_map.json has the last word, unless the other lists its added tokens: then there is no need of it.
    older = None if lists_added else _read(path, SPECIAL_TOKENS_MAP)
    said = {**(newer or {}), **(older or {})}
    bos_file = TOKENIZER_CONFIG if newer is not None else SPECIAL_TOKENS_MAP if older is not None else None
    if older and "bos_token" in older:
        bos_file = SPECIAL_TOKENS_MAP
    bos = said.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos is not None and not isinstance(bos, str):
        raise CheckpointError(f"{path / str(bos_file)}: bos_token is {show(bos)}; it must be text, or null")
    of_class = newer is not None and "bos_token" not in said and newer.get("tokenizer_class") in LLAMA_CLASSES
    named = list(_named(said))
    before = () if lists_added else _listed_before(path, named)
    added: dict[str, AddedToken] = {}
    for token in (*before, *(token for token in named if token["content"] != bos)):
        added.setdefault(token["content"], token)
    return SpecialTokens(
        bos=bos or None,  # none may be written as empty text
        bos_file=bos_file,
        bos_of_class=LLAMA_BOS if of_class else None,
        listed=tuple(_listed(said["added_tokens_decoder"])) if lists_added else (),
        added=tuple(added.values()),
        split=said.get("split_special_tokens") is True,
    )


def _read(path: Path, name: str) -> dict[str, Any] | None:
    return read_json(path, name, MAX_READ_NBYTES) if os.path.lexists(path / name) else None


def _named(said: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The tokens that have a name, or are said to be special."""
    more = said.get("extra_special_tokens") or said.get("additional_special_tokens")
    more = list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
    others = [value for key, value in said.items() if key.endswith("_token") and key not in NAMED]
    for value in (*(said.get(key) for key in NAMED), *others, *more):
        token = _token(value)
        if token is not None:
            yield {**token, "special": True}


def _listed(decoder: Any) -> Iterator[AddedToken]:
    """Those of `added_tokens_decoder`, which has them by their ids."""
    by_id = (
        {int(key): value for key, value in decoder.items() if ID.fullmatch(key)} if isinstance(decoder, dict) else {}
    )
    for number in sorted(by_id):
        token = _token(by_id[number])
        if token is not None:
            yield token


def _listed_before(path: Path, named: Sequence[AddedToken]) -> Iterator[AddedToken]:
    """Those of added_tokens.json, which has ids by their tokens."""
    special = {token["content"] for token in named}
    by_token = {token: key for token, key in (_read(path, ADDED_TOKENS) or {}).items() if type(key) is int}
    for content in sorted(by_token, key=by_token.__getitem__):
        yield {"content": content, "normalized": content not in special, "special": content in special}


def _token(value: Any) -> AddedToken | None:
    """A token as the files write it; None for what is none."""
    if isinstance(value, str):
        return {"content": value}
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return {"content": value["content"], **{flag: value[flag] for flag in FLAGS if type(value.get(flag)) is bool}}
    return None
