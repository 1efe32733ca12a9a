"""Prompts as token ids, and the embedding rows of those ids.

A prompt is the BOS token, if the tokenizer has one, and the text's tokens; no other special token is added. Passages of
files are prompts, too, whose ends are cut off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from moeplan.architectures.dense import DenseModel
from moeplan.config import Expert
from moeplan.errors import UserError
from moeplan.gates.passages import PassageError, passages
from moeplan.gates.tokenizer import encode
from moeplan.places import CheckpointError
from planner.expr import Concat, Expr, rows

GATE_TOKENS = 4096
"""Of all passages of an expert, unless the config says otherwise."""

PASSAGE_TOKENS = 255
"""Of a passage of a file, beside BOS."""

TEXT_NBYTES_PER_TOKEN = 16
"""So much text is drawn from files for each token that is wanted: no tokenizer makes fewer tokens of it."""

PromptPlace = tuple[int, str] | tuple[int, str, int]
"""The expert's number, the key of its entry in the config, and, where that is a list, the number in it."""


class PromptError(CheckpointError):
    """A prompt cannot be used with the base's tokenizer and embeddings. `place` says which."""

    def __init__(self, place: PromptPlace, message: str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a config, shortest first.

    `positive[e]` and `negative[e]` are expert e's prompts, `texts[t]` the passages of text t beside them, as indices
    into `tokens`, each of which begins with `start`: the BOS token, or nothing.
    """

    tokens: tuple[tuple[int, ...], ...] = ()
    positive: tuple[tuple[int, ...], ...] = ()
    negative: tuple[tuple[int, ...], ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()
    start: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Each prompt's number of tokens."""
        return [len(ids) for ids in self.tokens]

    def vocabulary(self) -> list[int]:
        """The distinct token ids, ascending."""
        return sorted({token for ids in self.tokens for token in ids})


@dataclass(frozen=True)
class _Text:
    """A text, and its `source`: a place in the config, or a file beside it. The end of a passage may be cut off."""

    text: str
    source: PromptPlace | str
    is_passage: bool = False

    @property
    def label(self) -> str:
        """What a message calls it."""
        shown = self.text if len(self.text) <= 40 else self.text[:40] + "…"
        return "a passage" if self.is_passage else f"the prompt {shown!r}"

    def error(self, message: str) -> UserError:
        if isinstance(self.source, str):
            return PassageError(f"{self.source}: {message}")
        return PromptError(self.source, message)


@dataclass(frozen=True)
class _OfExpert:
    """An expert's texts. Of those from files so many tokens are taken as are asked for."""

    positive: list[_Text]
    negative: list[_Text]
    of_files: list[_Text]

    @staticmethod
    def of(number: int, expert: Expert, seed: int, room: int) -> _OfExpert:
        return _OfExpert(
            _prompts(number, "positive_prompts", expert.positive_prompts),
            _prompts(number, "negative_prompts", expert.negative_prompts),
            _of_files(number, expert.positive_files, seed, room),
        )


def tokenize(
    base: DenseModel,
    experts: Sequence[Expert],
    *,
    gate_tokens: int = GATE_TOKENS,
    seed: int = 0,
    trust_remote_code: bool = False,
    texts: Sequence[str] = (),
) -> Prompts:
    """The prompts of `experts`, and the passages of the files `texts`, tokenised with the base's tokenizer: by its own
    code where that is trusted. Of an expert's files, and of each of `texts`, `gate_tokens` tokens are taken at most.

    Raises CheckpointError where the base has no tokenizer that can be read, PromptError where a file cannot be read, or
    a prompt comes out empty, longer than the model's context, or with a token that the embedding has no row for;
    PassageError for one of `texts`.
    """
    room = TEXT_NBYTES_PER_TOKEN * gate_tokens
    of_experts = [_OfExpert.of(number, expert, seed, room) for number, expert in enumerate(experts)]
    of_texts = [
        [_Text(text, file, True) for text in passages(file, f"{seed} text {number}", room)]
        for number, file in enumerate(texts)
    ]
    groups = [group for expert in of_experts for group in (expert.positive, expert.negative, expert.of_files)]
    distinct = list(dict.fromkeys(text.text for text in chain(*groups, *of_texts)))
    start, encoded = encode(base, distinct, trust_remote_code)
    # A text may begin with the BOS token, as chat templates write it: that is none of its own.
    ids = {
        text: tokens[len(start) :] if tokens[: len(start)] == start else tokens
        for text, tokens in zip(distinct, encoded, strict=True)
    }

    def tokens(group: Sequence[_Text]) -> list[tuple[int, ...]]:
        return list(_tokens(group, ids, start, base, gate_tokens))

    def some_tokens(group: Sequence[_Text]) -> list[tuple[int, ...]]:
        found = tokens(group)
        if group and not found:
            raise group[0].error("there is no token in it that the base could be given")
        return found

    positive = [[*some_tokens(expert.positive), *some_tokens(expert.of_files)] for expert in of_experts]
    negative = [some_tokens(expert.negative) for expert in of_experts]
    routed = [tokens(group) for group in of_texts]
    ordered = sorted({*chain(*positive, *negative, *routed)}, key=lambda tokens: (len(tokens), tokens))
    index = {tokens: i for i, tokens in enumerate(ordered)}

    def indices(groups: Sequence[Sequence[tuple[int, ...]]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(index[tokens] for tokens in group) for group in groups)

    return Prompts(tuple(ordered), indices(positive), indices(negative), indices(routed), start)


def _prompts(number: int, key: str, prompts: Sequence[str]) -> list[_Text]:
    return [_Text(text, (number, key, position)) for position, text in enumerate(prompts)]


def _of_files(number: int, files: Sequence[str], seed: int, room: int) -> list[_Text]:
    """Passages of an expert's files, until there are `room` bytes. Files take turns, a passage each, so that none is
    left out."""
    drawn: list[list[_Text]] = []
    for position, file in enumerate(files):
        place = (number, "positive_files", position)
        try:
            of_file = passages(file, f"{seed} {number} {position}", room)
        except PassageError as error:
            raise PromptError(place, str(error)) from error
        drawn.append([_Text(text, place, True) for text in of_file])
    taken: list[_Text] = []
    for turn in zip_longest(*drawn):
        if room <= 0:
            break
        for text in filter(None, turn):
            room -= len(text.text.encode())
            taken.append(text)
    return taken


def _tokens(
    group: Sequence[_Text], ids: Mapping[str, tuple[int, ...]], start: tuple[int, ...], base: DenseModel, most: int
) -> Iterator[tuple[int, ...]]:
    """The tokens of each text of a group; of its passages what the context takes, and `most` at most in all."""
    context = base.settings["max_position_embeddings"] - len(start)
    room = most
    for text in group:
        tokens = ids[text.text]
        if text.is_passage:
            tokens = tokens[: max(0, min(PASSAGE_TOKENS, context, room))]
            room -= len(tokens)
            if not tokens:
                continue
        if wrong := _what_is_wrong(text.label, (*start, *tokens), base):
            raise text.error(wrong)
        yield (*start, *tokens)


def embedding_rows(table: Expr, token_ids: Sequence[int]) -> Concat:
    """The rows of `token_ids` in the `table` of embeddings, `[len(token_ids), hidden_size]`, reading no others."""
    return Concat(tuple(rows(table, token, token + 1) for token in token_ids), (len(token_ids), table.shape[1]))


def _what_is_wrong(what: str, tokens: tuple[int, ...], base: DenseModel) -> str | None:
    path = base.checkpoint.path
    if not tokens:
        return f"{what} has no tokens, and the tokenizer of {path} has no BOS token"
    context = base.settings["max_position_embeddings"]
    if len(tokens) > context:
        return f"{what} has {len(tokens)} tokens, and the context of {path} is {context}; shorten it"
    if not 0 <= min(tokens) <= max(tokens) < base.sizes["vocab_size"]:
        return (
            f"{what} has token {max(tokens)}, and the embeddings of {path} have {base.sizes['vocab_size']} rows; its "
            "tokenizer is of another model"
        )
    return None
