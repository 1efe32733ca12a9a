"""Where each output tensor lies: shards, headers, byte offsets.

A shard is a safetensors file. Its large tensors are laid out in whole pages, so that ranges of it can be shared with
its sources by reflink, written with direct I/O and mapped by loaders::

      0          8                     data_start                                        nbytes
      ├─ length ─┼─ JSON ── spaces ────┼─ tensors of n × 4096 bytes ──┬─ other tensors ──┤
                                       │                              │
                  data_start ≡ source offset (mod 4096)      everything else, packed

The format allows spaces after the JSON. They are chosen so that the large tensors lie, modulo 4096, where they lie in
the source that gives the shard most of its bytes; at 0 where nothing is copied. All of it follows from the tensors and
their sources alone, never from the file system at hand: the same merge gives the same bytes everywhere.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from planner.expr import Concat, DType, Expr, Read, Shape

PAGE = 4096
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """An output tensor: `nbytes` at byte `offset` of its shard's file."""

    name: str
    dtype: DType
    shape: Shape
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """An output file of `nbytes`, whose tensors lie in `tensors`' order from byte `data_start` on."""

    filename: str
    data_start: int
    nbytes: int
    tensors: tuple[TensorEntry, ...]

    def header(self) -> bytes:
        """The first `data_start` bytes of the file: length, JSON, padding."""
        text = _header_json(self.tensors, self.data_start)
        return (self.data_start - 8).to_bytes(8, "little") + text.ljust(self.data_start - 8)


def lay_out(outputs: Mapping[str, Expr], shard_nbytes: int) -> tuple[Shard, ...]:
    """Distribute `outputs` over shards that hold at most `shard_nbytes` of tensors each (one tensor at the least)."""
    groups = list(_split(outputs.items(), shard_nbytes))
    return tuple(_shard(_filename(i, len(groups)), group) for i, group in enumerate(groups, 1))


def index_json(shards: Iterable[Shard]) -> str:
    """`model.safetensors.index.json`: which shard holds which tensor, as transformers writes it."""
    entries = [(tensor, shard.filename) for shard in shards for tensor in shard.tensors]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in entries)},
        "weight_map": {tensor.name: filename for tensor, filename in sorted(entries, key=lambda e: e[0].name)},
    }
    return json.dumps(index, indent=2) + "\n"


def _split(items: Iterable[tuple[str, Expr]], shard_nbytes: int) -> Iterator[list[tuple[str, Expr]]]:
    group: list[tuple[str, Expr]] = []
    used = 0
    for name, expr in items:
        if group and used + expr.nbytes > shard_nbytes:
            yield group
            group, used = [], 0
        group.append((name, expr))
        used += expr.nbytes
    yield group


def _filename(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard(filename: str, group: list[tuple[str, Expr]]) -> Shard:
    ordered = sorted(group, key=lambda item: item[1].nbytes % PAGE != 0)  # stable: whole pages first
    # The offsets in the JSON are relative to the data's start, so its length does not depend on where that is.
    shortest = 8 + len(_header_json(_entries(ordered, 0), 0))
    data_start = shortest + (_residue(expr for _, expr in ordered) - shortest) % PAGE
    tensors = _entries(ordered, data_start)
    return Shard(filename, data_start, data_start + sum(t.nbytes for t in tensors), tensors)


def _entries(ordered: list[tuple[str, Expr]], offset: int) -> tuple[TensorEntry, ...]:
    entries = []
    for name, expr in ordered:
        entries.append(TensorEntry(name, expr.dtype, expr.shape, offset, expr.nbytes))
        offset += expr.nbytes
    return tuple(entries)


def _header_json(tensors: Iterable[TensorEntry], data_start: int) -> bytes:
    header: dict[str, object] = {"__metadata__": METADATA}
    for t in tensors:
        begin = t.offset - data_start
        header[t.name] = {"dtype": t.dtype.value, "shape": t.shape, "data_offsets": [begin, begin + t.nbytes]}
    return json.dumps(header, separators=(",", ":")).encode()


def _residue(exprs: Iterable[Expr]) -> int:
    """Where, modulo a page, most of the copied whole-page bytes lie in their sources; multiples of 8 only."""
    nbytes_at: Counter[int] = Counter()
    for expr in exprs:
        first = expr
        while isinstance(first, Concat):
            first = first.parts[0]
        if isinstance(first, Read) and expr.nbytes % PAGE == 0 and first.offset % 8 == 0:
            nbytes_at[first.offset % PAGE] += expr.nbytes
    return min(nbytes_at, key=lambda residue: (-nbytes_at[residue], residue), default=0)
