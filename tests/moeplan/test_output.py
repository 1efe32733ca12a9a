"""The output directory: what may be there, that a model appears in it all at once, and that nothing else is left."""

import os
from pathlib import Path

import pytest
from commands import snapshot

from executor.errors import RunError
from moeplan.output import (
    MAX_TOKENIZER_NBYTES,
    PARTIAL,
    OutputError,
    check_output,
    free_nbytes,
    staged,
    tokenizer_files,
    write_beside,
)

MODEL = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json")


def write_model(partial: Path) -> None:
    for name in (*MODEL, "model.safetensors.index.json"):
        (partial / name).write_text(name)


def test_a_new_and_an_empty_directory_may_be_written_to(tmp_path):
    check_output(tmp_path / "new" / "deeper")
    check_output(tmp_path)
    assert snapshot(tmp_path) == {}


def test_a_directory_that_holds_something_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match=r"the directory is not empty \(notes\.txt\); give a new or an empty one"):
        check_output(tmp_path)


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be an output directory: Not a directory"):
            check_output(path)


def test_what_a_killed_merge_left_is_neither_in_the_way_nor_kept(tmp_path):
    (tmp_path / PARTIAL / "deeper").mkdir(parents=True)
    (tmp_path / PARTIAL / "deeper" / "model.safetensors").touch()
    check_output(tmp_path)
    with staged(tmp_path) as partial:
        assert snapshot(partial) == {}
    assert snapshot(tmp_path) == {}


def test_nothing_is_in_its_place_until_all_is(tmp_path):
    out = tmp_path / "new" / "out"
    with staged(out) as partial:
        write_model(partial)
        assert [path.name for path in out.iterdir()] == [PARTIAL]
    assert {path.name for path in out.iterdir()} == {*MODEL, "model.safetensors.index.json"}
    assert (out / "config.json").read_text() == "config.json"


def test_the_index_and_config_json_come_last(tmp_path, monkeypatch):
    moved = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (moved.append(self.name), rename(self, target)))
    with staged(tmp_path) as partial:
        write_model(partial)
    assert sorted(moved) == sorted((*MODEL, "model.safetensors.index.json"))
    assert moved[-2:] == ["model.safetensors.index.json", "config.json"]


@pytest.mark.parametrize("error", [RunError("the disk is full"), KeyboardInterrupt()])
def test_a_merge_that_fails_leaves_the_disk_as_it_was(tmp_path, error):
    def fail(out: Path) -> None:
        with staged(out) as partial:
            write_model(partial)
            raise error

    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for out in (tmp_path / "empty", tmp_path / "new" / "and" / "deeper"):
        with pytest.raises(type(error)):
            fail(out)
    assert snapshot(tmp_path) == before


def test_a_model_that_cannot_be_moved_to_its_place_leaves_nothing_of_itself_there(tmp_path):
    def write_where_someone_else_does() -> None:
        with staged(tmp_path) as partial:
            write_model(partial)
            (tmp_path / "tokenizer.json").mkdir()

    with pytest.raises(RunError, match="the finished files could not be moved here: Is a directory"):
        write_where_someone_else_does()
    assert snapshot(tmp_path) == {"tokenizer.json": None}


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/out: cannot be made: Not a directory"), staged(tmp_path / "file" / "out"):
        pass
    assert snapshot(tmp_path) == {"file": b""}


def test_two_merges_cannot_write_to_one_directory(tmp_path):
    with staged(tmp_path) as partial:
        write_model(partial)
        with (
            pytest.raises(OutputError, match="another merge is writing there; give another directory"),
            staged(tmp_path),
        ):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, "model.safetensors.index.json"}


def test_what_stands_beside_the_weights_is_written_and_copied(tmp_path):
    source, partial = tmp_path / "source", tmp_path / "partial"
    (source / "additional_chat_templates").mkdir(parents=True)
    partial.mkdir()
    for name in ("tokenizer.json", "additional_chat_templates/tools.jinja", "README.md", "model.safetensors"):
        (source / name).write_text(name)
    write_beside(partial, {"config.json": "{}\n"}, tokenizer_files(source), source)
    assert snapshot(partial) == {
        "config.json": b"{}\n",
        "tokenizer.json": b"tokenizer.json",
        "additional_chat_templates": None,
        "additional_chat_templates/tools.jinja": b"additional_chat_templates/tools.jinja",
    }


def test_a_file_that_cannot_be_copied_fails_the_run(tmp_path):
    with pytest.raises(RunError, match=r"gone/tokenizer\.json: writing failed: No such file or directory"):
        write_beside(tmp_path, {}, [tmp_path / "gone" / "tokenizer.json"], tmp_path / "gone")


@pytest.mark.parametrize("kind", ["directory", "pipe", "huge file"])
def test_a_tokenizer_file_that_is_no_plain_file_is_refused(tmp_path, kind):
    file = tmp_path / "tokenizer.json"
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.touch()
        os.truncate(file, MAX_TOKENIZER_NBYTES + 1)
    message = r"tokenizer\.json: this is not a file that can be copied; use --no-copy-tokenizer to go without"
    with pytest.raises(OutputError, match=message):
        tokenizer_files(tmp_path)


def test_free_space_is_that_of_the_directory_that_will_hold_the_output(tmp_path):
    assert free_nbytes(tmp_path / "new" / "deeper") == pytest.approx(free_nbytes(tmp_path), rel=0.1)
