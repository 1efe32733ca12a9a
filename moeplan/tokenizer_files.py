"""The files of a model's tokenizer: their names, how large they may be, and which of them a merged model takes over."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from moeplan.errors import MoeplanWarning
from moeplan.places import LFS_POINTER, CheckpointError, Place, opened, read_json, refuse_lfs_pointer
from moeplan.untrusted_json import show

FAST, SLOW = "tokenizer.json", "tokenizer.model"
FAST_CLASS, SLOW_CLASS = "PreTrainedTokenizerFast", "LlamaTokenizer"
"""What transformers is to read the first with, and the second where there is no first, if no file names a class."""

MAKE_FAST = (
    f'python -c "from transformers import {SLOW_CLASS}Fast as Llama; '
    f"Llama.from_pretrained('.').backend_tokenizer.save('{FAST}')\""
)
"""A command that makes the first of the second, with transformers 4 or 5."""

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
READ_WITH_FAST = (FAST, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS)
"""What prompts are read with, where the first is there."""

VOCABULARIES = (
    FAST,
    SLOW,
    "tokenizer.model.v3",  # Mistral's, for mistral-common
    "tokenizer.model.v7",
    "tekken.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Of these a tokenizer is made; the others say how it is used."""

TOKENIZER_FILES = (
    *VOCABULARIES,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    ADDED_TOKENS,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
TEMPLATES = "additional_chat_templates"
TEMPLATE = re.compile(rf"{TEMPLATES}/[\w.-]+\.jinja")
CODE = re.compile(r"tokenization_\w+\.py")
"""Code that belongs to a tokenizer: copied, and never run."""

MAX_NBYTES = 256 << 20
"""Of one that is copied, which takes no memory."""

MAX_READ_NBYTES = 64 << 20
"""Of one that is read, which takes many times as much memory. The largest honest ones, of a quarter million tokens,
have 35 MB."""

MAX_FILES = 256
WITHOUT = "use --no-copy-tokenizer to go without"


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of a model on the Hub, by its path there, is one that `tokenizer_files` would take."""
    return name in TOKENIZER_FILES or any(pattern.fullmatch(name) for pattern in (TEMPLATE, CODE))


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names make a tokenizer, of a vocabulary or of code, and are not just beside one."""
    return any(name in VOCABULARIES or CODE.fullmatch(name) for name in names)


def is_slow(model: Place) -> bool:
    """Whether the tokenizer of a model is a sentencepiece model alone."""
    return model.has(SLOW) and not model.has(FAST)


def has_code(model: Place) -> bool:
    """Whether there is code beside a model that reads its tokenizer."""
    return any(map(CODE.fullmatch, model.names()))


def tokenizer_files(source: Path) -> list[Path]:
    """The files of a checkpoint that a merged model takes over as they are.

    Raises CheckpointError for one that is really a file of another place, or a git-LFS pointer, or not a plain file of
    sane size.
    """
    names = [name for name in TOKENIZER_FILES if os.path.lexists(source / name)]
    names += sorted(file.name for file in source.glob("tokenization_*.py") if CODE.fullmatch(file.name))
    templates = source / TEMPLATES
    if templates.is_dir():
        found = sorted(str(file.relative_to(source)) for file in templates.glob("*.jinja"))
        names += filter(TEMPLATE.fullmatch, found)
        strange = [name for name in found if not TEMPLATE.fullmatch(name)]
        if strange:
            warnings.warn(
                f"{source}: {', '.join(map(show, strange[:3]))}: not copied, since no chat template has such a name",
                MoeplanWarning,
                stacklevel=2,
            )
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{templates}: holds {len(names):,} files ({WITHOUT})")
    for name in names:
        try:
            with opened(source, name) as file:
                nbytes = os.fstat(file.fileno()).st_size
                refuse_lfs_pointer(source / name, file.read(len(LFS_POINTER)))
        except CheckpointError as error:
            raise CheckpointError(f"{error} ({WITHOUT})") from None
        if nbytes > MAX_NBYTES:
            raise CheckpointError(f"{source / name}: is larger than {MAX_NBYTES:,} bytes ({WITHOUT})")
    return [source / name for name in names]


def missing_code(directory: Path) -> list[str]:
    """The files of code that the tokenizer in `directory` names, and that are not there."""
    try:
        named = read_json(directory, TOKENIZER_CONFIG, MAX_READ_NBYTES).get("auto_map")
    except CheckpointError:  # it is copied as it is, whatever is in it
        return []
    classes = named.get("AutoTokenizer") if isinstance(named, dict) else named
    modules = {
        name.rpartition(".")[0]
        for name in (classes if isinstance(classes, list) else [classes])
        if isinstance(name, str) and "--" not in name
    }
    return sorted(f"{module}.py" for module in modules if module and not os.path.lexists(directory / f"{module}.py"))
