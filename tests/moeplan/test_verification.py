"""`moeplan verify`: an intact model passes, and whatever was changed in it is named."""

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import moeplan, snapshot, sparse_llama, write_config
from safetensors import safe_open

from executor.journal import Journal
from moeplan.checkpoint import open_checkpoint
from moeplan.output import OutputError
from moeplan.publication import MODEL
from moeplan.record import header, header_sha256
from moeplan.staging import PARTIAL, finish_publication, staged
from moeplan.verification import verify


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory) -> Path:
    """A merged model in several shards, with copies, computed and repeated tensors."""
    place = tmp_path_factory.mktemp("model")
    base, other = checkpoint("llama-plain"), checkpoint("llama-plain", 1)
    config = write_config(
        place / "config.yml", base, [base, other, {"source_model": other, "noise_scale": 0.1}, base], dtype="bfloat16"
    )
    assert moeplan(config, place / "out", "--out-shard-size", "300KB").status == 0
    return place / "out"


def test_an_intact_model_is_told_to_be(model):
    result = moeplan("verify", model)
    assert result.status == 0
    assert result.stdout.startswith(f"intact  {model}\n")
    assert "everything is as it was written" in result.stdout
    assert json.loads(moeplan("verify", model, "--json").stdout)["verification"]["wrong"] == []


def test_a_bit_that_is_flipped_anywhere_is_found_and_its_tensor_named(model):
    chance = random.Random(0)
    shards = sorted(model.glob("*.safetensors"))
    for _ in range(100):
        shard = chance.choice(shards)
        data = bytearray(shard.read_bytes())
        place = chance.randrange(8 + int.from_bytes(data[:8], "little"), len(data))
        bit = 1 << chance.randrange(8)
        data[place] ^= bit
        shard.write_bytes(data)
        result = moeplan("verify", model, "--quiet")
        data[place] ^= bit
        shard.write_bytes(data)
        assert result.status == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("wrong: ")
        assert f"({shard.name}, from byte " in line


def test_what_was_shared_with_a_source_is_compared_with_it_as_long_as_it_is_the_same(checkpoint, tmp_path):
    """Sharing needs a file system with reflinks; what the record then says can be written on any."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama-plain"), source)
    config = write_config(tmp_path / "config.yml", source, [source, checkpoint("llama-plain", 1)])
    out = tmp_path / "out"
    assert moeplan(config, out).status == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    read = open_checkpoint(source).tensors[name]
    record = json.loads((out / "moeplan.json").read_text())
    record["tensors"][name] = [{"numel": read.numel, "source": read.file.path, "offset": read.offset}]
    (out / "moeplan.json").write_text(json.dumps(record))
    assert moeplan("verify", out).status == 0

    record["tensors"][name][0]["offset"] += 4096
    (out / "moeplan.json").write_text(json.dumps(record))
    assert f"wrong: {name} (model.safetensors, from byte " in moeplan("verify", out).stderr

    file = source / "model.safetensors"

    def change_the_header_alone() -> None:
        status = file.stat()
        file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"np"', 1))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    for harm in (change_the_header_alone, lambda: os.utime(file), file.unlink):
        harm()
        result = moeplan("verify", out)
        assert result.status == 1
        assert result.stderr.startswith(f"unknown: {name}: was shared with {read.file.path}, which ")
        assert "1 that cannot be checked" in result.stdout


def flip(file: Path, place: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        (byte,) = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 4]))


def test_a_model_that_shares_extents_is_checked_by_its_sources_and_does_not_change_with_them(reflinking):
    chance = random.Random(0)
    sources = [
        sparse_llama(reflinking / name, hidden_size=256, intermediate_size=1024) / "model.safetensors"
        for name in ("base", "expert")
    ]
    for source in sources:
        begin = 8 + int.from_bytes(source.read_bytes()[:8], "little")
        with source.open("r+b") as file:
            file.seek(begin)
            file.write(chance.randbytes(source.stat().st_size - begin))
    os.sync()
    base, expert = (source.parent for source in sources)
    config, out = write_config(reflinking / "config.yml", base, [base, expert]), reflinking / "out"
    merged = json.loads(moeplan(config, out, "--json").stdout)
    assert merged["result"]["nbytes_by_path"]["reflinked"] > 3_000_000
    assert moeplan("verify", out).status == 0

    shard, before = out / "model.safetensors", snapshot(out)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    with safe_open(shard, "pt") as opened:
        assert name in set(opened.keys())
    data = before["model.safetensors"]
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    place = 8 + int.from_bytes(data[:8], "little") + sum(header[name]["data_offsets"]) // 2
    untouched = [source.read_bytes() for source in sources]
    flip(shard, place)
    assert f"wrong: {name} (model.safetensors, from byte " in moeplan("verify", out).stderr
    assert [source.read_bytes() for source in sources] == untouched
    flip(shard, place)
    assert moeplan("verify", out).status == 0

    flip(sources[1], sources[1].stat().st_size // 2)
    assert snapshot(out) == before
    result = moeplan("verify", out, "--quiet")
    assert result.status == 1
    assert {line.partition(":")[0] for line in result.stderr.splitlines()} == {"unknown"}
    shutil.rmtree(out)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_file_that_is_changed_or_gone_is_named(model, name):
    before = (model / name).read_bytes()
    try:
        (model / name).write_bytes(before + b" ")
        assert f"wrong: {name}: is not what was written" in moeplan("verify", model).stderr
        (model / name).unlink()
        assert f"wrong: {name}: is not there" in moeplan("verify", model).stderr
    finally:
        (model / name).write_bytes(before)


def test_a_shard_that_is_gone_cut_or_of_another_header_is_named(model):
    shard = min(model.glob("*.safetensors"))
    before = shard.read_bytes()
    try:
        for data in (before[:-1], before[:100], b"", before[:9] + b" " + before[10:]):
            shard.write_bytes(data)
            result = moeplan("verify", model)
            assert result.status == 1
            assert f"{shard.name}" in result.stderr
        shard.unlink()
        assert f"wrong: {shard.name}: is not there" in moeplan("verify", model).stderr
    finally:
        shard.write_bytes(before)


def test_what_the_disk_does_not_give_is_named_and_all_else_is_checked(model):
    shards = sorted(model.glob("*.safetensors"))
    unreadable = [model / "config.json", shards[0]]
    last = shards[-1].read_bytes()
    try:
        for file in unreadable:
            file.rename(file.with_suffix(".good"))
            file.symlink_to("/proc/self/mem")  # reading it is an I/O error
        shards[-1].write_bytes(last[:-1] + bytes([last[-1] ^ 1]))
        result = moeplan("verify", model)
    finally:
        shards[-1].write_bytes(last)
        for file in unreadable:
            file.with_suffix(".good").rename(file)
    assert result.status == 1
    first, second, third = sorted(result.stderr.splitlines())
    assert first == "wrong: config.json: cannot be read (Input/output error)"
    assert f"({shards[-1].name}, from byte " in second
    assert third == f"wrong: {shards[0].name}: cannot be read (Input/output error)"


def test_nothing_is_read_beyond_the_end_of_a_shard_that_was_cut(model):
    shard = max(model.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    before, nbytes = shard.read_bytes(), []
    try:
        verify(model, nbytes.append)
        shard.write_bytes(before[: len(before) // 2])
        found = verify(model, nbytes.append)
    finally:
        shard.write_bytes(before)
    assert nbytes[1] <= nbytes[0] - len(before) // 2
    assert found.wrong == [f"{shard.name}: has {len(before) // 2:,} bytes, and {len(before):,} were written"]


@pytest.mark.parametrize(
    "content", [None, b"{", b"[]", b'{"format": 2}', b'{"format": 1}', b'{"format": 1, "files": 3}']
)
def test_without_a_record_that_can_be_read_nothing_is_verified(tmp_path, content):
    if content is not None:
        (tmp_path / "moeplan.json").write_bytes(content)
    result = moeplan("verify", tmp_path)
    assert result.status == 2
    assert f"{tmp_path}/moeplan.json" in result.error


def test_a_record_of_another_format_or_without_end_is_told_to_be(model, tmp_path):
    record = json.loads((model / "moeplan.json").read_text())
    (tmp_path / "moeplan.json").write_text(json.dumps(record | {"format": 2}))
    result = moeplan("verify", tmp_path)
    assert result.error == f"{tmp_path}/moeplan.json: is of format 2, and this moeplan reads 1"
    os.truncate(tmp_path / "moeplan.json", 1 << 40)
    result = moeplan("verify", tmp_path)
    assert result.error.startswith(f"{tmp_path}/moeplan.json: is larger than 67,108,864 bytes")


@pytest.mark.parametrize(
    "damage",
    [
        lambda segments: segments.clear(),
        lambda segments: segments[0].update(numel=float(segments[0]["numel"])),
        lambda segments: segments[0].update(head=1e3),
        lambda segments: segments[0].update(numel=segments[0]["numel"] - 1),
        lambda segments: segments.insert(0, {**segments[0], "numel": -1}),
    ],
)
def test_a_record_whose_segments_are_not_the_tensor_is_told_to_be_damaged(model, damage):
    assert_said_to_be_damaged(model, lambda record: damage(next(iter(record["tensors"].values()))))


def assert_said_to_be_damaged(model: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    before = (model / "moeplan.json").read_bytes()
    record = json.loads(before)
    damage(record)
    try:
        (model / "moeplan.json").write_text(json.dumps(record))
        result = moeplan("verify", model)
    finally:
        (model / "moeplan.json").write_bytes(before)
    assert (result.status, result.error) == (2, f"{model}/moeplan.json: is not what moeplan writes")


@pytest.mark.parametrize("offset", [-1, 1.0, 1 << 60, 1 << 63, 1 << 64])
def test_a_record_of_a_place_in_a_source_that_no_file_has_is_told_to_be_damaged(model, offset):
    def damage(record: dict[str, Any]) -> None:
        (source, *_), segments = record["made_from"]["source"], next(iter(record["tensors"].values()))
        segments[0] = {"numel": segments[0]["numel"], "source": source, "offset": offset}

    assert_said_to_be_damaged(model, damage)


def test_paths_that_are_not_utf_8_are_recorded_and_read_again(checkpoint, tmp_path, monkeypatch):
    place = tmp_path / os.fsdecode(b"mod\xe8les \xe9")
    shutil.copytree(checkpoint("llama-plain"), place / "base")
    monkeypatch.chdir(place)
    config = write_config(tmp_path / "config.yml", "base", ["base", "base"], dtype="bfloat16")
    merged = moeplan(config, "out")
    assert merged.status == 0, merged.stderr
    record = json.loads((place / "out" / "moeplan.json").read_text("ascii"))
    assert str(place / "base" / "model.safetensors") in record["made_from"]["source"]
    assert moeplan("verify", "out").status == 0


def test_of_a_file_without_a_header_its_beginning_is_told_from_another(tmp_path):
    file = tmp_path / "model.bin"
    file.write_bytes(b"PK\3\4\0\0\0\0" + bytes(32 << 20))
    before = header_sha256(file)
    assert sum(map(len, header(file))) <= 128 << 10
    file.write_bytes(b"PK\3\4\0\0\0\0" + b"x" * (32 << 20))
    assert header_sha256(file) != before


def test_a_record_that_leaves_out_a_shard_or_what_is_in_one_is_told_to_be_damaged(model):
    assert_said_to_be_damaged(model, lambda record: record["shards"].clear())
    assert_said_to_be_damaged(model, lambda record: record.update(tensors=dict.fromkeys(record["tensors"])))


def test_a_model_is_not_verified_while_a_merge_writes_there_nor_does_a_merge_begin_while_it_is(model):
    def verify_while_merging() -> None:
        with staged(model, {}, overwrite=True):
            outcome = moeplan("verify", model)
            assert (outcome.status, outcome.error) == (2, f"{model}: a merge is writing there; wait until it is done")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_while_merging()

    def begin(_: int) -> None:
        assert moeplan("verify", model).status == 0
        with staged(model, {}, overwrite=True):
            pass

    with pytest.raises(OutputError, match=r"another merge is writing there, or `moeplan verify` reads what is there"):
        verify(model, begin)
    assert moeplan("verify", model).status == 0


def test_what_is_only_begun_is_told_to_be(tmp_path):
    (tmp_path / PARTIAL).mkdir()
    outcome = moeplan("verify", tmp_path)
    assert outcome.status == 2
    assert outcome.error == f"{tmp_path}: an unfinished merge is there; run its command again, which goes on with it"


def test_half_of_a_model_that_was_being_moved_to_its_place_is_not_said_to_be_wrong(model, tmp_path):
    out = shutil.copytree(model, tmp_path / "out")
    (out / PARTIAL / MODEL).mkdir(parents=True)
    journal = Journal(out / PARTIAL, {"config": {}})
    journal.begin_publishing([file.name for file in model.iterdir()], [])
    journal.close()
    assert moeplan("verify", out).status == 0  # all is in its place already
    (out / "config.json").rename(out / PARTIAL / MODEL / "config.json")
    outcome = moeplan("verify", out)
    assert outcome.status == 2
    assert outcome.error.startswith(f"{out}: an unfinished merge is there, which was stopped when it moved its model")
    finish_publication(out)
    assert moeplan("verify", out).status == 0


def test_a_directory_that_cannot_be_locked_is_verified_all_the_same(model, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (model / "nowhere").stat())
    assert moeplan("verify", model).status == 0


def test_what_is_no_directory_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "out")
    assert moeplan("verify", tmp_path / "out").status == 2


def test_a_record_that_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "moeplan.json")
    result = moeplan("verify", tmp_path)
    assert result.status == 2
    assert result.error.startswith(f"{tmp_path}/moeplan.json: is not a regular file")
