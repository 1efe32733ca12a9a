"""Prompts as token ids, and the embedding rows of those ids.

A prompt is the BOS token, if the tokenizer has one, and the text's tokens; no other special token is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.architectures.dense import DenseModel
from moeplan.checkpoint import CheckpointError
from moeplan.config import Expert
from moeplan.untrusted_json import JSONError, parse_object
from planner.expr import Concat, Read

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EMBEDDING = "model.embed_tokens.weight"
MAX_NBYTES = 256 << 20
"""Of a tokenizer file. The largest honest ones, of a quarter million tokens, have 35 MB."""


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a config, shortest first.

    `positive[e]` and `negative[e]` are expert e's prompts, as indices into `tokens`.
    """

    tokens: tuple[tuple[int, ...], ...]
    positive: tuple[tuple[int, ...], ...]
    negative: tuple[tuple[int, ...], ...]

    @property
    def lengths(self) -> list[int]:
        """Each prompt's number of tokens."""
        return [len(ids) for ids in self.tokens]

    def vocabulary(self) -> list[int]:
        """The distinct token ids, ascending."""
        return sorted({token for ids in self.tokens for token in ids})


def tokenize(experts: Sequence[Expert], base: DenseModel) -> Prompts:
    """The prompts of `experts`, tokenised with the base's tokenizer.

    Raises CheckpointError where the base has no tokenizer that can be read, or a prompt comes out empty, longer than
    the model's context, or with a token that the embedding has no row for.
    """
    encode = _encoder(base.checkpoint.path, base.checkpoint.config)
    texts = {text for expert in experts for text in (*expert.positive_prompts, *expert.negative_prompts)}
    ids = {text: encode(text) for text in texts}
    for text, tokens in ids.items():
        _check(text, tokens, base)
    ordered = sorted(set(ids.values()), key=lambda tokens: (len(tokens), tokens))
    index = {tokens: i for i, tokens in enumerate(ordered)}

    def indices(prompts: Iterable[str]) -> tuple[int, ...]:
        return tuple(index[ids[text]] for text in prompts)

    return Prompts(
        tuple(ordered),
        tuple(indices(expert.positive_prompts) for expert in experts),
        tuple(indices(expert.negative_prompts) for expert in experts),
    )


def embedding_rows(base: DenseModel, token_ids: Sequence[int]) -> Concat:
    """The embeddings of `token_ids`, `[len(token_ids), hidden_size]`, reading these rows and no others."""
    table = base.checkpoint.tensors[EMBEDDING]
    width = table.shape[1]
    row_nbytes = width * table.dtype.itemsize
    rows = tuple(Read(table.file, table.offset + token * row_nbytes, table.dtype, (1, width)) for token in token_ids)
    return Concat(rows, (len(rows), width))


def _check(text: str, tokens: tuple[int, ...], base: DenseModel) -> None:
    shown = repr(text if len(text) <= 40 else text[:40] + "…")
    path = base.checkpoint.path
    if not tokens:
        raise CheckpointError(f"the prompt {shown} has no tokens, and the tokenizer of {path} has no BOS token")
    context = base.checkpoint.integer("max_position_embeddings", default=base.settings["max_position_embeddings"])
    if len(tokens) > context:
        raise CheckpointError(f"the prompt {shown} has {len(tokens)} tokens, and the context of {path} is {context}")
    if max(tokens) >= base.sizes["vocab_size"]:
        raise CheckpointError(
            f"the prompt {shown} has token {max(tokens)}, and the embeddings of {path} have "
            f"{base.sizes['vocab_size']} rows; its tokenizer is of another model"
        )


class _Encoder:
    """Text → token ids, BOS first."""

    def __init__(self, tokenizer: Tokenizer, bos: int | None) -> None:
        self._tokenizer = tokenizer
        self._bos = () if bos is None else (bos,)

    def __call__(self, text: str) -> tuple[int, ...]:
        return (*self._bos, *self._tokenizer.encode(text, add_special_tokens=False).ids)


def _encoder(path: Path, config: Any) -> _Encoder:
    file = path / "tokenizer.json"
    if not file.exists():
        return _slow_encoder(path)
    from tokenizers import Tokenizer

    content = _read(file)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{file}: this is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _Encoder(tokenizer, _bos_id(path, tokenizer, config))


def _read(file: Path) -> bytes:
    """The bytes of a file of the checkpoint that is read whole."""
    if not file.is_file() or file.stat().st_size > MAX_NBYTES:
        raise CheckpointError(f"{file}: is not a regular file of at most {MAX_NBYTES >> 20} MiB")
    return file.read_bytes()


def _slow_encoder(path: Path) -> _Encoder:
    """For a directory that has only the sentencepiece model: transformers converts it, for 3 s and 300 MB."""
    if not (path / "tokenizer.model").exists():
        raise CheckpointError(
            f"{path}: there is no tokenizer (tokenizer.json or tokenizer.model), and this gate mode reads prompts; "
            "copy the model's tokenizer files there, or use gate_mode: random"
        )
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a converter of foreign files may raise
        raise CheckpointError(f"{path}/tokenizer.model: this tokenizer cannot be read: {error}") from error
    return _Encoder(slow.backend_tokenizer, slow.bos_token_id)


def _bos_id(path: Path, tokenizer: Tokenizer, config: Any) -> int | None:
    """The BOS token's id. A tokenizer_config.json that names none means none; without that file config.json decides."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = path / name
        if not file.exists():
            continue
        try:
            bos = parse_object(_read(file)).get("bos_token")
        except JSONError as error:
            raise CheckpointError(f"{file}: {error}") from error
        if isinstance(bos, dict):
            bos = bos.get("content")
        if bos is None:
            return None
        token: int | None = tokenizer.token_to_id(bos) if isinstance(bos, str) else None
        if token is None:
            raise CheckpointError(f"{file}: bos_token {bos!r} is not a token of tokenizer.json")
        return token
    bos_id = config.get("bos_token_id")
    return bos_id if type(bos_id) is int else None
