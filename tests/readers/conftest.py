"""The programs that read merged models, and checkpoints with tokenizers that llama.cpp's converter knows."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from models import RECIPES, save_checkpoint, use_sentencepiece
from reading import HERE, Reader, reader_python


def _reader(script: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader(script, tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    yield from _reader("gguf_reader.py", tmp_path_factory)


@pytest.fixture(scope="session")
def transformers4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    yield from _reader("transformers4_reader.py", tmp_path_factory)


@pytest.fixture(scope="session")
def gpt2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`gpt2_checkpoint(recipe, seed=0)`: the recipe's checkpoint, but with GPT-2's tokenizer and vocabulary size."""
    root = tmp_path_factory.mktemp("gpt2")
    tokenizer = root / "tokenizer"
    tokenizer.mkdir()
    subprocess.run([reader_python(), str(HERE / "gpt2_tokenizer.py"), str(tokenizer)], check=True)
    vocabulary = {"vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256}

    def make(recipe: str, seed: int = 0) -> Path:
        path = root / f"{recipe}-{seed}"
        if not path.exists():
            plain = RECIPES[recipe]
            save_checkpoint(replace(plain, config={**plain.config, **vocabulary}), path, seed)
            shutil.copytree(tokenizer, path, dirs_exist_ok=True)
        return path

    return make


@pytest.fixture(scope="session")
def sentencepiece_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`sentencepiece_checkpoint(recipe)`: the recipe's checkpoint, but with a tokenizer such as Llama 2's."""
    root = tmp_path_factory.mktemp("sentencepiece")

    def make(recipe: str) -> Path:
        path = root / recipe
        if not path.exists():
            save_checkpoint(RECIPES[recipe], path, seed=0)
            use_sentencepiece(path)
        return path

    return make
