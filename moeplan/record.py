"""What a merge was made of, and `moeplan.json`, which says it beside the model, with what `moeplan verify` checks it
by.

The same facts tell an unfinished merge from another one in its place: they are all that the output's bytes depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.errors import naming
from executor.manifest import Segment, manifest
from moeplan.adapter_config import ADAPTER_CONFIG
from moeplan.checkpoint import CONFIG
from moeplan.gates import gate_mode
from moeplan.identity import COMMITS, PLAN
from moeplan.options import DECISIVE, EVALUATION, Options, flag
from moeplan.safetensors_header import LENGTH_NBYTES
from moeplan.tokenizer_files import FAST, READ_WITH_FAST, TOKENIZER_FILES
from planner.expr import RemoteFile, Source
from planner.layout import PAGE
from planner.plan import FileSink

if TYPE_CHECKING:
    from moeplan.config import MergeConfig
    from moeplan.planning import MergePlan

FORMAT = 1
PACKAGES = ("moeplan", "numpy", "tokenizers", "torch", "transformers")

MAX_HEADER_NBYTES = 16 << 20
"""More than any header has."""

BEGINNING_NBYTES = 64 << 10
"""How much of a file without a header, such as a `.bin`, stands for it."""

SAMPLE_PAGES = 9
"""What is read of a source's weights to tell it from another one of its size, time and header."""

CHECKSUM = "sum modulo 2^64 of XXH3-64 of blocks of 16384 elements, the first of `head`, seeded with the block's number"


def identity(merge_plan: MergePlan) -> dict[str, dict[str, Any]]:
    """What makes a merge that merge: config, options, sources, versions, and the plan that follows from them."""
    options, base = merge_plan.options, merge_plan.sources.base.checkpoint
    values = {name: getattr(options, name) for name in DECISIVE}
    values |= {"out_shard_size": str(options.out_shard_size), "expert_layout": merge_plan.layout}
    if not gate_mode(merge_plan.config.gate_mode).evaluates:
        values |= {name: getattr(Options(), name) for name in EVALUATION}
    values["device"] = merge_plan.device.name  # which may be another one than at first, where any will do
    streamed = options.stream and any(isinstance(source, RemoteFile) for source in merge_plan.plan.sources)
    packages = [*PACKAGES, *(["bitsandbytes"] if "moeplan.gates.quantised" in merge_plan.memory.packages else [])]
    return {
        "config": dict(_flat("", merge_plan.config.model_dump(mode="json"))),
        "option": {flag(name): value for name, value in values.items()} | ({"--stream": True} if streamed else {}),
        "source": dict(zip(_names(merge_plan), map(_source, merge_plan.plan.sources), strict=True)),
        "text in": {file: _text(Path(file)) for file in texts_of(merge_plan.config)},
        "file": {
            str(base.path / CONFIG): {"sha256": base.config_sha256},
            **{str(file): {"sha256": file_sha256(file)} for file in _deciding_files(merge_plan)},
        },
        COMMITS: merge_plan.hub.commits,
        "version of": {package: version(package) for package in packages},
        PLAN: {"fingerprint": merge_plan.plan.fingerprint},
    }


def record(
    merge_plan: MergePlan,
    made_from: Mapping[str, Mapping[str, Any]],
    checksums: Mapping[FileSink, int],
    directory: Path,
    files: Iterable[str],
) -> str:
    """`moeplan.json`, for a model with these `files`, in `directory`, beside the weights.

    `made_from` is the merge's identity, `checksums` are the run's.
    """
    sources = _names(merge_plan)
    data = {
        "format": FORMAT,
        "made_from": made_from,
        "shards": {
            shard.filename: {"nbytes": shard.nbytes, "header_sha256": hashlib.sha256(shard.header()).hexdigest()}
            for shard in merge_plan.plan.shards
        },
        "checksum": CHECKSUM,
        "tensors": {
            name: [_segment(segment, sources) for segment in segments]
            for name, segments in manifest(merge_plan.plan, checksums).items()
        },
        "files": {name: file_sha256(directory / name) for name in sorted(files)},
    }
    return json.dumps(data, indent=1) + "\n"  # in ASCII, since the path of a source need not be UTF-8


def _names(merge_plan: MergePlan) -> list[str]:
    """Those of the plan's sources, which are the same when the Hub is at another address."""
    hub, sources = merge_plan.hub, merge_plan.plan.sources
    return [hub.lasting_name(source) if isinstance(source, RemoteFile) else source.path for source in sources]


def _segment(segment: Segment, sources: list[str]) -> dict[str, Any]:
    if segment.checksum is not None:
        return {"numel": segment.numel, "head": segment.head_numel, "xxh3": f"{segment.checksum:016x}"}
    assert segment.source is not None
    return {"numel": segment.numel, "source": sources[segment.source], "offset": segment.source_offset}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`experts[1].noise_scale` → 0.1, and so on."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}" if name else key, item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flat(f"{name}[{index}]", item)
    else:
        yield name, value


def _source(source: Source) -> dict[str, Any]:
    """Size, time of the last change in nanoseconds, and digests of the header and of a sample of the weights of a
    source; of a remote one, its ETag.

    The digests are None of a file that is gone: the run will say so. Raises RunError for one that cannot be read.
    """
    if isinstance(source, RemoteFile):
        return {"nbytes": source.nbytes, "etag": source.etag}
    of_header = of_sample = None
    path = Path(source.path)
    with naming(path), suppress(FileNotFoundError):
        of_header, of_sample = header_sha256(path), sample_sha256(path)
    return {
        "nbytes": source.nbytes,
        "mtime_ns": source.mtime_ns,
        "header_sha256": of_header,
        "sample_sha256": of_sample,
    }


def _deciding_files(merge_plan: MergePlan) -> list[Path]:
    """The small files, beside the base's config, that the output follows from and that are there."""
    adapters = [model.adapter for _, model in merge_plan.sources.named() if model.adapter is not None]
    files = [adapter.path / ADAPTER_CONFIG for adapter in adapters]
    if merge_plan.config.reads_text:
        base = merge_plan.sources.base.checkpoint.path
        files += [base / name for name in (READ_WITH_FAST if (base / FAST).exists() else TOKENIZER_FILES)]
        files += base.glob("*.py") if merge_plan.options.trust_remote_code else ()
    return [file for file in files if file.is_file()]


def texts_of(config: MergeConfig) -> list[str]:
    """The files that passages are drawn from."""
    rows = (*config.experts, *config.shared_experts) if config.reads_text else ()
    return sorted({file for row in rows for file in row.positive_files})


def _text(file: Path) -> dict[str, Any] | None:
    """Size and time of the last change, in nanoseconds, of a file of text; None of one that is gone."""
    try:
        status = file.stat()
    except OSError:
        return None
    return {"nbytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a whole file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header_sha256(path: Path) -> str:
    """The SHA-256 of a safetensors file's header, its length included; of anything else, of its beginning.

    Raises OSError.
    """
    length, text = header(path)
    digest = hashlib.sha256(length)
    digest.update(text)
    return digest.hexdigest()


def sample_sha256(path: Path) -> str:
    """The SHA-256 of a few pages of a file, from behind its header to its end. Raises OSError."""
    begin, digest = sum(map(len, header(path))), hashlib.sha256()
    with open(path, "rb") as file:
        last = max(begin, os.fstat(file.fileno()).st_size - PAGE)
        for number in range(SAMPLE_PAGES):
            file.seek(begin + (last - begin) * number // (SAMPLE_PAGES - 1))
            digest.update(file.read(PAGE))
    return digest.hexdigest()


def header(path: Path) -> tuple[bytes, bytes]:
    """The length of a safetensors file's header, as it stands there, and its text; of anything else, its beginning.

    Raises OSError.
    """
    with open(path, "rb") as file:
        length = file.read(LENGTH_NBYTES)
        nbytes = int.from_bytes(length, "little")
        has_one = nbytes <= MAX_HEADER_NBYTES and file.peek(1)[:1] == b"{"
        return length, file.read(nbytes if has_one else BEGINNING_NBYTES)
