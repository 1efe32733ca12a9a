"""Files and configs as a stranger, or a broken download, would have them, and the reason that each is refused for.

A case changes one thing in a merge that is fine (`make_merge`). test_refusals.py tests each, and the fuzzer begins
from them.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import sparse_llama

from moeplan.checkpoint import CONFIG, INDEX, MAX_INDEX_NBYTES, WEIGHTS
from moeplan.places import MAX_CONFIG_NBYTES
from moeplan.tokenizer_files import MAX_NBYTES, MAX_READ_NBYTES
from moeplan.untrusted_json import MAX_VALUES

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n"
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """`make` spoils the merge in a directory; the message names `file` (of that directory) and has `reason` in it."""

    make: Callable[[Path], object]
    file: str
    reason: str


def info(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A file with this header: an object that becomes JSON, or the header's own bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def scalars(*names: str) -> bytes:
    """A file of true tensors, of four bytes each."""
    return safetensors_bytes(
        {name: info("F32", [1], [4 * n, 4 * n + 4]) for n, name in enumerate(names)}, bytes(4 * len(names))
    )


def write_index(path: Path, weight_map: Any) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


# Headers


def at(begin: int, end: int) -> dict[str, Any]:
    return info("F32", [(end - begin) // 4], [begin, end])


def a(*fields: Any) -> dict[str, Any]:
    return {"a": info(*fields)}


def entry(shape: bytes) -> bytes:
    return b'{"a":{"dtype":"F32","shape":%b,"data_offsets":[0,16]}}' % shape


A = json.dumps(at(0, 4)).encode()

# name: header, size of the data, what the message says
HEADERS: dict[str, tuple[Any, int, str]] = {
    "no JSON object": (b"[]", 0, "its header begins with b'[]', not with '{'"),
    "a pickle": (b"PK\x03\x04", 0, r"its header begins with b'PK\x03\x04'"),
    "empty": (b"", 0, "its header begins with b''"),
    "space first": (b" {}", 0, "its header begins with b' {}'"),
    "JSON cut off": (b'{"a":', 0, "it is not JSON (Expecting value: line 1 column 6"),
    "two documents": (b"{}{}", 0, "it is not JSON (Extra data"),
    "zeros as padding": (b"{}\0\0", 0, "it is not JSON (Extra data"),
    "raw control character": (b'{"a\n":0}', 0, "it is not JSON (Invalid control character"),
    "not UTF-8": (b'{"\xff":0}', 0, "it is not UTF-8 (byte 2)"),
    "encoded surrogate": (b'{"\xed\xa0\x80":0}', 0, "it is not UTF-8 (byte 2)"),
    "half a surrogate pair": (rb'{"__metadata__":{"a":"\ud800"}}', 0, "it holds half of a surrogate pair"),
    "deep lists": (b'{"a":' + b"[" * 100_000, 0, "it is nested more than 64 levels deep"),
    "deep objects": (b'{"a":' * 100_000, 0, "it is nested more than 64 levels deep"),
    "not quite as deep": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", 0, "it is nested more than 64 levels deep"),
    "objects not quite as deep": (b'{"a":' * 65 + b"0" + b"}" * 65, 0, "it is nested more than 64 levels deep"),
    "many numbers": (b'{"a":[' + b"0," * MAX_VALUES + b"0]}", 0, f"it holds more than {MAX_VALUES:,} JSON values"),
    "many lists": (
        b'{"a":[' + b"[0]," * (MAX_VALUES // 2) + b"0]}",
        0,
        f"it holds more than {MAX_VALUES:,} JSON values",
    ),
    "many objects": (
        b'{"a":[' + b'{"b":0},' * (MAX_VALUES // 2) + b"0]}",
        0,
        f"it holds more than {MAX_VALUES:,} JSON values",
    ),
    "a tensor twice": (b'{"a":%b,"a":%b}' % (A, A), 4, "it has the key 'a' twice"),
    "a key twice": (b'{"a":{"dtype":"F32","dtype":"F32"}}', 0, "it has the key 'dtype' twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "it has the key '__metadata__' twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__ must map text to text"),
    "metadata no map": ({"__metadata__": ["a"]}, 0, "__metadata__ must map text to text"),
    "metadata null": ({"__metadata__": None}, 0, "__metadata__ must map text to text"),
    "tensor no object": ({"a": [1]}, 0, "'a' must have dtype, shape and data_offsets and nothing else, not [1]"),
    "key missing": ({"a": {"dtype": "F32"}}, 0, "'a' must have dtype, shape and data_offsets and nothing else"),
    "key unknown": ({"a": {**at(0, 4), "strides": [1]}}, 4, "'a' must have dtype, shape and data_offsets and"),
    "dtype no text": (a(32), 16, "tensor 'a' has the dtype 32, which is not text"),
    "dtype unknown": (a("F99"), 16, "holds tensor 'a' as 'F99'; moeplan reads F32, F16 and BF16"),
    "dtype lower case": (a("f32"), 16, "holds tensor 'a' as 'f32'; moeplan reads F32, F16 and BF16"),
    "dtype FP8": (a("F8_E4M3", [4], [0, 4]), 4, "holds tensor 'a' as 'F8_E4M3'; moeplan reads F32, F16 and BF16"),
    "dtype integer": (a("I64", [1], [0, 8]), 8, "'I64'; moeplan reads F32, F16 and BF16: dequantise or convert"),
    "shape no list": (a("F32", 4), 16, "'a' has the shape 4, which is not a list of whole numbers"),
    "shape of text": (a("F32", ["4"]), 16, "'a' has the shape ['4'], which is not a list of whole numbers"),
    "shape of fractions": (a("F32", [4.0]), 16, "'a' has the shape [4.0], which is not a list of whole numbers"),
    "shape of booleans": (a("F32", [True, 4]), 16, "'a' has the shape [True, 4], which is not a list of whole"),
    "shape negative": (a("F32", [-2, -2]), 16, "'a' has the shape [-2, -2], which is not a list of whole"),
    "shape minus zero": (entry(b"[-0]"), 16, "'a' has the shape [-0.0], which is not a list of whole numbers"),
    "shape of exponents": (entry(b"[4e0]"), 16, "'a' has the shape [4.0], which is not a list of whole numbers"),
    "shape of 5000 digits": (entry(b"[%b]" % (b"9" * 5000)), 16, "which is beyond what a float can be"),
    "shape NaN": (a("F32", [NAN]), 16, "it is not JSON: it holds NaN"),
    "shape infinite": (a("F32", [INF]), 16, "it is not JSON: it holds Infinity"),
    "shape overflows to 0": (a("F32", [2**32, 2**32], [0, 0]), 0, "its size overflows 64 bits"),
    "shape overflows before 0": (a("F32", [2**62, 0], [0, 0]), 0, "its size overflows 64 bits"),
    "shape overflows after 0": (a("F32", [0, 2**64], [0, 0]), 0, "its size overflows 64 bits"),
    "offsets no list": (a("F32", [4], "0:16"), 16, "'a' has the data_offsets '0:16', which are not two whole"),
    "one offset": (a("F32", [4], [16]), 16, "'a' has the data_offsets [16], which are not two whole numbers"),
    "three offsets": (a("F32", [4], [0, 8, 16]), 16, "'a' has the data_offsets [0, 8, 16], which are not two"),
    "offset negative": (a("F32", [4], [-16, 0]), 16, "'a' has the data_offsets [-16, 0], which are not two"),
    "offset boolean": (a("F32", [4], [False, 16]), 16, "'a' has the data_offsets [False, 16], which are not"),
    "offset null": (a("F32", [4], [None, 16]), 16, "'a' has the data_offsets [None, 16], which are not two"),
    "offset beyond 64 bits": (a("F32", [4], [0, 10**20]), 16, "'a' has the data_offsets [0, 1e+20], which are not"),
    "offsets backwards": (a("F32", [4], [16, 0]), 16, "'a' has data_offsets that run backwards: [16, 0]"),
    "too many bytes": (a("F32", [4], [0, 20]), 20, "'a' takes 16 bytes as F32 [4], but its data_offsets hold 20"),
    "too few bytes": (a("BF16", [9], [0, 16]), 16, "'a' takes 18 bytes as BF16 [9], but its data_offsets hold 16"),
    "hole at the start": (a("F32", [1], [4, 8]), 8, "'a' leaves a hole of 4 bytes before it"),
    "hole": ({"a": at(0, 4), "b": at(8, 12)}, 12, "'b' leaves a hole of 4 bytes before it"),
    "overlap": ({"a": at(0, 8), "b": at(4, 12)}, 12, "'b' overlaps tensor 'a'"),
    "one range twice": ({"a": at(0, 4), "b": at(0, 4)}, 4, "'b' overlaps tensor 'a'"),
    "data cut off": ({"a": at(0, 4000)}, 3000, "is truncated: its header describes 4,075 bytes, the file has 3,075"),
    "no data": ({"a": at(0, 4)}, 0, "is truncated: its header describes 73 bytes, the file has 69"),
    "data too long": ({"a": at(0, 4)}, 9, "is 5 bytes longer than its header describes"),
    "data of nobody": ({}, 9, "is 9 bytes longer than its header describes"),
    "terminal codes in a name": ({"\x1b[2J\u202e": [1]}, 0, r"tensor '\x1b[2J\u202e' must have"),
    "endless name": ({"a" * 100_000: [1]}, 0, "aaaaaaaa...aaaaaaaa"),
}

FILES = {
    "empty": (b"", "is not a safetensors file: it has 0 bytes"),
    "7 bytes": (bytes(7), "is not a safetensors file: it has 7 bytes"),
    "an error page": (b"<!DOCTYPE html>", "is truncated, or not a safetensors file: its header would take 5,7"),
    "a length that lies": (b"\xe8\3" + bytes(6) + b"{}", "its header would take 1,000 bytes, the file has 10"),
    "the longest length": (b"\xff" * 8 + b"{}", f"its header would take {2**64 - 1:,} bytes, the file has 10"),
    "a git-LFS pointer": (LFS_POINTER, "is a git-LFS pointer, not the file itself; `git lfs pull`"),
}


# The index


def index_of(weight_map: Any) -> Callable[[Path], None]:
    return lambda path: write_index(path, weight_map)


def shards_of(weight_map: dict[str, str], held: dict[str, list[str]]) -> Callable[[Path], None]:
    """An index, and shards that hold something else."""

    def make(path: Path) -> None:
        write_index(path, weight_map)
        for shard, names in held.items():
            (path / shard).write_bytes(scalars(*names))

    return make


def link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write_index(path, {"a": "s.safetensors"})
        (path.parent / "outside").write_bytes(scalars("a"))
        (path / "s.safetensors").symlink_to(target)

    return make


S, T = "s.safetensors", "t.safetensors"

INDEXES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not JSON": (lambda path: (path / INDEX).write_text("weight_map"), f"{INDEX}: is not JSON"),
    "a list": (lambda path: (path / INDEX).write_text("[]"), f"{INDEX}: is not a JSON object but []"),
    "a git-LFS pointer": (lambda path: (path / INDEX).write_bytes(LFS_POINTER), f"{INDEX}: is a git-LFS pointer"),
    "too long": (
        lambda path: (path / INDEX).write_bytes(b"{" + b" " * MAX_INDEX_NBYTES),
        f"{INDEX}: is larger than {MAX_INDEX_NBYTES:,} bytes",
    ),
    "no map": (lambda path: (path / INDEX).write_text("{}"), f"{INDEX}: has no `weight_map`"),
    "an empty map": (index_of({}), f"{INDEX}: has no `weight_map`"),
    "a map that is a list": (index_of([S]), f"{INDEX}: has no `weight_map`"),
    "a tensor twice": (
        lambda path: (path / INDEX).write_text('{"weight_map":{"a":"s.safetensors","a":"t.safetensors"}}'),
        f"{INDEX}: has the key 'a' twice",
    ),
    "a number": (index_of({"a": 1}), f"{INDEX}: tensor 'a' is mapped to 1, which is no file name"),
    "a parent": (index_of({"a": "../../etc/passwd"}), "'../../etc/passwd'; shards must be plain names"),
    "an absolute path": (index_of({"a": "/etc/passwd"}), "'/etc/passwd'; shards must be plain names"),
    "a sub-directory": (index_of({"a": f"x/../../{S}"}), "shards must be plain names"),
    "a backslash": (index_of({"a": f"..\\{S}"}), "shards must be plain names"),
    "a NUL": (index_of({"a": f"\0{S}"}), r"'\x00s.safetensors'; shards must be plain names"),
    "half a surrogate pair": (index_of({"a": f"\udcff{S}"}), f"{INDEX}: holds half of a surrogate pair"),
    "dots": (index_of({"a": ".."}), "is mapped to '..', not to a .safetensors file"),
    "a pickle": (index_of({"a": "pytorch_model.bin"}), "'pytorch_model.bin', not to a .safetensors file"),
    "a long name": (index_of({"a": "a" * 5000 + S}), "shards must be plain names"),
    "many tensors": (index_of({f"{n}": S for n in range(70_000)}), f"{INDEX}: names 70,000 tensors; at most 65,536"),
    "many shards": (index_of({f"{n}": f"{n}.safetensors" for n in range(5000)}), "names 5,000 shards; at most 4,096"),
    "a missing shard": (index_of({"a": S}), f"{S}: is not there, or links to nothing; is the download complete?"),
    "a missing tensor": (
        shards_of({"a": S, "b": S}, {S: ["a"]}),
        f"{S}: tensor 'b' is not there; {INDEX} says that it is",
    ),
    "a tensor elsewhere": (shards_of({"a": S, "b": T}, {S: ["b"], T: ["a"]}), f"{S}: tensor 'a' is not there"),
    "a tensor too many": (
        shards_of({"a": S}, {S: ["a", "b"]}),
        f"{S}: holds tensor 'b', which {INDEX} does not list",
    ),
    "a tensor in two shards": (
        shards_of({"a": S, "b": T}, {S: ["a", "b"], T: ["b"]}),
        f"{S}: holds tensor 'b', which {INDEX} maps to {T}",
    ),
    "a link to the parent": (link_to("../outside"), f"{S}: is a symbolic link out of the checkpoint, to "),
    "a link to a device": (link_to("/dev/zero"), f"{S}: is a symbolic link out of the checkpoint, to '/dev/zero'"),
    "a link to itself": (link_to(S), f"{S}: cannot be read (Too many levels of symbolic links)"),
    "a link to nothing": (link_to("nothing"), f"{S}: is not there, or links to nothing"),
    "a link to a blob that is no snapshot's": (link_to("../../blobs/x"), f"{S}: is not there, or links to nothing"),
}


# config.json

CONFIGS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "is not there, or links to nothing"),
    "empty": (b"", "is not JSON (Expecting value"),
    "a list": (b"[]", "is not a JSON object but []"),
    "text": (b'"llama"', "is not a JSON object but 'llama'"),
    "NaN": (b'{"model_type":"llama","rope_theta":NaN}', "is not JSON: it holds NaN"),
    "not UTF-8": (b'{"model_type":"\xe9"}', "is not UTF-8 (byte 15)"),
    "UTF-16": ('{"model_type":"llama"}'.encode("utf-16"), "is not UTF-8 (byte 0)"),
    "a key twice": (b'{"vocab_size":8,"model_type":"llama","model_type":"mistral"}', "has the key 'model_type' twice"),
    "deep": (b'{"a":' * 100_000, "is nested more than 64 levels deep"),
    "too long": (b"{" + b" " * MAX_CONFIG_NBYTES, f"is larger than {MAX_CONFIG_NBYTES:,} bytes"),
    "a git-LFS pointer": (LFS_POINTER, "is a git-LFS pointer"),
    "no model_type": (b"{}", "`model_type` must be text, not None"),
    "a model_type that is a number": (b'{"model_type":1}', "`model_type` must be text, not 1"),
    "quantised": (
        b'{"model_type":"llama","quantization_config":{"quant_method":"gptq","bits":4}}',
        "the model is quantised (`quantization_config`: 'gptq')",
    ),
    "quantised somehow": (b'{"model_type":"llama","quantization_config":[]}', "the model is quantised"),
    "other weights": (
        b'{"model_type":"llama","transformers_weights":"x.safetensors"}',
        f"`transformers_weights` says that 'x.safetensors' holds the weights, but moeplan reads {WEIGHTS}",
    ),
}

# Settings that stand in a config.json which is JSON: each key with its value as text, and what the message says of it.

SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "a number beyond floats": (
        {"rms_norm_eps": "1e999"},
        "holds the number '1e999', which is beyond what a float can be",
    ),
    "a number below floats": ({"rope_theta": "-1e999"}, "holds the number '-1e999'"),
    "10^12 layers": ({"num_hidden_layers": "1" + 12 * "0"}, "`num_hidden_layers` is 1000000000000; it must be a whole"),
    "10^400 layers": ({"num_hidden_layers": "1" + 400 * "0"}, "'1000000000000000000000000000000000000000000000"),
    "no layers": ({"num_hidden_layers": "0"}, "`num_hidden_layers` is 0; it must be a whole number from 1"),
    "layers that are text": ({"num_hidden_layers": '"2"'}, "`num_hidden_layers` is '2'; it must be a whole number"),
    "layers that are true": ({"num_hidden_layers": "true"}, "`num_hidden_layers` is True; it must be a whole number"),
    "a size with a fraction": ({"hidden_size": "64.0"}, "`hidden_size` is 64.0; it must be a whole number"),
    "a negative size": ({"intermediate_size": "-96"}, "`intermediate_size` is -96; it must be a whole number"),
    "a size beyond 31 bits": ({"vocab_size": "4294967296"}, "`vocab_size` is 4294967296; it must be a whole number"),
    "heads in a list": ({"num_attention_heads": "[4]"}, "`num_attention_heads` is [4]; it must be a whole number"),
    "no heads": ({"num_attention_heads": "0"}, "`num_attention_heads` is 0; it must be a whole number"),
    "more heads than dimensions": (
        {"num_attention_heads": "1000"},
        "`num_attention_heads` is 1000; it must be at",
    ),
    "a context of a zillion": ({"max_position_embeddings": "1e18"}, "`max_position_embeddings` is 1e+18; it must be"),
    "another size than the tensors": ({"hidden_size": "32"}, "has shape [384, 64], and config.json makes it [384, 32]"),
    "another number of layers": (
        {"num_hidden_layers": "3"},
        "there is no tensor model.layers.2.input_layernorm",
    ),
    "fewer layers than tensors": ({"num_hidden_layers": "1"}, "cannot hold 'model.layers.1.input_layernorm.weight'"),
    "a family that nobody knows": ({"model_type": r'"\u001b[2Jx"'}, "models of type '\\x1b[2Jx' cannot be merged"),
    "a family of 1 MB": ({"model_type": '"' + 10**6 * "x" + '"'}, "models of type 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"),
    "an activation that nobody knows": (
        {"hidden_act": '"os.system"'},
        "`hidden_act` is 'os.system'; it must be the",
    ),
    "an activation that is an object": ({"hidden_act": "{}"}, "`hidden_act` is {}; it must be the name"),
    "a norm that is text": ({"rms_norm_eps": '"1e-5"'}, "`rms_norm_eps` is '1e-5'; it must be a number from 0 to 1"),
    "dropout of 500 %": ({"attention_dropout": "5"}, "`attention_dropout` is 5; it must be a number from 0 to 1"),
    "logits divided by nothing": (
        {"model_type": '"granite"', "logits_scaling": "0"},
        "`logits_scaling` is 0; it must be a number other than 0",
    ),
    "a switch that is text": (
        {"tie_word_embeddings": '"no"'},
        "`tie_word_embeddings` is 'no'; it must be true or",
    ),
    "a token that is text": ({"bos_token_id": '"<s>"'}, "`bos_token_id` is '<s>'; it must be a token's id, or null"),
    "a token of another model": (
        {"pad_token_id": "384"},
        "`pad_token_id` is 384; it must be below vocab_size",
    ),
    "ends that are no ids": (
        {"eos_token_id": '[2, "x"]'},
        "`eos_token_id` is [2, 'x']; it must be a token's id",
    ),
    "a RoPE base that is infinite": ({"rope_theta": "1e300"}, "rope_theta is 1e+300; it must be a number above 0"),
    "a RoPE base that is text": ({"rope_theta": '"x"'}, "rope_theta is 'x'; it must be a number above 0"),
    "RoPE that is a list": (
        {"rope_scaling": "[1]"},
        "rope parameters that differ between layers cannot be",
    ),
    "RoPE of a list's type": ({"rope_scaling": '{"type":["x"]}'}, "RoPE scaling of type ['x'] cannot be held"),
    "a RoPE factor that is true": (
        {"rope_scaling": '{"type":"linear","factor":true}'},
        "the RoPE parameter 'factor' is True; it must be a number above 0",
    ),
    "RoPE without its factor": ({"rope_scaling": '{"type":"yarn"}'}, "RoPE scaling of type 'yarn' has no factor"),
    "RoPE by nothing": (
        {"rope_scaling": '{"type":"linear","factor":0}'},
        "the RoPE parameter 'factor' is 0; it must be a number above 0",
    ),
    "RoPE by text": (
        {"rope_scaling": '{"type":"dynamic","factor":"big"}'},
        "the RoPE parameter 'factor' is 'big'; it must be a number above 0",
    ),
    "RoPE with a list of another length": (
        {"rope_scaling": '{"type":"longrope","short_factor":[1],"long_factor":[1]}'},
        "the RoPE parameter 'short_factor' is [1]; it must be a list of head_dim / 2 = 8 numbers",
    ),
    "RoPE with a list for a number": (
        {"rope_scaling": '{"type":"yarn","factor":2,"beta_fast":[32]}'},
        "the RoPE parameter 'beta_fast' is [32]; it must be a number, text, or true or false",
    ),
    "RoPE for a part of a head": ({"partial_rotary_factor": '"half"'}, "partial_rotary_factor is 'half'; the merged"),
}


# What is no plain file of the checkpoint's own


def linked(name: str, target: str, content: bytes = b"{}") -> Callable[[Path], None]:
    """A file of the model that is really another one."""

    def make(root: Path) -> None:
        (root / "secret").write_bytes(content)
        (root / "model" / name).unlink(missing_ok=True)
        (root / "model" / name).parent.mkdir(exist_ok=True)
        (root / "model" / name).symlink_to(target)

    return make


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else where a file of the merge stood."""

    def replace(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        make(root / name)

    return replace


def content(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(text.encode() if isinstance(text, str) else text)


def sparse(nbytes: int) -> Callable[[Path], None]:
    """A file of so many bytes, which takes none."""

    def make(file: Path) -> None:
        file.touch()
        os.truncate(file, nbytes)

    return make


OUT_OF_IT = "is a symbolic link out of the checkpoint, to "
NO_FILE = "is not a regular file"

KINDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    f"{name} is {what}": (instead(f"model/{name}", make), f"model/{name}", NO_FILE)
    for name in (WEIGHTS, CONFIG, "tokenizer.json", "generation_config.json")
    for what, make in {"a FIFO": os.mkfifo, "a directory": Path.mkdir}.items()
} | {
    "weights elsewhere": (linked(WEIGHTS, "../secret", scalars("a")), f"model/{WEIGHTS}", OUT_OF_IT),
    "a device for weights": (linked(WEIGHTS, "/dev/zero"), f"model/{WEIGHTS}", f"{OUT_OF_IT}'/dev/zero'"),
    "a config elsewhere": (linked(CONFIG, "/etc/passwd"), f"model/{CONFIG}", f"{OUT_OF_IT}'/etc/passwd'"),
    "a tokenizer elsewhere": (linked("tokenizer.json", "../secret"), "model/tokenizer.json", OUT_OF_IT),
    "a tokenizer that is a secret": (
        linked("tokenizer_config.json", "/etc/passwd"),
        "model/tokenizer_config.json",
        f"{OUT_OF_IT}'/etc/passwd'",
    ),
    "a chat template that is a secret": (
        linked("chat_template.jinja", "/etc/hostname"),
        "model/chat_template.jinja",
        f"{OUT_OF_IT}'/etc/hostname'",
    ),
    "one of several chat templates elsewhere": (
        linked("additional_chat_templates/x.jinja", "../../secret"),
        "model/additional_chat_templates/x.jinja",
        OUT_OF_IT,
    ),
    "chat templates in a directory elsewhere": (
        lambda root: (root / "model" / "additional_chat_templates").symlink_to(_templates(root)),
        "model/additional_chat_templates/t.jinja",
        OUT_OF_IT,
    ),
    "a blob of another repository": (
        lambda root: _in_hub(root, "../../../models--other--one/blobs/0c"),
        "models--org--name/snapshots/1/model.safetensors",
        OUT_OF_IT,
    ),
    "a device for generation settings": (
        linked("generation_config.json", "/dev/tty"),
        "model/generation_config.json",
        f"{OUT_OF_IT}'/dev/tty'",
    ),
    "a tokenizer that is gone": (
        linked("tokenizer.json", "gone"),
        "model/tokenizer.json",
        "is not there, or links to nothing; is the download complete? (use --no-copy-tokenizer",
    ),
    "a tokenizer of 1 TB": (
        instead("model/tokenizer.json", sparse(10**12)),
        "model/tokenizer.json",
        f"is larger than {MAX_NBYTES:,} bytes (use --no-copy-tokenizer",
    ),
    "weights of 1 TB": (
        instead(f"model/{WEIGHTS}", sparse(10**12)),
        f"model/{WEIGHTS}",
        "is not a safetensors file: its header begins with b'', not with",
    ),
    "a config of 1 TB": (
        instead(f"model/{CONFIG}", sparse(10**12)),
        f"model/{CONFIG}",
        "larger than 1,048,576 bytes",
    ),
    "a YAML file of 1 TB": (instead("config.yml", sparse(10**12)), "config.yml", "larger than 1 MiB: is this really"),
    "a socket for YAML": (
        instead("config.yml", lambda file: os.mknod(file, stat.S_IFSOCK | 0o600)),
        "config.yml",
        "is neither a file nor a pipe",
    ),
    "a device for YAML": (
        instead("config.yml", lambda file: file.symlink_to("/dev/zero")),
        "config.yml",
        "larger than 1 MiB: is this really",
    ),
    "a pickle for weights": (
        lambda root: (root / "model" / WEIGHTS).rename(root / "model" / "pytorch_model.bin"),
        "pytorch_model.bin",
        "is no file of torch.save: it begins with",
    ),
}


def _templates(root: Path) -> Path:
    (root / "secrets").mkdir()
    (root / "secrets" / "t.jinja").touch()
    return root / "secrets"


def _in_hub(root: Path, target: str) -> None:
    """The model as the Hub's cache has it, but for its weights, which are really `target`."""
    repository, other = root / "models--org--name", root / "models--other--one" / "blobs"
    other.mkdir(parents=True)
    (other / "0c").write_bytes((root / "model" / WEIGHTS).read_bytes())
    (repository / "snapshots").mkdir(parents=True)
    snapshot = (root / "model").rename(repository / "snapshots" / "1")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(target)
    write_merge(root, base="models--org--name/snapshots/1")


# Tokenizers, which prompts are read with


def tokenizer(**changes: Any) -> str:
    """A tokenizer.json of words, with these parts otherwise."""
    parts = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {"<unk>": 0, "<s>": 1, "prompt": 2, "1": 3, "2": 4},
            "unk_token": "<unk>",
        },
    }
    return json.dumps({**parts, **changes})


def split_at(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


GROWTH = {"type": "Replace", "pattern": {"Regex": "."}, "content": 100 * "a"}
UNUSABLE = "is not a tokenizer that can be used: "
TOO_MUCH = "for the prompts"

TOKENIZERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    f"a tokenizer that {what}": (content("model/tokenizer.json", text), "model/tokenizer.json", reason)
    for what, text, reason in [
        ("is empty", "", UNUSABLE),
        ("is no JSON", "<html>", f"{UNUSABLE}ValueError: Cannot instantiate Tokenizer from buffer: expected value"),
        ("is a list", "[]", f"{UNUSABLE}ValueError: Cannot instantiate Tokenizer from buffer: invalid type"),
        ("is deep", '{"model":' + 10**5 * "[", f"{UNUSABLE}ValueError: Cannot instantiate Tokenizer from buffer: rec"),
        (
            "has no words",
            tokenizer(model={"type": "WordLevel", "vocab": {}, "unk_token": "?"}),
            "Missing [UNK] token",
        ),
        (
            "makes the library panic",
            tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "Panic",
        ),
        (
            "backtracks for ever",
            tokenizer(pre_tokenizer=split_at("^(.+)+(.+)+(.+)+$(?<=x)")),
            "Onig: Regex search error",
        ),
        ("multiplies prompts", tokenizer(normalizer={"type": "Sequence", "normalizers": 6 * [GROWTH]}), TOO_MUCH),
        (
            "makes many tokens",
            tokenizer(
                normalizer={"type": "Sequence", "normalizers": 2 * [GROWTH]},
                pre_tokenizer=split_at("."),
            ),
            "the prompts become more than ",
        ),
    ]
} | {
    "a tokenizer of more than is read": (
        instead("model/tokenizer.json", sparse(MAX_READ_NBYTES + 1)),
        "model/tokenizer.json",
        f"is larger than {MAX_READ_NBYTES:,} bytes; a real one is not",
    ),
    "a token beyond the embeddings": (
        content(
            "model/tokenizer.json",
            tokenizer(model={"type": "WordLevel", "vocab": {"<s>": 0, "?": 10**9}, "unk_token": "?"}),
        ),
        "config.yml:5",
        "experts[0].positive_prompts[0]: the prompt 'prompt 1' has token 1000000000, and the embeddings of model have",
    ),
    "a token beyond the embeddings, in a shared expert": (
        lambda root: _with_shared_prompt(root, "unknown"),
        "config.yml:10",
        "shared_experts[0].negative_prompts[0]: the prompt 'unknown' has token 1000000000",
    ),
    "a sentencepiece model that is none": (
        lambda root: (root / "model" / "tokenizer.json").rename(root / "model" / "tokenizer.model"),
        "model/tokenizer.model",
        "is not a sentencepiece model; download it again",
    ),
    "a sentencepiece model elsewhere": (
        lambda root: (linked("tokenizer.model", "/etc/passwd")(root), (root / "model" / "tokenizer.json").unlink()),
        "model/tokenizer.model",
        f"{OUT_OF_IT}'/etc/passwd'",
    ),
    "no tokenizer": (
        lambda root: (root / "model" / "tokenizer.json").unlink(),
        "model",
        "there is no tokenizer (tokenizer.json or tokenizer.model) to read text with",
    ),
    "a BOS token that is a list": (
        content("model/tokenizer_config.json", '{"bos_token":["<s>"]}'),
        "model/tokenizer_config.json",
        "bos_token is ['<s>']; it must be text, or null",
    ),
    "a BOS token that is none": (
        content("model/tokenizer_config.json", '{"bos_token":{"content":"<bos>"}}'),
        "model/tokenizer_config.json",
        "bos_token '<bos>' is not a token of tokenizer.json",
    ),
    "a tokenizer's settings with a number beyond floats": (
        content("model/tokenizer_config.json", '{"model_max_length":1e400}'),
        "model/tokenizer_config.json",
        "holds the number '1e400', which is beyond what a float can be",
    ),
    "a tokenizer's settings of many values": (
        content("model/tokenizer_config.json", '{"a":[' + "[]," * MAX_VALUES + "0]}"),
        "model/tokenizer_config.json",
        f"holds more than {MAX_VALUES:,} JSON values",
    ),
}


def _with_shared_prompt(root: Path, prompt: str) -> None:
    words = {"<s>": 0, "prompt": 1, "1": 2, "2": 3, "?": 10**9}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "?"}
    (root / "model" / "tokenizer.json").write_text(tokenizer(model=model))
    text = YAML.replace("random", "cheap_embed").replace(", aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "")
    shared = (
        f"shared_experts:\n  - source_model: model\n    negative_prompts: [{prompt}]\n    positive_prompts: [prompt]\n"
    )
    (root / "config.yml").write_text(text + shared)


# Files that passages are drawn from, by their names

PASSAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "none": ("text.txt", lambda file: None, "cannot be read: No such file or directory"),
    "a device": ("text.txt", lambda file: file.symlink_to("/dev/zero"), "is not a regular file"),
    "a pipe": ("text.txt", os.mkfifo, "is not a regular file"),
    "a directory": ("text.txt", Path.mkdir, "is not a regular file"),
    "4 TB of nothing": ("text.txt", sparse(4 << 40), "is not text; name a file of text, or of JSON lines"),
    "4 TB of no lines": ("text.jsonl", sparse(4 << 40), "is longer than 1 MiB; write a JSON object with a `text`"),
    "not UTF-8": ("text.txt", lambda file: file.write_bytes(b"gr\xfc\xdfe"), "is not UTF-8 text (near byte 2)"),
    "empty": ("text.txt", Path.touch, "there is no text in it"),
    "lists": ("text.jsonl", lambda file: file.write_text("[1]\n"), "is not a JSON object but [1]"),
    "deep lists": (
        "text.jsonl",
        lambda file: file.write_text('{"a":' + "[" * 100_000),
        "is nested more than 64 levels",
    ),
    "no text": ("text.jsonl", lambda file: file.write_text('{"content":"a"}'), "line 1 has no `text`; write a JSON"),
    "a text that is a number": ("text.jsonl", lambda file: file.write_text('{"text":1}'), "`text` is 1; write a JSON"),
}


# The YAML file

YAML = """\
base_model: model
gate_mode: random
experts:
  - source_model: model
    positive_prompts: [prompt 1, aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab]
  - source_model: model
    positive_prompts: [prompt 2]
"""
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(20)
)

YAMLS: dict[str, tuple[str | bytes, str, str]] = {
    "empty": ("", "", "empty: write base_model and experts"),
    "a list": ("- a", ":1", "must be a mapping of keys such as base_model and experts"),
    "not UTF-8": (YAML.encode("utf-16"), ":1", "not UTF-8 text (byte 0xff)"),
    "a control character": (YAML + "x: \x07\n", ":8", "the character U+0007 cannot stand in YAML"),
    "not YAML": (YAML + "x: [\n", ":9", "not valid YAML: while parsing a flow node"),
    "an escape that is no character": (YAML + 'x: "\\UFFFFFFFF"\n', ":8", "the number of a \\U escape or"),
    "a billion laughs": (LAUGHS, ":5", "more than 25,000 values, counting each alias as all that it stands for"),
    "deep lists": (YAML + "x: " + 500_000 * "[", ":8", "nested more than 32 levels deep"),
    "an alias of itself": (YAML + "x: &a [*a]\n", ":8", "the alias *a is part of what it stands for"),
    "a tag that runs a command": (
        YAML + "x: !!python/object/apply:os.system [touch pwned]\n",
        ":8",
        "the tag !!python/object/apply:os.system is not one that a config may use",
    ),
    "a tag of its own": (YAML + "x: !evil {}\n", ":8", "the tag !evil is not one"),
    "two documents": (YAML + "---\n" + YAML, ":8", "a second document begins here"),
    "a key twice": (YAML + "base_model: other\n", ":8", "base_model: written twice, first on line 1"),
    "a number of 200,000 digits": (YAML + f"experts_per_token: {200_000 * '9'}\n", ":8", "YAML takes 9999999999999999"),
    "a number in base 60": (YAML + f"experts_per_token: 1{200_000 * ':1'}\n", ":8", "YAML takes 1:1:1:1:1:1:1:1:1:1"),
    "10^12 experts per token": (YAML + "experts_per_token: 1000000000000\n", ":8", "1000000000000 is more than the"),
    "infinite noise": (YAML + "    noise_scale: .inf\n", ":8", "must be a number from 0 to 3.4e38"),
    "a number for a prompt": (YAML.replace("prompt 2", "42"), ":7", "must be text, but YAML reads 42 as a number"),
    "half a surrogate pair": (YAML.replace("prompt 2", r'"\ud800"'), ":7", "holds half of a surrogate pair"),
    "a NUL in a path": (YAML.replace("base_model: model", r'base_model: "a\0b"'), ":1", "names no model: write"),
    "a path of a megabyte": (
        YAML.replace("base_model: model", f"base_model: {'a+' * 500_000}"),
        ":1",
        "more than 4,096 c",
    ),
    "terminal codes in a path": (
        YAML.replace("base_model: model", r'base_model: "\e[2J"'),
        ":1",
        r"'\x1b[2J': is not the path of a directory",
    ),
    "a path of 4,000 characters": (
        YAML.replace("base_model: model", f"base_model: {4000 * 'a'}"),
        ":1",
        "name too long",
    ),
    "a device for a model": (YAML.replace("base_model: model", "base_model: /dev/zero"), ":1", "/dev/zero: is a file,"),
    "60,000 wrong keys": (YAML + "".join(f"k{n}: 1\n" for n in range(60_000)), ":", "more than 25,000 values"),
}


# A merge that is fine, and what becomes of it


def write_merge(root: Path, *, base: str = "model", gate_mode: str = "random") -> None:
    (root / "config.yml").write_text(
        YAML.replace("base_model: model", f"base_model: {base}").replace("random", gate_mode)
    )


def make_merge(root: Path) -> None:
    """A model, its tokenizer, and the YAML file that merges it with itself, in the directory `root`."""
    sparse_llama(root / "model")
    (root / "model" / "tokenizer.json").write_text(tokenizer())
    (root / "model" / "tokenizer_config.json").write_text('{"bos_token":"<s>"}')
    write_merge(root)


def _with_settings(root: Path, settings: dict[str, str]) -> None:
    file = root / "model" / CONFIG
    kept = {key: json.dumps(value) for key, value in json.loads(file.read_text()).items()}
    file.write_text("{" + ",".join(f'"{key}":{value}' for key, value in (kept | settings).items()) + "}")


def _without_weights(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / "model" / WEIGHTS).unlink()
        make(root / "model")

    return spoil


def _with_prompts(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        write_merge(root, gate_mode="cheap_embed")
        make(root)

    return spoil


def _with_passages(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        (root / "config.yml").write_text(
            YAML.replace("random", "ridge").replace("positive_prompts: [prompt 2]", f"positive_files: [{root / name}]")
        )
        make(root / name)

    return spoil


def _cases() -> Iterator[tuple[str, Case]]:
    weights, config = f"model/{WEIGHTS}", f"model/{CONFIG}"
    for name, (header, data_nbytes, reason) in HEADERS.items():
        yield f"header: {name}", Case(content(weights, safetensors_bytes(header, bytes(data_nbytes))), weights, reason)
    for name, (file, reason) in FILES.items():
        yield f"weights: {name}", Case(content(weights, file), weights, reason)
    for name, (make, reason) in INDEXES.items():
        yield f"index: {name}", Case(_without_weights(make), "model/", reason)
    for name, (text, reason) in CONFIGS.items():
        spoil = instead(config, lambda file: None) if text is None else content(config, text)
        yield f"config.json: {name}", Case(spoil, config, reason)
    for name, (settings, reason) in SETTINGS.items():
        yield f"setting: {name}", Case(lambda root, s=settings: _with_settings(root, s), "model", reason)
    for name, (make, file, reason) in KINDS.items():
        yield f"kind: {name}", Case(make, file, reason)
    for name, (make, file, reason) in TOKENIZERS.items():
        yield f"tokenizer: {name}", Case(_with_prompts(make), file, reason)
    for name, (file, make, reason) in PASSAGES.items():
        yield f"passages: {name}", Case(_with_passages(file, make), "config.yml:7", reason)
    for name, (text, line, reason) in YAMLS.items():
        yield f"YAML: {name}", Case(content("config.yml", text), f"config.yml{line}", reason)


CASES = dict(_cases())
