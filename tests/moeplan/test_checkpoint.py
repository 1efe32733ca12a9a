"""Opening a checkpoint: it finds what the safetensors library loads. What it refuses, and how, is in tests/hostile."""

import gc
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hostile.corpus import at, info, safetensors_bytes, write_index
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeplan.checkpoint import BIN_INDEX, CONFIG, INDEX, MAX_HEADERS_NBYTES, WEIGHTS, Checkpoint, open_checkpoint
from moeplan.errors import UserError
from moeplan.places import CheckpointError
from moeplan.untrusted_json import MAX_VALUES
from planner.expr import DType, Read

DTYPES = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A true header of BF16 tensors before a hole of the right size, which takes no space."""
    ends = list(itertools.accumulate((2 * torch.Size(shape).numel() for shape in shapes.values()), initial=0))
    offsets = itertools.pairwise(ends)
    header = {name: info("BF16", shape, at) for (name, shape), at in zip(shapes.items(), offsets, strict=True)}
    file.write_bytes(safetensors_bytes(header))
    os.truncate(file, file.stat().st_size + ends[-1])


def write_config(path: Path, **values: Any) -> Path:
    (path / CONFIG).write_text(json.dumps({"model_type": "llama", **values}))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A directory that lacks weights and nothing else."""
    directory = tmp_path / "model"
    directory.mkdir()
    return write_config(directory)


def refusal(path: str | Path) -> str:
    """The message with which `path` is refused."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 1000
    return message


def assert_holds(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Reads the bytes where the checkpoint says that they are."""
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = checkpoint.tensors[name]
        with open(read.file.path, "rb") as file:
            file.seek(read.offset)
            found = file.read(read.nbytes)
        assert found == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert read.shape == tuple(tensor.shape)
        assert DTYPES[read.dtype] is tensor.dtype


TENSORS = {
    "model.embed_tokens.weight": torch.randn(7, 3),
    "model.layers.0.mlp.up_proj.weight": torch.randn(5, 3).half(),
    "model.layers.0.mlp.down_proj.weight": torch.randn(3, 5).bfloat16(),
    "model.norm.weight": torch.randn(3).bfloat16(),
    "scalar": torch.tensor(1.5),
    "empty": torch.zeros(0, 4),
    "naïve name \U0001f600": torch.randn(2),
}


# What is accepted


def test_tensors_lie_where_the_safetensors_library_wrote_them(path: Path) -> None:
    save_file(TENSORS, path / WEIGHTS, metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert_holds(checkpoint, TENSORS)
    assert checkpoint.path == path
    assert checkpoint.model_type == "llama"


def test_tensors_of_shards_lie_in_the_file_that_the_index_names(path: Path) -> None:
    shards = {f"model-{n + 1:05}-of-00003.safetensors": dict(list(TENSORS.items())[n::3]) for n in range(3)}
    for shard, tensors in shards.items():
        save_file(tensors, path / shard)
    write_index(path, {name: shard for shard, tensors in shards.items() for name in tensors})
    checkpoint = open_checkpoint(path)
    assert_holds(checkpoint, TENSORS)
    for shard, tensors in shards.items():
        assert {Path(checkpoint.tensors[name].file.path) for name in tensors} == {path / shard}


def test_a_header_may_be_padded_and_list_its_tensors_in_any_order(path: Path) -> None:
    header = {"b": info("BF16", [2], [4, 8]), "a": info("F32", [], [0, 4])}
    padded = json.dumps(header, indent=2).encode() + b" \n\t" * 5000
    (path / WEIGHTS).write_bytes(safetensors_bytes(padded, b"\0\0\x80\x3f" + b"\x80\x3f\0\x40"))
    assert_holds(open_checkpoint(path), {"a": torch.tensor(1.0), "b": torch.tensor([1.0, 2.0]).bfloat16()})


def test_files_of_equal_headers_are_each_checked_and_read_as_themselves(path: Path, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    write_config(other)
    negated = {name: -tensor for name, tensor in TENSORS.items()}
    save_file(TENSORS, path / WEIGHTS)
    save_file(negated, other / WEIGHTS)
    assert_holds(open_checkpoint(path), TENSORS)
    assert_holds(open_checkpoint(other), negated)
    os.truncate(other / WEIGHTS, (other / WEIGHTS).stat().st_size - 1)
    assert "is truncated: its header describes" in refusal(other)


def test_one_file_is_preferred_to_an_index_as_transformers_does(path: Path) -> None:
    save_file(TENSORS, path / WEIGHTS)
    (path / INDEX).write_text("not even JSON")
    assert_holds(open_checkpoint(path), TENSORS)


def test_the_same_file_through_two_paths_is_one_source(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    save_file(TENSORS, path / WEIGHTS)
    (tmp_path / "link").symlink_to(path)
    hard = write_config(tmp_path)
    (hard / WEIGHTS).hardlink_to(path / WEIGHTS)
    monkeypatch.chdir(path)
    first, *others = [open_checkpoint(p) for p in (path, str(path), ".", tmp_path / "link", hard)]
    assert first.tensors["scalar"].file.nbytes == (path / WEIGHTS).stat().st_size
    assert Path(first.tensors["scalar"].file.path).is_absolute()
    for other in others:
        assert other.tensors == first.tensors  # nodes are equal when they are the same node
    (path / WEIGHTS).touch()
    assert open_checkpoint(path).tensors["scalar"] is not first.tensors["scalar"]


@pytest.mark.parametrize("shared", [False, True], ids=["blobs of the repository", "blobs shared by repositories"])
def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path, shared: bool) -> None:
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "4d7a")
    if shared:
        (tmp_path / "hub" / "blobs" / "4d").mkdir(parents=True)
        (blobs / "4d7a").rename(tmp_path / "hub" / "blobs" / "4d" / "4d7a")
        (blobs / "4d7a").symlink_to("../../blobs/4d/4d7a")
    write_config(blobs).joinpath(CONFIG).rename(blobs / "0c0f")
    (snapshot / CONFIG).symlink_to("../../blobs/0c0f")
    (snapshot / WEIGHTS).symlink_to("../../blobs/4d7a")
    assert_holds(open_checkpoint(snapshot), TENSORS)

    (snapshot / WEIGHTS).unlink()
    save_file(TENSORS, repository / "elsewhere")
    (snapshot / WEIGHTS).symlink_to("../../elsewhere")
    assert "is a symbolic link out of the checkpoint" in refusal(snapshot)


# Sizes


def test_headers_of_more_than_the_limit_are_refused_over_all_shards(path: Path) -> None:
    file = path / WEIGHTS
    file.write_bytes((MAX_HEADERS_NBYTES + 1).to_bytes(8, "little"))
    os.truncate(file, 2 * MAX_HEADERS_NBYTES)
    assert f"{file}: its header takes {MAX_HEADERS_NBYTES + 1:,} bytes; moeplan reads at most" in refusal(path)
    file.unlink()
    for shard in "ab":
        header = json.dumps({shard: at(0, 0)}).encode()
        (path / f"{shard}.safetensors").write_bytes(safetensors_bytes(header + b" " * (MAX_HEADERS_NBYTES // 2)))
    write_index(path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert f"{path / 'b.safetensors'}: its header takes" in refusal(path)


# Directories


def unix_socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(file))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, unix_socket], ids=["directory", "FIFO", "socket"])
@pytest.mark.parametrize("name", [WEIGHTS, INDEX, CONFIG])
def test_what_is_not_a_regular_file_is_refused_without_waiting(
    path: Path, make: Callable[[Path], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == CONFIG:
        (path / CONFIG).unlink()
        save_file(TENSORS, path / WEIGHTS)
    monkeypatch.chdir(path)
    make(path / name)
    assert f"{path / name}: is not a regular file" == refusal(path)


OTHERS = {
    "nothing": ([], "is the download complete, and is this the model's directory?"),
    "shards of pickles": (
        ["pytorch_model-00001-of-00002.bin"],
        f"if it is one of several shards, download {BIN_INDEX}",
    ),
    "a pickle of another name": (["model.pt"], "there is 'model.pt': convert it to safetensors first"),
    "Mistral's own": (
        ["consolidated.safetensors", "params.json"],
        "has consolidated.safetensors, Mistral's own format, alone: give the model in that of transformers",
    ),
    "Meta's pickle": (["consolidated.00.pth"], "there is 'consolidated.00.pth': convert it to safetensors first"),
    "a GGUF": (["q4.gguf"], "there is 'q4.gguf': give the model that the GGUF was converted from"),
    "a file of another name": (["weights.safetensors", "a.bin"], f"is the whole, name it {WEIGHTS}"),
    "shards": (["model-00001-of-00002.safetensors"], f"if it is one of several shards, download {INDEX} too"),
    "an adapter": (
        ["adapter_config.json", "adapter_model.safetensors"],
        "holds a LoRA adapter, not a model: name the model",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_directory_without_weights_is_refused_by_what_it_holds(path: Path, case: str) -> None:
    names, reason = OTHERS[case]
    for name in names:
        (path / name).touch()
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert reason in message


PATHS = {
    "@main": "@main: no such directory; a model on the Hub is named ORG/NAME or ORG/NAME@REVISION",
    "nowhere": "nowhere: no such directory; a model on the Hub is named ORG/NAME or ORG/NAME@REVISION",
    "/nowhere/at/all": "/nowhere/at/all: no such directory",
    "model.gguf": "is a file, and no model's directory: give the model that the GGUF was",
    "model.safetensors": "is a file, and no model's directory: give the directory",
    "model.safetensors/x": "no such directory",
    "models/assistent": "models/assistent: no such directory; did you mean models/assistant?; a model on the Hub",
    "~/model": "~/model: no such directory; ~ and $ are not expanded in the YAML; a model on the Hub",
    "$HOME/model": "$HOME/model: no such directory; ~ and $ are not expanded in the YAML; a model on the Hub",
    "models/assistant@main": "; models/assistant is a directory here, which has no revisions: leave @main out; ",
    "models--org--name": "is where the Hub's cache keeps a model: call it org/name, or give a directory in snapshots/",
    "a\0b": r"'a\x00b': is not the path of a directory",
    "a\udcff": r"'a\udcff': is not the path of a directory",
    "a" * 5000: "cannot be opened (File name too long)",
}


@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name[:30]))
def test_what_is_not_a_local_directory_is_refused_with_what_to_do(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    Path("model.safetensors").touch()
    Path("models/assistant").mkdir(parents=True)
    Path("models--org--name/snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=re.escape(PATHS[name])):
        open_checkpoint(name)


def test_a_directory_that_may_not_be_read_is_refused(path: Path) -> None:
    save_file(TENSORS, path / WEIGHTS)
    (path / WEIGHTS).chmod(0)
    if os.access(path / WEIGHTS, os.R_OK):
        pytest.skip("root may read everything")
    assert refusal(path) == f"{path / WEIGHTS}: cannot be read (Permission denied)"


# config.json


def test_a_null_quantization_config_is_none(path: Path) -> None:
    save_file(TENSORS, path / WEIGHTS)
    write_config(path, quantization_config=None, transformers_weights=WEIGHTS)
    assert open_checkpoint(path).config["quantization_config"] is None


def with_config(**values: Any) -> Checkpoint:
    return Checkpoint(Path("m"), "m", values, {})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (10**12, "1000000000000"),
        (10_001, "10001"),
        (0, "0"),
        (-1, "-1"),
        ("32", "'32'"),
        (True, "True"),
        (32.0, "32.0"),
        ([32], "[32]"),
        ({}, "{}"),
    ],
)
def test_a_whole_number_of_the_config_that_cannot_be_is_refused(value: Any, shown: str) -> None:
    with pytest.raises(UserError) as error:
        with_config(num_hidden_layers=value).integer("num_hidden_layers", default=32, maximum=10_000)
    expected = "it must be a whole number from 1 to 10,000"
    assert str(error.value) == f"{Path('m') / CONFIG}: `num_hidden_layers` is {shown}; {expected}"


def test_numbers_of_the_config_may_be_absent_or_null_where_there_is_a_default() -> None:
    checkpoint = with_config(hidden_size=2**31 - 1, head_dim=None, first=0)
    assert checkpoint.integer("hidden_size") == 2**31 - 1
    assert checkpoint.integer("first", minimum=0) == 0
    assert checkpoint.integer("head_dim", default=128) == 128
    assert checkpoint.integer("other", default=8) == 8
    with pytest.raises(CheckpointError, match="`head_dim` is missing; it must be a whole number"):
        checkpoint.integer("head_dim")


# Against the safetensors library


# What this reader refuses beyond the library.
STRICTER = re.compile(
    "moeplan reads F32, F16 and BF16|has the key .* twice|and nothing else, not|__metadata__ must map|begins with"
    "|more than 64 levels|overflows 64 bits"
)

SIZES = st.sampled_from(["0", "1", "2", "4", "8"])
WEIRD = ["-1", "-0", "1.0", "1e0", "true", "null", '"1"', "NaN", str(2**63), str(2**64), "9" * 30, "[]", "{}", "01", ""]
NAMES = ["a", "b", "c", "d", "e", "f", "g", "é", r"\u00e9", r"\ud83d\ude00", r"\u0000", r"\ud800", "__metadata__"]


@st.composite
def header_texts(draw: st.DrawFn) -> tuple[bytes, int]:
    """The text of a header that is nearly right, and the size of the data that it describes."""
    entries, position = [], 0
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=4)):
        shape = draw(st.lists(SIZES, max_size=3))
        dtype = draw(st.sampled_from(["F32", "BF16", "F16"]))
        nbytes = DType(dtype).itemsize * torch.Size(map(int, shape)).numel()
        offsets = [str(position), str(position + nbytes)]
        position += nbytes
        fields = [f'"dtype":"{dtype}"', f'"shape":[{",".join(shape)}]', f'"data_offsets":[{",".join(offsets)}]']
        entries.append(f'"{name}":{{{",".join(draw(st.permutations(fields)))}}}')
    entries = draw(st.permutations(entries))
    if draw(st.booleans()):
        entries.append('"__metadata__":{"format":"pt"}')
    text = "{" + ",".join(entries) + "}" + draw(st.sampled_from(["", " ", "\n\t "]))
    for _ in range(draw(st.integers(0, 1))):
        numbers = [*re.finditer(r"\d+|\"(dtype|F32)\"", text)]
        if numbers:
            found = draw(st.sampled_from(numbers))
            text = text[: found.start()] + draw(st.sampled_from(WEIRD) | SIZES) + text[found.end() :]
    return text.encode(), position


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with a few bytes replaced, removed or put in."""
    content = bytearray(original)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.integers(0, 3))
        content[start:stop] = draw(
            st.binary(max_size=3) | st.sampled_from([b"[", b"]", b"{", b"}", b",", b'"', b"0", b"\\"])
        )
    return bytes(content)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    text, nbytes = draw(header_texts())
    return draw(mutated(safetensors_bytes(text, bytes(range(256))[:nbytes].ljust(nbytes, b"."))))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose files each example of a test writes anew."""
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=400)
@given(content=header_texts().map(lambda header: safetensors_bytes(header[0], bytes(header[1]))) | files())
def test_what_is_accepted_the_library_accepts_with_the_same_bytes(scratch: Path, content: bytes) -> None:
    try:
        expected = dict(safetensors.deserialize(content))
    except safetensors.SafetensorError:
        expected = None
    (write_config(scratch) / WEIGHTS).write_bytes(content)
    try:
        tensors = open_checkpoint(scratch).tensors
    except CheckpointError as error:
        refused = str(error)
    else:
        refused = None
    if expected is None:
        assert refused is not None
    elif refused is not None:
        assert STRICTER.search(refused)
    else:
        assert tensors.keys() == expected.keys()
        for name, read in tensors.items():
            assert (read.dtype.value, list(read.shape)) == (expected[name]["dtype"], expected[name]["shape"])
            assert content[read.offset : read.offset + read.nbytes] == bytes(expected[name]["data"])


# Time and memory


def processor_seconds(action: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


LAYER = [
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
    "norm.1",
    "norm.2",
]


def test_eight_models_of_7b_open_in_under_a_fifth_of_a_second(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}" for n in range(8)]
    for path in paths:
        path.mkdir()
        write_config(path)
        names = [f"model.layers.{layer}.{part}_proj.weight" for layer in range(32) for part in LAYER]
        weight_map = {name: f"model-{n // 97 + 1:05}-of-00003.safetensors" for n, name in enumerate(names)}
        write_index(path, weight_map)
        for shard in set(weight_map.values()):
            write_sparse(path / shard, {name: (4096, 4096) for name in names if weight_map[name] == shard})
    opened: list[Checkpoint] = []
    assert min(processor_seconds(lambda: opened.extend(map(open_checkpoint, paths))) for _ in range(3)) < 0.2
    assert {len(checkpoint.tensors) for checkpoint in opened} == {288}


def test_128_experts_of_a_70b_model_open_in_under_two_seconds(path: Path) -> None:
    names = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{part}.weight"
        for layer in range(80)
        for expert in range(128)
        for part in (1, 2, 3)
    ]
    write_sparse(path / WEIGHTS, dict.fromkeys(names, (8192, 28672)))
    tensors: dict[str, Read] = {}
    assert processor_seconds(lambda: tensors.update(open_checkpoint(path).tensors)) < 2
    assert len(tensors) == 30_720
    assert tensors[names[-1]].dtype is DType.BF16


# Opens checkpoints that are refused: the processor time of each and the refusal, then the peak of the process's memory.
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

LARGE: dict[str, Callable[[], bytes]] = {
    "keys": lambda: b"{%b}" % b",".join(b'"%x":0' % n for n in range(MAX_VALUES - 2)),
    "keys, four bytes a character": lambda: (
        b'{%b,"%b":"\xf0\x9f\x98\x80"}'
        % (b",".join(b'"%x":0' % n for n in range(MAX_VALUES - 9)), b"x" * (MAX_HEADERS_NBYTES - 14 * 2**18))
    ),
    "objects": lambda: b"{%b}" % b",".join(b'"%x":{}' % n for n in range(MAX_VALUES // 2 - 2)),
    "lists": lambda: b'{"a":[%b]}' % b",".join([b"[]"] * (MAX_VALUES // 2 - 2)),
    "text": lambda: b'{"a":"%b\xf0\x9f\x98\x80"}' % (b"x" * (MAX_HEADERS_NBYTES - 20)),
    "one number": lambda: b'{"a":%b}' % (b"9" * (MAX_HEADERS_NBYTES - 20)),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak of memory")
def test_the_largest_headers_take_less_than_a_second_and_200_mib(tmp_path: Path) -> None:
    for number, header in enumerate(LARGE.values()):
        (tmp_path / f"{number}").mkdir()
        (write_config(tmp_path / f"{number}") / WEIGHTS).write_bytes(safetensors_bytes(header()))
    command = [sys.executable, "-c", MEASURE, *sorted(tmp_path.iterdir())]
    *lines, peak_kib = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    for case, line in zip(LARGE, lines, strict=True):
        seconds, message = line.split(maxsplit=1)
        assert float(seconds) < 1, case
        reason = "beyond what a float can be" if case == "one number" else "must have dtype, shape and data_offsets"
        assert reason in message, case
    assert int(peak_kib) < 200 * 1024


def test_a_file_that_moved_is_found_where_it_is_now(path: Path, tmp_path: Path) -> None:
    write_config(path)
    save_file({"weight": torch.ones(4)}, path / WEIGHTS)
    kept = open_checkpoint(path).tensors["weight"]
    path.rename(tmp_path / "moved")
    found = open_checkpoint(tmp_path / "moved").tensors["weight"]
    assert Path(kept.file.path) == path / WEIGHTS
    assert Path(found.file.path) == tmp_path / "moved" / WEIGHTS
