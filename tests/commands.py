"""Running the `moeplan` command: in this process, which is quick, or in one of its own, which is what users do."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from moeplan.cli import run
from moeplan.safetensors_header import LENGTH_NBYTES


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit status."""

    stdout: str
    stderr: str
    status: int

    @property
    def error(self) -> str:
        """The message it ended with."""
        return self.stderr.rpartition("error: ")[2].strip()


def moeplan(*args: object) -> Outcome:
    """Run the command in this process."""
    stdout, stderr = StringIO(), StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as ended:
        run([str(arg) for arg in args])
    return Outcome(stdout.getvalue(), stderr.getvalue(), int(ended.value.code or 0))


MAIN = "from moeplan.__main__ import main; main()"


def start(*args: object, code: str = MAIN, **options: Any) -> subprocess.Popen[str]:
    """Start the command in a process of its own, which runs `code`."""
    command = [sys.executable, "-c", code, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # as users have it
    return subprocess.Popen(command, text=True, **{"env": env, **pipes})


def outcome(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a process that `start` started."""
    stdout, stderr = process.communicate(timeout=120)
    return Outcome(stdout or "", stderr or "", process.returncode)


def snapshot(path: Path) -> dict[str, bytes | None] | None:
    """Everything below `path`, to see that it is as it was; None where it is not there."""
    if not path.exists():
        return None
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in path.rglob("*")}


def write_config(path: Path, base: Path, experts: list[Any], **settings: Any) -> Path:
    """Write a YAML file; an expert is a source's path or a mapping. Each expert gets a prompt of its own."""
    entries = [
        {"positive_prompts": [f"prompt {number}"], **(expert if isinstance(expert, dict) else {"source_model": expert})}
        for number, expert in enumerate(experts)
    ]
    path.write_text(
        json.dumps({"base_model": base, "gate_mode": "random", "experts": entries, **settings}, default=str)
    )
    return path


def sparse_llama(path: Path, **sizes: int) -> Path:
    """Make a checkpoint with true headers, and holes for weights in bfloat16: as large as wanted, free on disk."""
    config = {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **sizes,
    }
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config.get("num_key_value_heads", config["num_attention_heads"])
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (wide, hidden),
                "mlp.up_proj": (wide, hidden),
                "mlp.down_proj": (hidden, wide),
            }.items()
        }
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text = text.ljust(len(text) + -len(text) % 8)  # as safetensors does
    path.mkdir(parents=True)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_NBYTES, "little") + text)
        file.truncate(LENGTH_NBYTES + len(text) + end)
    (path / "config.json").write_text(json.dumps(config))
    return path
