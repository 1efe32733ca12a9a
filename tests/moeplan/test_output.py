"""What stands beside the weights."""

import errno
import os
from pathlib import Path

import pytest
from commands import snapshot

from executor.errors import RunError
from executor.journal import Journal
from executor.writer import ShardWriter
from moeplan.disk import free_nbytes
from moeplan.errors import MoeplanWarning
from moeplan.output import write_beside
from moeplan.tokenizer_files import MAX_READ_NBYTES, missing_code, tokenizer_files
from planner.layout import Shard


@pytest.mark.parametrize("nbytes", [0, MAX_READ_NBYTES - 100])
def test_code_is_missed_that_a_tokenizer_config_names_however_long_it_is(tmp_path, nbytes):
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'.ljust(nbytes))
    assert missing_code(tmp_path) == ["own.py"]


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
    with pytest.raises(RunError, match=r"gone/tokenizer\.json: cannot be read: No such file or directory"):
        write_beside(tmp_path, {}, [tmp_path / "gone" / "tokenizer.json"], tmp_path / "gone")


def test_a_file_that_fails_while_it_is_copied_is_named(tmp_path):
    unreadable = Path("/proc/self/mem")  # can be opened, and has nothing at its start
    with pytest.raises(RunError, match=r"^/proc/self/mem: cannot be read: Input/output error$"):
        write_beside(tmp_path, {}, [unreadable], unreadable.parent)


def test_a_full_disk_is_said_in_the_same_words_of_shards_the_journal_and_what_stands_beside(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").touch()
    shard = Shard("model.safetensors", 16, 16, ())
    journal = Journal(tmp_path, {})
    writing = {
        "journal": lambda: journal.drop_result("key"),
        "results/key": lambda: journal.save_result("key", memoryview(b"result")),
        "model.safetensors": lambda: ShardWriter(tmp_path, [shard]),
        "config.json": lambda: write_beside(tmp_path, {"config.json": "{}"}, [], tmp_path),
        "tokenizer.json": lambda: write_beside(
            tmp_path, {}, [tmp_path / "source" / "tokenizer.json"], tmp_path / "source"
        ),
    }
    journal.finished.results["key"] = 1
    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "fsync", full)
    for name, write in writing.items():
        with pytest.raises(RunError) as error:
            write()
        assert str(error.value) == f"{tmp_path / name}: the disk is full; free some space"
    journal.close()


def test_free_space_is_that_of_the_directory_that_will_hold_the_output(tmp_path):
    assert free_nbytes(tmp_path / "new" / "deeper") == pytest.approx(free_nbytes(tmp_path), rel=0.1)


def test_a_chat_template_of_a_name_that_none_has_is_left_out_with_a_warning(tmp_path):
    templates = tmp_path / "additional_chat_templates"
    templates.mkdir()
    for name in (b"tools.jinja", b"outils\xe9.jinja"):
        (templates / os.fsdecode(name)).touch()
    with pytest.warns(MoeplanWarning, match=r"outils.udce9.jinja': not copied, since no chat template has such a name"):
        assert tokenizer_files(tmp_path) == [templates / "tools.jinja"]
