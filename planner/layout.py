"""Where each output tensor lies: shards, headers, byte offsets.

A shard is a safetensors file. Its large tensors are laid out in whole pages, so that ranges of it can be shared with
its sources by reflink, written with direct I/O and mapped by loaders::

      0          8                     data_start                                        nbytes
      ├─ length ─┼─ JSON ── spaces ────┼─ tensors of n × 4096 bytes ──┬─ other tensors ──┤
                                       │                              │
                  data_start ≡ source offset (mod 4096)      everything else, packed

The format allows spaces after the JSON, and no gap between tensors. So all whole-page tensors of a shard lie at one
*residue*, their offset modulo 4096, and the spaces choose which. A copied tensor's residue is the one it has in its
source; tensors of one residue are put into shards of their own, where that is worth a file. What is computed, or not of
whole pages, goes wherever there is room.

All of it follows from the tensors and their sources alone, never from the file system at hand: the same merge gives the
same bytes everywhere.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from planner.expr import Concat, DType, Expr, Read, Shape

PAGE = 4096
METADATA = {"format": "pt"}
MIN_OWN_FILE_NBYTES = 64 << 20


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
        text = _header_json((t.name, t.dtype, t.shape, t.nbytes) for t in self.tensors)
        return (self.data_start - 8).to_bytes(8, "little") + text.ljust(self.data_start - 8)


def lay_out(outputs: Mapping[str, Expr], shard_nbytes: int) -> tuple[Shard, ...]:
    """Distribute `outputs` over shards that hold at most `shard_nbytes` of tensors each (one tensor at the least)."""
    groups = [(residue, group) for residue, items in _by_residue(outputs) for group in _split(items, shard_nbytes)]
    return tuple(
        _shard(_filename(number, len(groups)), residue, group) for number, (residue, group) in enumerate(groups, 1)
    )


def index_json(shards: Iterable[Shard]) -> str:
    """`model.safetensors.index.json`: which shard holds which tensor, as transformers writes it."""
    entries = [(tensor, shard.filename) for shard in shards for tensor in shard.tensors]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in entries)},
        "weight_map": {tensor.name: filename for tensor, filename in sorted(entries, key=lambda e: e[0].name)},
    }
    return json.dumps(index, indent=2) + "\n"


class _Tensor(NamedTuple):
    """An output tensor that has no place yet."""

    name: str
    dtype: DType
    shape: Shape
    nbytes: int


def _by_residue(outputs: Mapping[str, Expr]) -> list[tuple[int, list[_Tensor]]]:
    """`outputs` in groups that can lie at one residue, with that residue.

    A residue that few bytes have gets no file of its own: its tensors join those of the commonest.
    """
    tensors = [_Tensor(name, expr.dtype, expr.shape, expr.nbytes) for name, expr in outputs.items()]
    residues = [_residue(expr) for expr in outputs.values()]
    nbytes_at: Counter[int] = Counter()
    for tensor, residue in zip(tensors, residues, strict=True):
        if residue is not None:
            nbytes_at[residue] += tensor.nbytes
    commonest = min(nbytes_at, key=lambda residue: (-nbytes_at[residue], residue), default=0)
    own_files = {residue for residue, nbytes in nbytes_at.items() if nbytes >= MIN_OWN_FILE_NBYTES} | {commonest}
    groups: dict[int, list[_Tensor]] = {}
    for tensor, residue in zip(tensors, residues, strict=True):
        groups.setdefault(residue if residue in own_files else commonest, []).append(tensor)
    return list(groups.items()) or [(0, [])]


def _residue(expr: Expr) -> int | None:
    """Where, modulo a page, a copy of whole pages must lie to share them with its source; None for everything else.

    Offsets that are no multiple of 8 are left alone: loaders want tensors aligned.
    """
    if expr.nbytes % PAGE != 0 or expr.nbytes == 0:
        return None
    if isinstance(expr, Concat):
        residues = {_residue(part) for part in expr.parts}
        return residues.pop() if len(residues) == 1 else None
    return expr.offset % PAGE if isinstance(expr, Read) and expr.offset % 8 == 0 else None


def _split(tensors: Iterable[_Tensor], shard_nbytes: int) -> Iterator[list[_Tensor]]:
    group: list[_Tensor] = []
    used = 0
    for tensor in tensors:
        if group and used + tensor.nbytes > shard_nbytes:
            yield group
            group, used = [], 0
        group.append(tensor)
        used += tensor.nbytes
    yield group


def _filename(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard(filename: str, residue: int, group: list[_Tensor]) -> Shard:
    ordered = sorted(group, key=lambda tensor: tensor.nbytes % PAGE != 0)  # stable: whole pages first
    shortest = 8 + len(_header_json(ordered))
    offset = data_start = shortest + (residue - shortest) % PAGE
    entries = []
    for tensor in ordered:
        entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, offset, tensor.nbytes))
        offset += tensor.nbytes
    return Shard(filename, data_start, offset, tuple(entries))


def _header_json(tensors: Iterable[tuple[str, DType, Shape, int]]) -> bytes:
    """The JSON of a header: name, dtype, shape and bytes of each tensor, one after the other from the data's start."""
    header: dict[str, object] = {"__metadata__": METADATA}
    begin = 0
    for name, dtype, shape, nbytes in tensors:
        end = begin + nbytes
        header[name] = {"dtype": dtype.value, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return json.dumps(header, separators=(",", ":")).encode()
