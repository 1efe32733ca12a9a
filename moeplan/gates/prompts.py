"""Prompts as token ids, and the embedding rows of those ids.

A prompt is the BOS token, if the tokenizer has one, and the text's tokens; no other special token is added. Passages of
files are prompts, too, whose ends are cut off.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from moeplan.architectures.dense import DenseModel
from moeplan.checkpoint import CONFIG, LFS_POINTER, CheckpointError, opened, read_json, refuse_lfs_pointer
from moeplan.config import Expert
from moeplan.errors import UserError
from moeplan.gates.passages import PassageError, passages
from moeplan.gates.special_tokens import MAX_NBYTES, special_tokens
from moeplan.output import TOKENIZER_CONFIG, TOKENIZER_FILES
from moeplan.untrusted_json import show
from planner.expr import Concat, Expr, rows

FAST, SLOW = "tokenizer.json", "tokenizer.model"
SENTENCEPIECE = b"\n"
"""The first byte of a sentencepiece model: the tag of its first piece, in a protocol buffer."""
READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""What transformers reads one with: packages by their names, and a module of each."""

# What a tokenizer may take in its own process. Honest ones need 9 bytes of memory for a byte of tokenizer.json, which
# they read at 50 MB/s, and some 200 bytes for a byte of text.
SECONDS = 0.5
NBYTES_PER_SECOND = 4 << 20
DATA_NBYTES = 96 << 20
DATA_NBYTES_PER_BYTE = 24
TEXT_WEIGHT = 64
GATE_TOKENS = 4096
"""Of all passages of an expert, unless the config says otherwise."""

PASSAGE_TOKENS = 255
"""Of a passage of a file, beside BOS."""

TEXT_NBYTES_PER_TOKEN = 16
"""So much text is drawn from files for each token that is wanted: no tokenizer makes fewer tokens of it."""

TRANSFORMERS_LIMITS = {"seconds": 120.0, "data_nbytes": 4 << 30}


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


def folds(positive: Sequence[Sequence[int]], lengths: Sequence[int], bos: int) -> dict[int, int]:
    """In which of two halves, 0 or 1, each prompt is, so that routers can be made without one half and tried on it.

    `positive` are the prompts of each expert, which is left some in either half; one that has a single prompt cannot do
    without it, so that is in neither. Nor are those that have no more than `bos` tokens, which tell nothing. Halves
    have about the same number of tokens.
    """
    found: dict[int, int] = {}
    positive = [[prompt for prompt in prompts if lengths[prompt] > bos] for prompts in positive]
    for prompts in positive:
        sizes = [sum(lengths[prompt] for prompt in prompts if found.get(prompt) == fold) for fold in (0, 1)]
        for prompt in prompts:
            if prompt not in found:
                found[prompt] = int(sizes[0] > sizes[1])
                sizes[found[prompt]] += lengths[prompt]
    for prompts in positive:
        if len({found.get(prompt) for prompt in prompts} - {None}) == 1 and all(prompt in found for prompt in prompts):
            del found[prompts[-1]]
    return found


def kept(
    of_rows: Sequence[Sequence[int]],
    positive: Sequence[Sequence[int]],
    lengths: Sequence[int],
    bos: int,
    without: int | None,
) -> list[list[int]]:
    """The prompts of each row that are left `without` that fold of the `positive` ones."""
    fold = {} if without is None else folds(positive, lengths, bos)
    return [[prompt for prompt in prompts if without is None or fold.get(prompt) != without] for prompts in of_rows]


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
    groups = [
        group
        for number, expert in enumerate(experts)
        for group in (
            _prompts(number, "positive_prompts", expert.positive_prompts),
            _prompts(number, "negative_prompts", expert.negative_prompts),
            _of_files(number, expert.positive_files, seed, room),
        )
    ]
    for number, file in enumerate(texts):
        groups.append([_Text(text, file, True) for text in passages(file, f"{seed} text {number}", room)])
    distinct = list(dict.fromkeys(text.text for text in chain(*groups)))
    own_code = trust_remote_code and has_own_tokenizer(base.checkpoint.path)
    start, encoded = _encode(base, distinct, own_code)
    # A text may begin with the BOS token, as chat templates write it: that is none of its own.
    ids = {
        text: tokens[len(start) :] if tokens[: len(start)] == start else tokens
        for text, tokens in zip(distinct, encoded, strict=True)
    }
    tokens = [list(_tokens(group, ids, start, base, gate_tokens)) for group in groups]
    for group, found in zip(groups[: 3 * len(experts)], tokens, strict=False):
        if group and not found:
            raise group[0].error("there is no token in it that the base could be given")
    ordered = sorted({*chain(*tokens)}, key=lambda tokens: (len(tokens), tokens))
    index = {tokens: i for i, tokens in enumerate(ordered)}
    indices = [tuple(index[tokens] for tokens in group) for group in tokens]
    of_experts, of_texts = indices[: 3 * len(experts)], indices[3 * len(experts) :]
    return Prompts(
        tokens=tuple(ordered),
        positive=tuple(own + of_files for own, of_files in zip(of_experts[::3], of_experts[2::3], strict=True)),
        negative=tuple(of_experts[1::3]),
        texts=tuple(of_texts),
        start=start,
    )


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
        return f"{what} has {len(tokens)} tokens, and the context of {path} is {context}"
    if not 0 <= min(tokens) <= max(tokens) < base.sizes["vocab_size"]:
        return (
            f"{what} has token {max(tokens)}, and the embeddings of {path} have {base.sizes['vocab_size']} rows; its "
            "tokenizer is of another model"
        )
    return None


def has_own_tokenizer(path: Path) -> bool:
    """Whether the model in `path` names tokenizer code of its own."""
    there = os.path.lexists(path / TOKENIZER_CONFIG)
    named = read_json(path, TOKENIZER_CONFIG, MAX_NBYTES).get("auto_map") if there else None
    return isinstance(named, dict) and "AutoTokenizer" in named


def _encode(base: DenseModel, texts: Sequence[str], own_code: bool) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The BOS token, if there is one, and the token ids of `texts`, by the base's tokenizer."""
    path = base.checkpoint.path
    text_nbytes = sum(len(text.encode()) for text in texts)
    request = {"texts": texts, "most_tokens": 16 * (text_nbytes + len(texts))}
    if own_code:
        answer = _ask(
            path / TOKENIZER_CONFIG, {**request, **TRANSFORMERS_LIMITS, "directory": str(path), "own_code": True}
        )
    elif os.path.lexists(path / FAST):
        answer = _ask_fast(base, request, text_nbytes)
    elif os.path.lexists(path / SLOW):
        for name in (*TOKENIZER_FILES, CONFIG):  # transformers opens what it finds
            if os.path.lexists(path / name):
                with opened(path, name) as file:
                    _check_file(path / name, file)
                    if name == SLOW and file.read(1) != SENTENCEPIECE:
                        raise CheckpointError(f"{path / name}: is not a sentencepiece model; download it again")
        missing = [package for package, module in READERS.items() if not _is_installed(module)]
        if missing:
            raise CheckpointError(
                f"{path / SLOW}: is a sentencepiece model, and what reads it is not installed: "
                f"`pip install {' '.join(missing)}`, or put the tokenizer's {FAST} beside it"
            )
        answer = _ask(path / SLOW, {**request, **TRANSFORMERS_LIMITS, "directory": str(path), "own_code": False})
    else:
        raise CheckpointError(
            f"{path}: there is no tokenizer ({FAST} or {SLOW}), and this gate mode reads prompts; "
            "copy the model's tokenizer files there, or use gate_mode: random"
        )
    start = () if answer["bos_id"] is None else (answer["bos_id"],)
    return start, [tuple(ids) for ids in answer["tokens"]]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _ask_fast(base: DenseModel, request: dict[str, Any], text_nbytes: int) -> dict[str, Any]:
    """Where no file speaks of special tokens, config.json says which is BOS."""
    path = base.checkpoint.path
    special = special_tokens(path)
    about = {
        "bos_token": special.bos,
        "bos_of_class": special.bos_of_class,
        "added_tokens": special.added,
        "split_special_tokens": special.split,
    }
    with opened(path, FAST) as file:
        work_nbytes = _check_file(path / FAST, file) + len(json.dumps(special.added)) + TEXT_WEIGHT * text_nbytes
        limits = {
            "seconds": SECONDS + work_nbytes / NBYTES_PER_SECOND,
            "data_nbytes": DATA_NBYTES + DATA_NBYTES_PER_BYTE * work_nbytes,
        }
        answer = _ask(path / FAST, {**request, **limits, **about, "file": file.fileno()}, file.fileno())
    if special.bos_file is None:
        bos_id = base.checkpoint.config.get("bos_token_id")
        answer["bos_id"] = bos_id if type(bos_id) is int and bos_id >= 0 else None  # some models say -1 for none
    elif special.bos is not None and answer["bos_id"] is None:
        raise CheckpointError(f"{path / special.bos_file}: bos_token {show(special.bos)} is not a token of {FAST}")
    return answer


def _check_file(where: Path, file: BinaryIO) -> int:
    nbytes = os.fstat(file.fileno()).st_size
    refuse_lfs_pointer(where, os.pread(file.fileno(), len(LFS_POINTER), 0))  # the descriptor's position is another's
    if nbytes > MAX_NBYTES:
        raise CheckpointError(f"{where}: is larger than {MAX_NBYTES:,} bytes; a real one is not")
    return nbytes


def _ask(file: Path, request: dict[str, Any], *fds: int) -> dict[str, Any]:
    """What the tokenizer in `file` answers, from a process in which it can do no harm."""
    result = subprocess.run(
        # Without -P, the modules beside the program would stand in for those of the standard library.
        [sys.executable, "-P", str(Path(__file__).with_name("tokenizer_process.py"))],
        input=json.dumps(request).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        pass_fds=fds,
        check=False,
    )
    if result.returncode == -signal.SIGPROF:
        raise CheckpointError(f"{file}: took more than {request['seconds']:.1f} s for the prompts; a real one does not")
    try:
        answer: dict[str, Any] = json.loads(result.stdout)
    except ValueError:
        raise CheckpointError(
            f"{file}: took more than {request['data_nbytes'] >> 20} MiB for the prompts, or crashed the tokenizers "
            "library; a real one does neither"
        ) from None
    if "error" in answer:
        error = answer["error"]
        raise CheckpointError(
            f"{file}: is not a tokenizer that can be used: {error if error.isprintable() else repr(error)}"
        )
    return answer
