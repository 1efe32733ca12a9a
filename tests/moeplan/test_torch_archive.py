"""Legacy `.bin` files: their tensors lie where torch wrote them, and nothing in them runs, whatever they hold."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeplan.checkpoint import BIN_INDEX, BIN_WEIGHTS, CONFIG, MAX_HEADERS_NBYTES, WEIGHTS, open_checkpoint
from moeplan.places import CheckpointError
from moeplan.torch_archive import MAX_INSTRUCTIONS, ArchiveError, read_archive
from planner.expr import DType

DTYPES = {torch.float32: DType.F32, torch.float16: DType.F16, torch.bfloat16: DType.BF16}
TABLE = torch.randn(40, 6)

TENSORS: dict[str, torch.Tensor] = {
    "model.embed_tokens.weight": TABLE,
    "lm_head.weight": TABLE,
    "rows of it": TABLE[7:19],
    "one row of it": TABLE[3],
    "half": torch.randn(5, 3).half(),
    "bfloat": torch.randn(3, 5, 2).bfloat16(),
    "a column, which is one piece": torch.randn(9, 1)[:, 0],
    "transposed, but a row": torch.randn(8, 1).T,
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
    "empty and transposed": torch.zeros(4, 0).T,
    "naïve name \U0001f600": torch.randn(2),
}


def saved(content: Any, **options: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def located(content: bytes) -> dict[str, Any]:
    return read_archive(io.BytesIO(content), len(content), MAX_HEADERS_NBYTES)[0]


def assert_holds(content: bytes, tensors: dict[str, torch.Tensor]) -> None:
    found = located(content)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        place = found[name]
        assert place.shape == tuple(tensor.shape)
        assert place.dtype is DTYPES[tensor.dtype]
        expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[place.offset : place.offset + len(expected)] == expected


def refusal(content: bytes) -> str:
    """The message with which a file is refused."""
    with pytest.raises(ArchiveError) as error:
        located(content)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def repacked(content: bytes, change: dict[str, bytes | None], **options: Any) -> bytes:
    """An archive with members replaced, put in, or, with None, left out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", **options) as new:
        members = {info.filename: old.read(info) for info in old.infolist()}
        for name, data in (members | change).items():
            if data is not None:
                new.writestr(name, data)
    return file.getvalue()


def with_program(*parts: bytes | str) -> bytes:
    """An archive of one storage of four floats whose pickle is `parts`: instructions, or texts to push."""
    program = b"".join(text(part) if isinstance(part, str) else part for part in parts)
    return repacked(saved({"x": torch.zeros(4)}), {"archive/data.pkl": program})


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return pickle.LONG1 + b"\x09" + value.to_bytes(9, "little", signed=True)


def sizes(*values: int) -> bytes:
    return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def storage(key: str = "0", numel: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    return pickle.MARK + text("storage") + name(kind) + text(key) + text("cpu") + number(numel) + pickle.TUPLE + PERSID


def tensor(of: bytes, begin: int, shape: bytes, strides: bytes, more: bytes = b"") -> bytes:
    arguments = of + number(begin) + shape + strides + pickle.NEWFALSE + HOOKS + more
    return name("torch._utils._rebuild_tensor_v2") + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


PERSID = pickle.BINPERSID
HOOKS = name("collections.OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
START = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT
END = pickle.SETITEM + pickle.STOP


# What is accepted


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        OrderedDict(TENSORS),
        {key: torch.nn.Parameter(value, requires_grad=False) for key, value in TENSORS.items()},
    ],
    ids=["dict", "ordered dict", "parameters"],
)
def test_tensors_lie_where_torch_wrote_them(content: Any) -> None:
    assert_holds(saved(content), TENSORS)


def test_a_module_s_state_dict_is_read_with_its_metadata_and_buffers() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module.register_buffer("rotary_emb.inv_freq".replace(".", "_"), torch.ones(2))
    assert_holds(saved(module.state_dict()), dict(module.state_dict()))


def test_many_tensors_take_more_of_the_pickle_s_instructions() -> None:
    many = {f"layers.{n}.weight": torch.full((2,), n % 100).bfloat16() for n in range(3000)}
    assert_holds(saved(many), many)


def test_sizes_of_over_four_gigabytes_stand_elsewhere_in_an_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = saved(TENSORS)
    for limit in (0, 100, len(plain) // 2):  # all, some, and only later members are written as if they were large
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        assert_holds(repacked(plain, {}), TENSORS)


def test_tensors_that_share_a_storage_share_their_bytes() -> None:
    found = located(saved(TENSORS))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert found["rows of it"].offset == found["lm_head.weight"].offset + 7 * 6 * 4


def test_sizes_numbers_and_names_may_be_large() -> None:
    """Each takes another instruction of a pickle, from 256, from 65,536 and from 2^31 on, and what is repeated, too."""
    many = {f"{n}": torch.full((1,), n).bfloat16() for n in range(200)}
    large = {"large": torch.zeros(300, 257).half(), "larger": torch.zeros(70_000), "again": torch.ones(2).half()}
    assert_holds(saved(many | large), many | large)
    huge = tensor(storage(), 0, sizes(4, 1), pickle.MARK + number(1) + pickle.LONG1 + b"\5\0\0\0\0\1" + pickle.TUPLE)
    assert_holds(with_program(START, "x", huge, END), {"x": torch.zeros(4, 1)})


def test_files_of_before_torch_2_1_do_not_say_in_which_order_bytes_are() -> None:
    assert_holds(repacked(saved(TENSORS), {"archive/byteorder": None}), TENSORS)


def test_what_describes_the_tensors_is_measured() -> None:
    with zipfile.ZipFile(io.BytesIO(PLAIN)) as archive:
        directory_nbytes = sum(46 + len(each.filename) + len(each.extra) for each in archive.infolist())
        nbytes = directory_nbytes + archive.getinfo("archive/data.pkl").file_size
    assert read_archive(io.BytesIO(PLAIN), len(PLAIN), nbytes)[1] == nbytes
    with pytest.raises(ArchiveError, match=rf"describes its tensors in {nbytes:,} bytes; at most {nbytes - 1:,} are"):
        read_archive(io.BytesIO(PLAIN), len(PLAIN), nbytes - 1)


def test_a_program_written_by_hand_is_read_as_torch_reads_it() -> None:
    content = with_program(START, "x", tensor(storage(), 1, sizes(3), sizes(1)), END)
    assert_holds(content, {"x": torch.zeros(3)})
    assert torch.load(io.BytesIO(content), weights_only=True)["x"].shape == (3,)


# What is refused


class Touch:
    """What a malicious file is made of: loading its pickle makes a file."""

    def __init__(self, path: Path, call: Callable[..., Any]) -> None:
        self.path = path
        self.call = call

    def __reduce__(self) -> Any:
        return self.call, (f"touch {self.path}",) if self.call is os.system else (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "bare pickle"])
@pytest.mark.parametrize("call", [os.system, Path.touch, os.mkdir, eval], ids=lambda call: call.__name__)
@pytest.mark.parametrize(
    "wrap", [lambda evil: evil, lambda evil: {"x": evil, "y": torch.zeros(4)}], ids=["all", "part"]
)
def test_a_malicious_pickle_is_refused_and_does_not_run(
    zipped: bool, call: Callable[..., Any], wrap: Callable[[Any], Any], tmp_path: Path
) -> None:
    trap = tmp_path / "trap"
    (tmp_path / CONFIG).write_text('{"model_type":"llama"}')
    content = saved(wrap(Touch(trap, call)), _use_new_zipfile_serialization=zipped)
    (tmp_path / BIN_WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert not trap.exists()
    assert str(error.value).startswith(f"{tmp_path / BIN_WEIGHTS}: ")
    if zipped:
        assert "nothing of it was executed" in str(error.value)
        if call is os.system:  # or the test would pass for a trap that does not work
            torch.load(io.BytesIO(content), weights_only=False)
            assert trap.exists()


PROGRAMS: dict[str, tuple[list[bytes | str], str]] = {
    "a call of a name": ([START, "x", name("os.system"), "true", pickle.TUPLE1, pickle.REDUCE, END], "'os.system'"),
    "a name alone": ([START, "x", name("builtins.eval"), END], "would call or use 'builtins.eval'"),
    "a name with terminal codes": ([name("os.\x1b[2J")], r"'os.\x1b[2J'"),
    "an endless name": ([pickle.GLOBAL, b"a" * 10**6], "a name does not end"),
    "a name of protocol 4": ([START, "x", "os", "system", pickle.STACK_GLOBAL, END], r"instruction b'\x93'"),
    "an object": ([START, "x", name("torch.FloatStorage"), pickle.EMPTY_TUPLE, pickle.NEWOBJ, END], r"b'\x81'"),
    "an extension": ([START, "x", pickle.EXT1, b"\x01", END], r"instruction b'\x82'"),
    "a call of a storage": (
        [START, "x", name("torch.FloatStorage"), sizes(4), pickle.REDUCE, END],
        "it calls torch.FloatStorage with something else than it takes",
    ),
    "a call with a text": (
        [START, "x", name("collections.OrderedDict"), "", pickle.REDUCE, END],
        "it calls collections.OrderedDict with something else than it takes",
    ),
    "a call of a text": (
        [START, "x", "print", pickle.EMPTY_TUPLE, pickle.REDUCE, END],
        "calls something without a name",
    ),
    "a state for a tensor": (
        [START, "x", tensor(storage(), 0, sizes(4), sizes(1)), pickle.EMPTY_DICT, pickle.BUILD, END],
        "it gives a state to something else than a dict",
    ),
    "protocol 4": ([pickle.PROTO, b"\x04", pickle.EMPTY_DICT, pickle.STOP], "of another protocol than torch's"),
    "nothing": ([], "it ends too early"),
    "no end": ([START], "it ends too early"),
    "a text that ends too early": ([START, pickle.BINUNICODE, b"\xff\xff\xff\x7f", b"x"], "it ends too early"),
    "no UTF-8": ([START, pickle.BINUNICODE, b"\1\0\0\0\xff"], "it ends too early, or takes what it has not made"),
    "an empty stack": ([pickle.STOP], "takes what it has not made"),
    "a mark that is not there": ([pickle.TUPLE], "takes what it has not made"),
    "a memo that is not there": ([pickle.BINGET, b"\x05"], "takes what it has not made"),
    "a large number": ([START, "x", pickle.LONG1, b"\xff", b"\x7f" * 255, END], "a number that is too large"),
    "a key that is no text": ([START, sizes(1), "x", END], "it has a dict with a key that is not text"),
    "entries of a text": (["x", "y", "z", END], "puts entries into something else than a dict"),
    "half an entry": ([START, pickle.MARK, "x", pickle.SETITEMS, pickle.STOP], "puts entries into something else"),
    "a text for a tensor": ([START, "x", "y", END], "holds 'x', which is not a tensor"),
    "a dict of dicts": ([START, "state_dict", pickle.EMPTY_DICT, END], "holds 'state_dict', which is not a tensor"),
    "a tensor alone": (
        [tensor(storage(), 0, sizes(4), sizes(1)), pickle.STOP],
        "something else than a dict of tensors",
    ),
    "a number for a storage": ([START, "x", number(4), PERSID, END], "it refers to something else than a storage"),
    "four parts of a storage": (
        [START, "x", pickle.MARK, "storage", name("torch.FloatStorage"), "0", "cpu", pickle.TUPLE, PERSID, END],
        "it refers to something else than a storage",
    ),
    "a storage of a kind that is text": (
        [START, "x", pickle.MARK, "storage", "torch.FloatStorage", "0", "cpu", number(4), pickle.TUPLE, PERSID, END],
        "it refers to something else than a storage",
    ),
    "a storage whose key is a number": (
        [START, "x", storage().replace(text("0"), number(0)), END],
        "it refers to something else than a storage",
    ),
    "a storage whose key is long": (
        [START, "x", storage("0" * 21), END],
        "it refers to something else than a storage",
    ),
    "a text for a storage": ([START, "x", "storage", PERSID, END], "it refers to something else than a storage"),
    "a module for a storage": (
        [START, "x", storage().replace(b"storage", b"modules", 1), END],
        "it refers to something else than a storage",
    ),
    "a storage below zero": ([START, "x", storage(numel=-1), END], "it refers to something else than a storage"),
    "a storage that is not there": (
        [START, "x", tensor(storage("7"), 0, sizes(4), sizes(1)), END],
        "the storage of tensor 'x', of 16 bytes, is not there",
    ),
    "a storage outside": (
        [START, "x", tensor(storage("../version"), 0, sizes(4), sizes(1)), END],
        "it refers to something else than a storage",
    ),
    "a storage of another size": (
        [START, "x", tensor(storage(numel=5), 0, sizes(4), sizes(1)), END],
        "the storage of tensor 'x', of 20 bytes, has 16 bytes",
    ),
    "a storage of another dtype": (
        [START, "x", tensor(storage(kind="torch.HalfStorage"), 0, sizes(4), sizes(1)), END],
        "of 8 bytes, has 16 bytes",
    ),
    "whole numbers": (
        [START, "x", tensor(storage(kind="torch.LongStorage"), 0, sizes(2), sizes(1)), END],
        "holds tensor 'x' in a LongStorage; moeplan reads F32, F16 and BF16",
    ),
    "a tensor beyond its storage": (
        [START, "x", tensor(storage(), 2, sizes(3), sizes(1)), END],
        "tensor 'x' reaches beyond its storage",
    ),
    "a tensor of huge size": (
        [START, "x", tensor(storage(), 0, sizes(2**62, 2**62), sizes(2**62, 1)), END],
        "tensor 'x' reaches beyond its storage",
    ),
    "a tensor below zero": (
        [START, "x", tensor(storage(), -1, sizes(4), sizes(1)), END],
        "something else than it takes",
    ),
    "a size below zero": ([START, "x", tensor(storage(), 0, sizes(-4), sizes(1)), END], "than it takes"),
    "a size that is true": (
        [START, "x", tensor(storage(), 0, pickle.NEWTRUE + pickle.TUPLE1, sizes(1)), END],
        "than it takes",
    ),
    "a stride that is text": (
        [START, "x", tensor(storage(), 0, sizes(4), text("1") + pickle.TUPLE1), END],
        "than it takes",
    ),
    "strides of another count": ([START, "x", tensor(storage(), 0, sizes(4), sizes(1, 1)), END], "than it takes"),
    "many dimensions": ([START, "x", tensor(storage(), 0, sizes(*[1] * 65), sizes(*[1] * 65)), END], "than it takes"),
    "negated elements": (
        [START, "x", tensor(storage(), 0, sizes(4), sizes(1), pickle.EMPTY_DICT + text("neg") + b"\x88" + b"s"), END],
        "it calls torch._utils._rebuild_tensor_v2 with something else than it takes",
    ),
    "one number for many": (
        [START, "x", tensor(storage(), 0, sizes(4), sizes(0)), END],
        "holds tensor 'x', [4], transposed or as columns of another (strides [0])",
    ),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_program_that_is_no_dict_of_tensors_is_refused(case: str) -> None:
    parts, reason = PROGRAMS[case]
    assert reason in refusal(with_program(*parts))


@pytest.mark.parametrize("view", [TABLE.T, TABLE[:, 2:4], TABLE[::2], torch.zeros(1).expand(4)])
def test_a_tensor_that_does_not_lie_in_one_piece_is_refused_by_name(view: torch.Tensor) -> None:
    message = refusal(saved({"fine": TABLE, "model.norm.weight": view}))
    assert message.startswith("holds tensor 'model.norm.weight', ")
    assert message.endswith("load the model with transformers, then save_pretrained")


OTHER_DTYPES = [
    *(torch.float64, torch.float8_e4m3fn, torch.complex64, torch.complex128, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    message = refusal(saved({"x": torch.zeros(3).to(dtype)}))
    assert ("moeplan reads F32, F16 and BF16" in message) or ("_rebuild_tensor_v3" in message)


HELD = {"x": torch.arange(4.0), "y": torch.ones(2, 3)}
PLAIN = saved(HELD)
LEGACY = saved({"x": torch.arange(4.0)}, _use_new_zipfile_serialization=False)

FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no file of torch.save: it begins with b''"),
    "an error page": (b"<!DOCTYPE html>", "is no file of torch.save: it begins with b'<!DO'"),
    "safetensors": (b"\x08" + bytes(7) + b"{}      ", "is no file of torch.save"),
    "before torch 1.6": (
        LEGACY,
        "as torch wrote them before version 1.6; its tensors cannot be read in parts. Load and",
    ),
    "cut off": (PLAIN[:-100], "is truncated, or not a zip archive"),
    "without its first bytes": (b"PK" + PLAIN[66:], "is a broken zip archive: "),
    "a member that lies elsewhere": (
        PLAIN.replace(b"PK\3\4", b"PK\3\5").replace(b"PK\3\5", b"PK\3\4", 1),
        "not where it is",
    ),
    "longer": (PLAIN + b"\0", "is truncated, or not a zip archive"),
    "four bytes": (PLAIN[:4], "is truncated, or not a zip archive"),
    "another zip": (
        repacked(PLAIN, {"archive/data.pkl": None}),
        "but not one that torch.save wrote: it has no data.pkl",
    ),
    "two pickles": (repacked(PLAIN, {"other/data.pkl": b""}), "but not one that torch.save wrote"),
    "compressed": (repacked(PLAIN, {}, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "big-endian": (repacked(PLAIN, {"archive/byteorder": b"big"}), "was saved on a big-endian machine"),
    "no storage": (repacked(PLAIN, {"archive/data/0": None}), "of 16 bytes, is not there"),
    "a short storage": (repacked(PLAIN, {"archive/data/0": bytes(15)}), "of 16 bytes, has 15 bytes"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_torch_did_not_write_so_is_refused(case: str) -> None:
    content, reason = FILES[case]
    assert reason in refusal(content)


def test_an_old_file_can_be_converted_as_the_message_says(tmp_path: Path) -> None:
    (tmp_path / "old.bin").write_bytes(LEGACY)
    command = refusal(LEGACY).partition("Load and save it once: ")[2]
    exec(command, {"torch": torch, "FILE": tmp_path / "old.bin"})
    assert_holds((tmp_path / "old.bin").read_bytes(), {"x": torch.arange(4.0)})


def test_a_list_of_members_is_not_read_where_it_is_larger_than_asked_for() -> None:
    with pytest.raises(ArchiveError, match=r"lists its members in [\d,]+ bytes; at most 100 are read"):
        read_archive(io.BytesIO(PLAIN), len(PLAIN), 100)


@pytest.mark.parametrize(
    ("field", "value"), [(42, 2**31), (42, len(PLAIN) - 30), (24, 600)], ids=["far", "near", "long"]
)
def test_members_that_reach_into_the_list_of_members_are_refused(field: int, value: int) -> None:
    content = bytearray(PLAIN)
    at = PLAIN.rindex(b"archive/data/1") - 46  # its entry in the list: the offset at 42, sizes at 20 and 24
    for begin in {field, 20} if field == 24 else {field}:
        content[at + begin : at + begin + 4] = value.to_bytes(4, "little")
    assert "'archive/data/1' does not lie before the list of members" in refusal(bytes(content))


def test_a_member_that_is_listed_twice_is_refused() -> None:
    at = PLAIN.rindex(b"archive/data/1")
    assert "it lists 'archive/data/0' twice" in refusal(PLAIN[:at] + b"archive/data/0" + PLAIN[at + 14 :])


@settings(max_examples=300)
@given(st.data())
def test_no_change_to_a_file_brings_anything_but_a_refusal(data: st.DataObject) -> None:
    content = bytearray(PLAIN)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        found = located(bytes(content))
    except ArchiveError:
        return
    for place in found.values():
        assert (
            0 <= place.offset <= place.offset + torch.Size(place.shape).numel() * place.dtype.itemsize <= len(content)
        )


@settings(max_examples=200)
@given(st.lists(st.sampled_from([bytes([code]) for code in range(256)]) | st.binary(max_size=9), max_size=60))
def test_no_program_brings_anything_but_a_refusal(parts: list[bytes]) -> None:
    with suppress(ArchiveError):
        located(with_program(START, *parts, END))


# The archive


def list_of_members(content: bytes) -> tuple[int, int]:
    """Where the list of members lies, and its size."""
    nbytes, offset = struct.unpack_from("<2L", content, content.rindex(b"PK\5\6") + 12)
    return offset, nbytes


def with_end(content: bytes, offset: int, nbytes: int, *, end: int | None = None, signature: bytes = b"\6\6") -> bytes:
    """An archive whose list of members is said to lie from `offset` on by the record for over 4 GiB alone.

    That record has this `signature`, and is said to be at byte `end`.
    """
    kept = content[: sum(list_of_members(content))]
    record = b"PK" + signature + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, 0, 0, nbytes, offset)
    locator = b"PK\6\7" + struct.pack("<LQL", 0, len(kept) if end is None else end, 1)
    return kept + record + locator + b"PK\5\6" + struct.pack("<4H2LH", *[0xFFFF] * 4, *[0xFFFFFFFF] * 2, 0)


def test_a_list_of_members_may_lie_beyond_four_gigabytes() -> None:
    assert_holds(with_end(PLAIN, *list_of_members(PLAIN)), HELD)


@pytest.mark.parametrize(
    "wrong",
    [{"offset": 2**64 - 1}, {"nbytes": 2000}, {"end": 2**64 - 1}, {"signature": b"\6\5"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_list_of_members_that_is_not_where_it_is_said_to_be_is_refused(wrong: dict[str, Any]) -> None:
    offset, nbytes = list_of_members(PLAIN)
    reason = "is truncated, or not a zip archive: its list of members is not where it should end"
    assert reason in refusal(with_end(PLAIN, **{"offset": offset, "nbytes": nbytes, **wrong}))


def test_an_empty_archive_is_refused() -> None:
    assert "it has no data.pkl" in refusal(b"PK\5\6" + bytes(18))


# a member's entry in the list: its field at a byte, what stands there then, what the message says
ENTRIES: dict[str, tuple[int, bytes, str]] = {
    "signature": (0, b"PK\3\4", "its list of members is not one"),
    "encrypted": (8, b"\1\0", "holds 'archive/data/1' compressed or encrypted"),
    "method": (10, b"\x08\0", "holds 'archive/data/1' compressed or encrypted"),
    "packed": (20, b"\1\0\0\0", "holds 'archive/data/1' compressed or encrypted"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_member_that_is_not_stored_as_it_is_is_refused(case: str) -> None:
    field, value, reason = ENTRIES[case]
    at = PLAIN.rindex(b"archive/data/1") - 46 + field
    assert reason in refusal(PLAIN[:at] + value + PLAIN[at + len(value) :])


@pytest.mark.parametrize("limit", [2**31, 0], ids=["small", "as if large"])
def test_comments_other_extra_fields_and_names_that_are_no_text_are_stepped_over(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(PLAIN)) as old, zipfile.ZipFile(file, "w") as new:
        for member in [*old.namelist(), "archive/xy"]:
            info = zipfile.ZipInfo(member)
            info.extra, info.comment = b"UT\3\0abc", b"a comment"
            new.writestr(info, b"" if member == "archive/xy" else old.read(member))
    # Python puts the field of sizes first; others need not.
    content = re.sub(rb"(\x01\0[\x08\x10\x18]\0.{8,24}?)(UT\x03\0abc)", rb"\2\1", file.getvalue(), flags=re.DOTALL)
    assert (content != file.getvalue()) == (limit == 0)
    assert_holds(content.replace(b"archive/xy", b"archive/\xff\xfe"), HELD)


# Time and memory

MEASURE = """
import sys, time
from moeplan.checkpoint import open_checkpoint
from moeplan.places import CheckpointError
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        print(time.process_time() - start, error)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""

COUNT = MAX_INSTRUCTIONS - 10

BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "dicts": (lambda: pickle.EMPTY_DICT * COUNT * 2, "more than 1,500,000 instructions"),
    "dicts that are kept": (
        lambda: b"".join(b"}r" + n.to_bytes(4, "little") for n in range(COUNT // 2)),
        "it ends too early",
    ),
    "a memo with a huge number": (lambda: pickle.EMPTY_DICT + b"r\xff\xff\xff\xff", "it ends too early"),
    "tuples of tuples that are hashed": (
        lambda: (
            START + pickle.EMPTY_TUPLE + (pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.TUPLE2) * 1000 + b"Ns."
        ),
        "a key that is not text",
    ),
    "deep tuples": (lambda: START + text("x") + b")" + pickle.TUPLE1 * COUNT + END, "which is not a tensor"),
    "numbers": (lambda: pickle.MARK + pickle.BININT1 * 2 * (COUNT - 20) + pickle.TUPLE, "it ends too early"),
    "a text": (lambda: START + text("x" * (MAX_HEADERS_NBYTES - 10_000)) + text("y") + END, "which is not a tensor"),
    "a pickle of many bytes": (lambda: bytes(MAX_HEADERS_NBYTES), "at most 8,388,608 are read"),
}


def many_members() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for n in range(120_000):
            archive.writestr(zipfile.ZipInfo(f"a/{n:x}"), b"")
    return file.getvalue()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of memory")
def test_the_largest_programs_take_less_than_three_seconds_and_250_mib(tmp_path: Path) -> None:
    contents = {case: with_program(make()) for case, (make, _) in BOMBS.items()} | {"members": many_members()}
    for number, content in enumerate(contents.values()):
        path = tmp_path / f"{number}"
        path.mkdir()
        (path / CONFIG).write_text('{"model_type":"llama"}')
        (path / BIN_WEIGHTS).write_bytes(content)
    command = [sys.executable, "-c", MEASURE, *sorted(tmp_path.iterdir())]
    *lines, peak_kib = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    reasons = [reason for _, reason in BOMBS.values()] + ["it has no data.pkl"]
    for case, line, reason in zip(contents, lines, reasons, strict=True):
        seconds, message = line.split(maxsplit=1)
        assert float(seconds) < 3, case
        assert reason in message, case
    assert int(peak_kib) < 250 * 1024


# Checkpoints


def write_shards(path: Path, names: list[str]) -> dict[str, str]:
    weight_map = {name: f"pytorch_model-{n % 2 + 1:05}-of-00002.bin" for n, name in enumerate(names)}
    for shard in set(weight_map.values()):
        torch.save({name: TENSORS[name] for name in names if weight_map[name] == shard}, path / shard)
    (path / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text('{"model_type":"llama"}')
    return tmp_path


def test_a_checkpoint_may_be_one_bin_file_or_shards(path: Path) -> None:
    weight_map = write_shards(path, list(TENSORS))
    sharded = open_checkpoint(path).tensors
    torch.save(TENSORS, path / BIN_WEIGHTS)
    single = open_checkpoint(path).tensors
    for tensors in (single, sharded):
        assert tensors.keys() == TENSORS.keys()
        for key, read in tensors.items():
            with open(read.file.path, "rb") as file:
                file.seek(read.offset)
                expected = TENSORS[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert file.read(read.nbytes) == expected
    assert {key: Path(read.file.path).name for key, read in sharded.items()} == weight_map
    assert single["lm_head.weight"] is single["model.embed_tokens.weight"]


def test_safetensors_are_preferred_and_one_file_to_shards_as_in_transformers(path: Path) -> None:
    write_shards(path, ["scalar"])
    assert open_checkpoint(path).tensors.keys() == {"scalar"}
    torch.save({"half": TENSORS["half"]}, path / BIN_WEIGHTS)
    assert open_checkpoint(path).tensors.keys() == {"half"}
    save_file({"bfloat": TENSORS["bfloat"]}, path / WEIGHTS)
    assert open_checkpoint(path).tensors.keys() == {"bfloat"}


def test_the_shards_of_a_bin_index_must_be_bin_files_that_hold_what_it_says(path: Path) -> None:
    weight_map = write_shards(path, ["scalar", "half"])
    (path / BIN_INDEX).write_text(json.dumps({"weight_map": {**weight_map, "bfloat": weight_map["half"]}}))
    with pytest.raises(CheckpointError, match=rf"-00002-of-00002\.bin: tensor 'bfloat' is not there; {BIN_INDEX} says"):
        open_checkpoint(path)
    (path / BIN_INDEX).write_text(json.dumps({"weight_map": {"scalar": WEIGHTS}}))
    with pytest.raises(CheckpointError, match=rf"'scalar' is mapped to '{WEIGHTS}', not to a \.bin file"):
        open_checkpoint(path)


def test_a_bin_file_that_is_a_git_lfs_pointer_or_a_link_out_is_refused(path: Path) -> None:
    (path / BIN_WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976576152\n")
    with pytest.raises(CheckpointError, match="is a git-LFS pointer"):
        open_checkpoint(path)
    (path / BIN_WEIGHTS).unlink()
    (path / BIN_WEIGHTS).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is a symbolic link out of the checkpoint"):
        open_checkpoint(path)
