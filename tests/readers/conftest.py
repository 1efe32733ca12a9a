"""The programs that read merged models, and checkpoints with tokenizers that llama.cpp's converter knows."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from models import ABSENT, RECIPES, SIZES, Recipe, save_checkpoint, use_sentencepiece
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
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    yield from _reader("vllm_reader.py", tmp_path_factory)


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`wide_checkpoint(recipe, seed=0)`: the recipe's checkpoint, but with heads so wide that vLLM takes them."""
    root = tmp_path_factory.mktemp("wide")

    def make(recipe: str, seed: int = 0) -> Path:
        path = root / f"{recipe}-{seed}"
        if not path.exists():
            save_checkpoint(_widened(RECIPES[recipe]), path, seed)
        return path

    return make


def _widened(recipe: Recipe) -> Recipe:
    """The recipe with heads of 32, or 64 where they are wider than the hidden size makes them."""
    given = {**SIZES, **recipe.config}
    config = {**recipe.config, "hidden_size": 32 * given["num_attention_heads"]}
    if given["head_dim"] is not ABSENT:
        config["head_dim"] = 32 if given["head_dim"] == SIZES["head_dim"] else 64
    scaling = config.get("rope_scaling") or {}
    if "short_factor" in scaling:  # one for every two dimensions of a head
        factors = {key: [n for n in scaling[key] for _ in range(2)] for key in ("short_factor", "long_factor")}
        config["rope_scaling"] = {**scaling, **factors}
    return replace(recipe, config=config)


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
