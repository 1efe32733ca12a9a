"""What the fuzzer attacks: every reader of bytes that a stranger wrote, each as a function of those bytes.

A target returns where the input is accepted, or refused by the error that is meant for it. It raises for everything
else: another exception, a message that a terminal would obey, a header that the safetensors library does not take so.
"""

from __future__ import annotations

import atexit
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

import safetensors
from hostile.corpus import CASES, make_merge, safetensors_bytes, scalars

from moeplan.architectures import as_dense_model, choose
from moeplan.checkpoint import CONFIG, INDEX, WEIGHTS, open_checkpoint
from moeplan.config import load_config
from moeplan.gates.passages import PassageError, passages
from moeplan.gates.special_tokens import special_tokens
from moeplan.places import CheckpointError
from moeplan.safetensors_header import LENGTH_NBYTES
from moeplan.tokenizer_files import TOKENIZER_CONFIG
from moeplan.yaml_file import ConfigError

Target = Callable[[bytes], None]

_root = Path(tempfile.mkdtemp(prefix="fuzz-"))
atexit.register(rmtree, _root, ignore_errors=True)
make_merge(_root)
_config = (_root / "model" / CONFIG).read_bytes()


def _directory(name: str, **files: bytes) -> Path:
    path = _root / name
    path.mkdir()
    for file, content in files.items():
        (path / file).write_bytes(content)
    return path


def _check_message(error: Exception) -> None:
    message = str(error)
    assert message.replace("\n", "").isprintable(), message
    assert len(message) < 5000, len(message)


_weights = _directory("weights", **{CONFIG: _config})


def header(data: bytes) -> None:
    """The text of a safetensors header, which stands behind the size of the file's data, in a byte."""
    if data:
        weights(safetensors_bytes(data[1:], bytes(data[0])))


def weights(data: bytes) -> None:
    """A safetensors file: its header's length, its header, its data."""
    (_weights / WEIGHTS).write_bytes(data)
    try:
        tensors = open_checkpoint(_weights).tensors
    except CheckpointError as error:
        _check_message(error)
        return
    expected = dict(safetensors.deserialize(data))  # raises where it refuses what was accepted here
    assert tensors.keys() == expected.keys()
    for name, read in tensors.items():
        assert (read.dtype.value, list(read.shape)) == (expected[name]["dtype"], expected[name]["shape"])
        assert data[read.offset : read.offset + read.nbytes] == bytes(expected[name]["data"])


_index = _directory("index", **{CONFIG: _config, "s.safetensors": scalars("a", "b"), "t.safetensors": scalars("c")})


def index(data: bytes) -> None:
    """An index of shards."""
    (_index / INDEX).write_bytes(data)
    try:
        checkpoint = open_checkpoint(_index)
    except CheckpointError as error:
        _check_message(error)
        return
    assert checkpoint.tensors.keys() == json.loads(data)["weight_map"].keys()


_models = _root / "config.yml"
_yaml = load_config(_models, allow_all_same=True)


def config(data: bytes) -> None:
    """A config.json, up to the choice of an output family."""
    file = _root / "model" / CONFIG
    file.write_bytes(data)
    try:
        choose(_yaml, [as_dense_model(open_checkpoint(_root / "model"))] * 3)
    except (CheckpointError, ConfigError) as error:
        _check_message(error)


def yaml(data: bytes) -> None:
    """The user's YAML file."""
    file = _root / "fuzzed.yml"
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_config(file)
        except ConfigError as error:
            _check_message(error)


_tokenizer = _directory("tokenizer")


def tokenizer_config(data: bytes) -> None:
    """A tokenizer_config.json, which names special tokens."""
    (_tokenizer / TOKENIZER_CONFIG).write_bytes(data)
    try:
        special_tokens(_tokenizer)
    except CheckpointError as error:
        _check_message(error)


def json_lines(data: bytes) -> None:
    """A file of JSON lines that passages are drawn from; what is one, is text, too."""
    for name in ("fuzzed.jsonl", "fuzzed.txt"):
        file = _root / name
        file.write_bytes(data)
        try:
            drawn = passages(str(file), "seed", MAX_NBYTES)
        except PassageError as error:
            _check_message(error)
        else:
            "".join(drawn).encode()


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (header, weights, index, config, yaml, tokenizer_config, json_lines)
}

MAX_NBYTES = 4096
"""Of an input. What only size does is in the corpus."""

_FILES = {
    "weights": f"model/{WEIGHTS}",
    "index": f"model/{INDEX}",
    "config": f"model/{CONFIG}",
    "yaml": "config.yml",
    "tokenizer_config": f"model/{TOKENIZER_CONFIG}",
}


def seeds(name: str) -> list[bytes]:
    """What a target is begun with: the true file, and what the corpus puts in its place."""
    if name == "header":
        return [bytes([size]) + text for text, size in map(_header_and_size, seeds("weights"))]
    found = {
        "weights": [scalars("a"), safetensors_bytes({"__metadata__": {"format": "pt"}})],
        "index": [b'{"metadata":{"total_size":12},"weight_map":{"a":"s.safetensors","b":"s.safetensors"}}'],
        "config": [_config],
        "yaml": [_models.read_bytes()],
        "json_lines": [b'{"text": "one"}\n{"id": 1, "text": "two"}\n', "drei, vier fünf".encode(), b"\xff", b"\0"],
        "tokenizer_config": [b'{"bos_token":{"content":"<s>"},"model_max_length":1000}'],
    }[name]
    if name not in _FILES:
        return found
    for case in CASES.values():
        place = Path(tempfile.mkdtemp(dir=_root))
        make_merge(place)
        case.make(place)
        file = place / _FILES[name]
        if file.is_file() and not file.is_symlink() and file.stat().st_size <= MAX_NBYTES:
            found.append(file.read_bytes())
        rmtree(place)
    return list(dict.fromkeys(found))


def _header_and_size(weights: bytes) -> tuple[bytes, int]:
    nbytes = int.from_bytes(weights[:LENGTH_NBYTES], "little")
    text = weights[LENGTH_NBYTES : LENGTH_NBYTES + nbytes]
    return text, min(255, len(weights) - LENGTH_NBYTES - len(text)) if len(weights) > LENGTH_NBYTES else 0


WORDS = [
    *(
        "dtype",
        "shape",
        "data_offsets",
        "__metadata__",
        "F32",
        "BF16",
        "F16",
        "[0,4]",
        "1e999",
        "NaN",
        "-0",
        "[[",
        "{}",
    ),
    *("weight_map", "s.safetensors", "t.safetensors", "../", "/etc/passwd", r"\ud800", r"\u0000", "4294967296"),
    *("model_type", "llama", "mistral", "qwen2", "qwen3", "granite", "num_hidden_layers", "hidden_size", "head_dim"),
    *("rope_scaling", "rope_parameters", "rope_theta", "rope_type", "type", "factor", "longrope", "short_factor"),
    *("yarn", "long_factor", "llama3", "sliding_window", "use_sliding_window", "layer_types", "quantization_config"),
    *(
        "base_model: ",
        "experts: ",
        "- source_model: ",
        "positive_prompts: ",
        "positive_files: ",
        "gate_mode: ",
        "cheap_embed",
        "<<: *a",
    ),
    *(
        "&a ",
        "*a",
        "!!int ",
        "!!python/name:os.system ",
        "---",
        "bos_token",
        "content",
        "text",
        "true",
        "null",
        "1e-3",
        "1:1",
    ),
]
"""What readers know, for the fuzzer to put in."""
