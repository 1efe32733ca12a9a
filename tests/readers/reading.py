"""Programs that read merged models, each a process in an environment of its own.

`make test-gguf`, `make test-transformers4` and `make test-vllm` install the environments; READER_PYTHON says which
interpreter to use.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
NUM_TOKENS = 40


class ReaderError(Exception):
    """What a reader said of a model that it refused."""


class Reader:
    """A process that loads a model and computes logits, as `serve.py` says; started anew where a model kills it."""

    def __init__(self, script: str, directory: Path) -> None:
        self._script, self._directory = script, directory
        self._process: subprocess.Popen[str] | None = None

    def logits(self, model: Path, tokens: list[int]) -> np.ndarray:
        """The logits `[num_tokens, vocab_size]` that the program computes. Raises ReaderError."""
        saved, log = self._directory / "logits.npy", self._directory / "log.txt"
        if self._process is None:
            with log.open("w") as stderr:
                self._process = self._start(stderr)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"model": str(model), "tokens": tokens, "logits": str(saved)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise ReaderError(f"the process ended:\n{log.read_text()[-2000:]}")
        if error := json.loads(answer).get("error"):
            raise ReaderError(error)
        return np.load(saved)

    def _start(self, stderr: IO[str]) -> subprocess.Popen[str]:
        command = [reader_python(), str(HERE / self._script)]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=self._directory
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


def reader_python() -> str:
    if "READER_PYTHON" not in os.environ:
        pytest.fail(
            "run these tests with `make test-gguf`, `make test-transformers4` or `make test-vllm`: each installs one"
        )
    interpreter = Path(os.environ["READER_PYTHON"])
    return str(interpreter.absolute())  # not resolved, because the link leads out of the environment


def some_tokens(model: Path, count: int = NUM_TOKENS) -> list[int]:
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def logits_here(model: Path, tokens: list[int]) -> np.ndarray:
    """The logits `[num_tokens, vocab_size]` that the transformers of the tests' own environment computes in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation="eager")
    with torch.inference_mode():
        return loaded(torch.tensor([tokens])).logits[0].numpy()


def error_of(reader: Reader, out: Path, source: Path, num_tokens: int = NUM_TOKENS) -> float:
    """The `relative_error` of the reader's logits of the model `out`: `source`'s, computed here, are expected."""
    tokens = some_tokens(source, num_tokens)
    return relative_error(reader.logits(out, tokens), logits_here(source, tokens))


def relative_error(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())
