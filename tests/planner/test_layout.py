"""Where tensors lie in their shards: modulo a page where they lie in their sources, as far as that is worth a file."""

import json

import pytest
from source_files import FILES

from planner.expr import DType, Expr, Read, Zeros, cast, stack
from planner.layout import MIN_OWN_FILE_NBYTES, PAGE, index_json, lay_out

LARGE = MIN_OWN_FILE_NBYTES // 4


def at(residue: int, numel: int = PAGE, page: int = 0) -> Read:
    """A tensor of whole pages that lies so in a page of its source."""
    return Read(FILES[1], page * PAGE + residue, DType.F32, (numel,))


def residues(outputs: dict[str, Expr]) -> dict[str, int]:
    """Where in a page each tensor lies that is of whole pages."""
    shards = lay_out(outputs, 1 << 40)
    return {t.name: t.offset % PAGE for shard in shards for t in shard.tensors if t.nbytes % PAGE == 0}


def test_a_shard_s_large_tensors_lie_modulo_a_page_where_they_lie_in_their_source() -> None:
    (shard,) = lay_out({"small": Read(FILES[1], 100, DType.F32, (3,)), "large": at(1232, page=3)}, 1 << 40)
    assert [tensor.name for tensor in shard.tensors] == ["large", "small"]
    assert shard.tensors[0].offset % PAGE == 1232


def test_a_header_says_how_long_it_is_and_where_behind_it_each_tensor_lies() -> None:
    (shard,) = lay_out({"a": Read(FILES[1], 100, DType.BF16, (3, 5)), "b": at(1232)}, 1 << 40)
    header = shard.header()
    assert int.from_bytes(header[:8], "little") == len(header) - 8 == shard.data_start - 8
    assert header[8:9] == b"{"
    assert header[-1:] == b" "
    assert json.loads(header[8:]) == {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F32", "shape": [PAGE], "data_offsets": [0, 4 * PAGE]},
        "a": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [4 * PAGE, 4 * PAGE + 30]},
    }
    assert [tensor.offset for tensor in shard.tensors] == [shard.data_start, shard.data_start + 4 * PAGE]
    assert shard.nbytes == shard.data_start + 4 * PAGE + 30


def test_a_header_is_padded_by_less_than_a_page() -> None:
    for residue in range(0, PAGE, 8):
        (shard,) = lay_out({"x": at(residue)}, 1 << 40)
        assert len(shard.header().rstrip(b" ")) <= shard.data_start < len(shard.header().rstrip(b" ")) + PAGE


def test_tensors_of_another_residue_get_a_shard_of_their_own_where_that_is_worth_a_file() -> None:
    assert residues({"a": at(8, LARGE + PAGE), "b": at(16, LARGE)}) == {"a": 8, "b": 16}
    assert residues({"a": at(8, LARGE + PAGE), "b": at(16, LARGE - PAGE)}) == {"a": 8, "b": 8}
    assert residues({"a": at(8), "b": at(16, 2 * PAGE), "c": at(8, page=1)}) == {"a": 8, "b": 8, "c": 8}
    halves = {"b": at(16, LARGE // 2), "c": at(16, LARGE // 2, page=1)}
    assert residues({"a": at(8, LARGE + PAGE)} | halves) == {"a": 8, "b": 16, "c": 16}


def test_of_two_residues_that_as_many_bytes_have_the_smaller_one_is_taken() -> None:
    assert residues({"a": at(16), "b": at(8)}) == residues({"b": at(8), "a": at(16)}) == {"a": 8, "b": 8}


@pytest.mark.parametrize(
    ("expr", "residue"),
    [
        (stack([at(8), at(8, page=9)]), 8),
        (stack([at(8), at(16)]), 0),
        (stack([Read(FILES[1], 8, DType.F32, (PAGE // 8,))] * 8), 0),
        (at(12), 0),
        (cast(at(8), DType.BF16), 0),
        (Zeros(DType.F32, (PAGE,)), 0),
        (Read(FILES[1], 24, DType.F32, (0, 4)), 0),
    ],
    ids=["stacked", "stacked from elsewhere", "stacked parts of pages", "odd", "cast", "zeros", "nothing"],
)
def test_what_has_no_residue_of_its_own_begins_a_page(expr: Expr, residue: int) -> None:
    assert residues({"x": expr}) == {"x": residue}


def test_shards_are_numbered_where_there_are_several_and_an_index_says_what_is_where() -> None:
    outputs: dict[str, Expr] = {"c": at(0), "a": at(0, page=9), "b": Read(FILES[1], 100, DType.F32, (3,))}
    (one,) = lay_out(outputs, 1 << 40)
    assert one.filename == "model.safetensors"
    two = lay_out(outputs, 4 * PAGE + 12)
    assert [shard.filename for shard in two] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert [[tensor.name for tensor in shard.tensors] for shard in two] == [["c"], ["a", "b"]]
    index = json.loads(index_json(two))
    assert index["metadata"] == {"total_size": 8 * PAGE + 12}
    in_order = {"a": two[1], "b": two[1], "c": two[0]}
    assert list(index["weight_map"].items()) == [(name, shard.filename) for name, shard in in_order.items()]
