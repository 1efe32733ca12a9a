"""Checkpoints: a source model, opened by reading its `config.json` and its headers, never its weights.

Weights are safetensors, or the `.bin` files of `torch.save`. Whatever says in them which bytes are which tensor is
called their header here.

Everything in it may come from a stranger, so every file is read in bounded time and memory, and nothing is executed.
What is wrong is a CheckpointError that names the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moeplan.adapter_config import ADAPTER_CONFIG
from moeplan.places import (
    INSTEAD_OF_GGUF,
    LFS_POINTER,
    MAX_CONFIG_NBYTES,
    CheckpointError,
    Place,
    as_place,
    read_json,
    refuse_lfs_pointer,
)
from moeplan.safetensors_header import LENGTH_NBYTES, HeaderError, parse_header
from moeplan.torch_archive import ArchiveError, read_archive
from moeplan.untrusted_json import show
from planner.expr import DType, Read, Shape, Source

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_WEIGHTS = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
PREFERRED = (WEIGHTS, INDEX, BIN_WEIGHTS, BIN_INDEX)
"""What may say where the weights are. The first that is there counts, as in transformers."""

MAX_INDEX_NBYTES = 8 * 2**20
MAX_HEADERS_NBYTES = 8 * 2**20
"""The most bytes of headers, over all shards, that a checkpoint may have.

The format allows 100 MB a file, which Python would turn into gigabytes of objects. The largest honest case, 128 experts
of a 70B model, is 31,000 tensors in 4 MB of headers; a dense model of 70B has 0.1 MB.
"""
MAX_TENSORS = 2**16
MAX_SHARDS = 2**12
MAX_REMEMBERED_HEADERS = 2**8
"""Models that were trained from one and saved alike have the same headers: each is parsed once. 405B has 191 shards."""

MISTRAL_WEIGHTS = "consolidated.safetensors"
_INSTEAD_OF_PICKLE = "convert it to safetensors first (load it with transformers, then save_pretrained)"
_INSTEAD = {
    ".safetensors": f"if it is one of several shards, download {INDEX} too; if it is the whole, name it {WEIGHTS}",
    ".bin": f"if it is one of several shards, download {BIN_INDEX} too; if it is the whole, name it {BIN_WEIGHTS}",
    ".pth": _INSTEAD_OF_PICKLE,
    ".pt": _INSTEAD_OF_PICKLE,
    ".gguf": INSTEAD_OF_GGUF,
}


class Extent(NamedTuple):
    """Where a tensor lies in its file: from byte `offset` on, in C order."""

    offset: int
    dtype: DType
    shape: Shape


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights: what plans are to read it as, where each tensor lies in it, and the size of its header."""

    source: Source
    extents: Mapping[str, Extent]
    header_nbytes: int


class Tensors(Mapping[str, Read]):
    """The tensors in some files of weights, by their names.

    A `Read` is made when it is asked for: of a merge of 128 models, two thirds of all tensors never are.
    """

    def __init__(self, files: Iterable[WeightsFile]) -> None:
        self._files = {name: file for file in files for name in file.extents}
        self._renamed: dict[str, str] = {}

    def __getitem__(self, name: str) -> Read:
        file = self._files[name]
        return Read(file.source, *file.extents[self._renamed.get(name, name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def renamed(self, stored: str, name: str) -> Tensors:
        """These, but that the tensor that is `stored` by one name has another."""
        tensors = copy(self)
        tensors._files = {name if each == stored else each: file for each, file in self._files.items()}
        tensors._renamed = {**self._renamed, name: stored}
        return tensors

    def files(self) -> frozenset[Source]:
        """The files that hold them."""
        return frozenset(file.source for file in self._files.values())


@dataclass(frozen=True)
class Checkpoint:
    """An opened source model: what it is and where its tensors lie.

    `path` is the directory of its small files, `label` what the user calls it, `config` the parsed `config.json`.
    """

    path: Path
    label: str
    config: Mapping[str, Any]
    tensors: Tensors

    @property
    def model_type(self) -> str:
        """The family that the model says it is of: "llama", "mistral" ..."""
        model_type: str = self.config["model_type"]
        return model_type

    @property
    def config_file(self) -> Path:
        """What messages call its `config.json`."""
        return Path(self.label) / CONFIG

    @property
    def config_sha256(self) -> str:
        """A digest of what `config.json` says."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """The whole number from `minimum` to `maximum` that `config.json` has for `key`.

        `default` stands in where the key is absent or null. Raises CheckpointError for anything else: text, true, 1.0.
        """
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        # type() and not isinstance(): True is an int to Python, but not to JSON.
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.wrong_value(key, f"a whole number from {minimum:,} to {maximum:,}")
        return value

    def wrong_value(self, key: str, expected: str) -> CheckpointError:
        """The error that what `config.json` has for `key` is not what is `expected`."""
        value = self.config.get(key)
        found = f"`{key}` is missing" if value is None else f"`{key}` is {show(value)}"
        return CheckpointError(f"{self.config_file}: {found}; it must be {expected}")


def open_checkpoint(place: str | Path | Place) -> Checkpoint:
    """The checkpoint in a local directory, or another place. Reads its config, its index and its headers.

    Which files are its weights is decided as transformers does: `model.safetensors`, else the shards that
    `model.safetensors.index.json` names, else the same of `pytorch_model.bin`. Raises CheckpointError.
    """
    place = as_place(place)
    weights = next((name for name in PREFERRED if place.has(name)), None)
    if weights is None:
        raise CheckpointError(f"{place.label}: {_why_no_weights(place)}")
    config = _read_config(place, weights)
    files = _open_shards(place, weights) if weights in (INDEX, BIN_INDEX) else [open_weights(place, weights)]
    return Checkpoint(place.path, place.label, config, Tensors(files))


def _why_no_weights(place: Place) -> str:
    """What a place without weights is instead, and what to do about it."""
    by_suffix = {Path(name).suffix: name for name in sorted(place.names(), reverse=True) if "/" not in name}
    if place.has(ADAPTER_CONFIG):
        return f"holds a LoRA adapter, not a model: name the model that it was trained on, too (MODEL+{place.label})"
    if place.path.name.startswith("models--") and place.has("snapshots"):
        name = place.path.name.removeprefix("models--").replace("--", "/", 1)
        return f"is where the Hub's cache keeps a model: call it {name}, or give a directory in snapshots/"
    if place.has(MISTRAL_WEIGHTS):
        return f"has {MISTRAL_WEIGHTS}, Mistral's own format, alone: give the model in that of transformers"
    found = next((by_suffix[suffix] for suffix in _INSTEAD if suffix in by_suffix), None)
    advice = place.incomplete if found is None else f"there is {show(found)}: {_INSTEAD[Path(found).suffix]}"
    return f"has none of {', '.join(PREFERRED)}; {advice}"


def _read_config(place: Place, weights: str) -> Mapping[str, Any]:
    config = read_json(place.path, CONFIG, MAX_CONFIG_NBYTES)
    file = Path(place.label) / CONFIG
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file}: `model_type` must be text, not {show(config.get('model_type'))}")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{file}: the model is quantised (`quantization_config`: {show(method)}); moeplan reads F32, F16 and BF16 "
            "weights: give the model that it was quantised from, or dequantise it first"
        )
    named = config.get("transformers_weights")
    if named not in (None, weights):
        raise CheckpointError(
            f"{file}: `transformers_weights` says that {show(named)} holds the weights, but moeplan reads {weights}: "
            f"remove the key, or name the weights {WEIGHTS}"
        )
    return config


def _open_shards(place: Place, index: str) -> list[WeightsFile]:
    """All shards. Index and shards must name the same tensors.

    Of a tensor that a shard holds and the index does not map there, transformers 4 takes no notice, and transformers 5
    loads it; so neither reading is safe.
    """
    where = Path(place.label)
    weight_map = _read_weight_map(place, index)
    mapped: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        mapped.setdefault(shard, []).append(name)
    if len(mapped) > MAX_SHARDS:
        raise CheckpointError(f"{where / index}: names {len(mapped):,} shards; at most {MAX_SHARDS:,} are read")
    place.prepare(mapped)
    files: list[WeightsFile] = []
    left_nbytes = MAX_HEADERS_NBYTES
    for shard, names in sorted(mapped.items()):
        file = open_weights(place, shard, left_nbytes)
        left_nbytes -= file.header_nbytes
        for name in names:
            if name not in file.extents:
                raise CheckpointError(f"{where / shard}: tensor {show(name)} is not there; {index} says that it is")
        if len(file.extents) > len(names):
            name = next(name for name in file.extents if weight_map.get(name) != shard)
            elsewhere = f"maps to {weight_map[name]}" if name in weight_map else "does not list"
            raise CheckpointError(
                f"{where / shard}: holds tensor {show(name)}, which {index} {elsewhere}; index and shards are not of "
                "one model. Download them again"
            )
        files.append(file)
    return files


def _read_weight_map(place: Place, index: str) -> dict[str, str]:
    """The index: tensor name -> name of a file in the directory."""
    file = Path(place.label) / index
    suffix = Path(index.removesuffix(".index.json")).suffix
    weight_map = read_json(place.path, index, MAX_INDEX_NBYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: has no `weight_map` from tensor names to file names")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{file}: names {len(weight_map):,} tensors; at most {MAX_TENSORS:,} are read")
    plain: set[str] = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{file}: tensor {show(name)} is mapped to {show(shard)}, which is no file name")
        if shard in plain:
            continue
        if "/" in shard or "\\" in shard or not shard.isprintable() or len(shard) > 255:
            raise CheckpointError(
                f"{file}: tensor {show(name)} is mapped to {show(shard)}; shards must be plain names of files in the "
                "directory"
            )
        if not shard.endswith(suffix):
            raise CheckpointError(f"{file}: tensor {show(name)} is mapped to {show(shard)}, not to a {suffix} file")
        plain.add(shard)
    return weight_map


def open_weights(place: Place, name: str, max_header_nbytes: int = MAX_HEADERS_NBYTES) -> WeightsFile:
    """The file of weights `name`. Raises CheckpointError."""
    where = Path(place.label) / name
    with place.opened(name) as (file, source):
        refuse_lfs_pointer(where, file.read(len(LFS_POINTER)))
        locate = _located_in_archive if name.endswith(".bin") else _located_by_header
        return WeightsFile(source, *locate(where, file, source.nbytes, max_header_nbytes))


def _located_by_header(
    where: Path, file: BinaryIO, file_nbytes: int, max_header_nbytes: int
) -> tuple[Mapping[str, Extent], int]:
    """Where each tensor of a safetensors file lies, and the size of its header."""
    file.seek(0)
    start = file.read(LENGTH_NBYTES)
    if len(start) < LENGTH_NBYTES:
        raise CheckpointError(f"{where}: is not a safetensors file: it has {file_nbytes:,} bytes. Download it again")
    header_nbytes = int.from_bytes(start, "little")
    data_offset = LENGTH_NBYTES + header_nbytes
    if data_offset > file_nbytes:
        raise CheckpointError(
            f"{where}: is truncated, or not a safetensors file: its header would take {header_nbytes:,} bytes, the "
            f"file has {file_nbytes:,}. Download it again"
        )
    if header_nbytes > max_header_nbytes:
        raise CheckpointError(
            f"{where}: its header takes {header_nbytes:,} bytes; moeplan reads at most {MAX_HEADERS_NBYTES:,} "
            "bytes of headers in a checkpoint, twice what the largest need"
        )
    header = file.read(header_nbytes)
    if len(header) != header_nbytes:
        raise CheckpointError(f"{where}: became shorter while it was read")
    try:
        return _extents(header, file_nbytes - data_offset), header_nbytes
    except HeaderError as error:
        raise CheckpointError(f"{where}: {error}") from None


@lru_cache(maxsize=MAX_REMEMBERED_HEADERS)
def _extents(header: bytes, data_nbytes: int) -> Mapping[str, Extent]:
    """Where each tensor lies in a file with this header before so many bytes of data. Raises HeaderError."""
    offset = LENGTH_NBYTES + len(header)
    infos = parse_header(header, data_nbytes)
    return {name: Extent(offset + info.begin, info.dtype, info.shape) for name, info in infos.items()}


def _located_in_archive(
    where: Path, file: BinaryIO, file_nbytes: int, max_header_nbytes: int
) -> tuple[Mapping[str, Extent], int]:
    """The same of a file of `torch.save`."""
    try:
        tensors, header_nbytes = read_archive(file, file_nbytes, max_header_nbytes)
    except ArchiveError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return {name: Extent(tensor.offset, tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, header_nbytes
