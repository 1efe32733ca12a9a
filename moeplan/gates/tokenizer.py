"""Asking a model's tokenizer for token ids. It is a stranger's program: so it runs in a process of its own,
`moeplan.gates.tokenizer_process`, and here are the limits that it is given, and what is made of its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from moeplan.architectures.dense import DenseModel
from moeplan.checkpoint import CONFIG
from moeplan.gates.special_tokens import special_tokens
from moeplan.places import LFS_POINTER, CheckpointError, opened, read_json, refuse_lfs_pointer
from moeplan.tokenizer_files import FAST, MAX_READ_NBYTES, SLOW, SLOW_CLASS, TOKENIZER_CONFIG, TOKENIZER_FILES
from moeplan.untrusted_json import show

SENTENCEPIECE = b"\n"
"""The first byte of a sentencepiece model: the tag of its first piece, in a protocol buffer."""
READERS = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""What transformers reads one with: packages by their names, and a module of each."""

# Honest ones need 9 bytes of memory for a byte of tokenizer.json, which they read at 50 MB/s, and some 200 bytes for a
# byte of text.
SECONDS = 0.5
NBYTES_PER_SECOND = 4 << 20
DATA_NBYTES = 96 << 20
DATA_NBYTES_PER_BYTE = 24
TEXT_WEIGHT = 64
TRANSFORMERS_LIMITS = {"seconds": 120.0, "data_nbytes": 4 << 30}


class NoTokenizerError(CheckpointError):
    """A model has no tokenizer that text could be read with."""


def encode(
    model: DenseModel, texts: Sequence[str], trust_remote_code: bool
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The BOS token, if there is one, and the token ids of `texts`, by the model's tokenizer.

    That is done by code of its own where it has some, and that is trusted. Raises CheckpointError.
    """
    path = model.checkpoint.path
    text_nbytes = sum(len(text.encode()) for text in texts)
    request = {"texts": texts, "most_tokens": 16 * (text_nbytes + len(texts))}
    if trust_remote_code and _has_own_tokenizer(path):
        answer = _ask_own_code(path, request)
    elif os.path.lexists(path / FAST):
        answer = _ask_fast(model, request, text_nbytes)
    elif os.path.lexists(path / SLOW):
        answer = _ask_sentencepiece(model, request)
    else:
        raise NoTokenizerError(
            f"{path}: there is no tokenizer ({FAST} or {SLOW}) to read text with; copy the model's tokenizer files "
            "there"
        )
    start = () if answer["bos_id"] is None else (answer["bos_id"],)
    return start, [tuple(ids) for ids in answer["tokens"]]


def _has_own_tokenizer(path: Path) -> bool:
    """Whether the model in `path` names tokenizer code of its own."""
    there = os.path.lexists(path / TOKENIZER_CONFIG)
    named = read_json(path, TOKENIZER_CONFIG, MAX_READ_NBYTES).get("auto_map") if there else None
    return isinstance(named, dict) and "AutoTokenizer" in named


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _ask_fast(model: DenseModel, request: dict[str, Any], text_nbytes: int) -> dict[str, Any]:
    """Where no file speaks of special tokens, config.json says which is BOS."""
    path = model.checkpoint.path
    special = special_tokens(path)
    about = {
        "bos_token": special.bos,
        "bos_of_class": special.bos_of_class,
        "listed_tokens": special.listed,
        "added_tokens": special.added,
        "split_special_tokens": special.split,
    }
    with opened(path, FAST) as file:
        work_nbytes = _check_file(path / FAST, file) + len(json.dumps(about)) + TEXT_WEIGHT * text_nbytes
        limits = {
            "seconds": SECONDS + work_nbytes / NBYTES_PER_SECOND,
            "data_nbytes": DATA_NBYTES + DATA_NBYTES_PER_BYTE * work_nbytes,
        }
        answer = _ask(path / FAST, {**request, **limits, **about, "file": file.fileno()}, file.fileno())
    if special.bos_file is None:
        bos_id = model.checkpoint.config.get("bos_token_id")
        answer["bos_id"] = bos_id if type(bos_id) is int and bos_id >= 0 else None  # some models say -1 for none
    elif special.bos is not None and answer["bos_id"] is None:
        raise CheckpointError(f"{path / special.bos_file}: bos_token {show(special.bos)} is not a token of {FAST}")
    return answer


def _ask_sentencepiece(model: DenseModel, request: dict[str, Any]) -> dict[str, Any]:
    """transformers reads it, as the class that the files name, or as Llama's."""
    path = model.checkpoint.path
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
    named = model.settings["tokenizer_class"] or SLOW_CLASS
    about = {"directory": str(path), "own_code": False, "tokenizer_class": named}
    return _ask(path / SLOW, {**request, **TRANSFORMERS_LIMITS, **about})


def _ask_own_code(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """The code of the model in `path`, which is run."""
    about = {"directory": str(path), "own_code": True}
    return _ask(path / TOKENIZER_CONFIG, {**request, **TRANSFORMERS_LIMITS, **about})


def _check_file(where: Path, file: BinaryIO) -> int:
    nbytes = os.fstat(file.fileno()).st_size
    refuse_lfs_pointer(where, os.pread(file.fileno(), len(LFS_POINTER), 0))  # the descriptor's position is another's
    if nbytes > MAX_READ_NBYTES:
        raise CheckpointError(f"{where}: is larger than {MAX_READ_NBYTES:,} bytes; a real one is not")
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
