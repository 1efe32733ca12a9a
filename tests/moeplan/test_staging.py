"""The output directory under way: nothing is in its place until all is, and nothing that is finished is lost."""

import errno
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from commands import snapshot

from executor.errors import HopelessError, RunError
from executor.journal import Journal
from moeplan import publication, staging
from moeplan.output import OutputError
from moeplan.staging import PARTIAL, Stage, check_output, check_unfinished, finish_publication, staged
from planner.plan import FileSink

MODEL = ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json")
INDEX = "model.safetensors.index.json"
SAME = {"config": {"experts": 2}, "option": {"--random-seed": 0}}
OTHER = {**SAME, "config": {"experts": 3}}


def write_model(stage: Stage, text: str = "") -> None:
    for name in (*MODEL, INDEX):
        (stage.directory / name).write_text(text or name)


def put_old_model(out: Path) -> None:
    with staged(out, SAME) as stage:
        write_model(stage, "old")


def finish_something(stage: Stage) -> None:
    stage.journal.add_chunk(FileSink(0, 4096), 0, 10, 1, [FileSink(0, 4096)])


def fail_in_the_middle(out: Path, *, overwrite: bool = False) -> None:
    with staged(out, SAME, overwrite=overwrite) as stage:
        write_model(stage)
        finish_something(stage)
        raise RunError("the disk is full")


def test_a_new_and_an_empty_directory_may_be_written_to(tmp_path):
    check_output(tmp_path / "new" / "deeper")
    check_output(tmp_path)
    assert snapshot(tmp_path) == {}


def test_a_directory_that_holds_something_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    message = r"the directory is not empty \({}\); give a new or an empty one, or --overwrite to {}"
    with pytest.raises(OutputError, match=message.format(r"notes\.txt", r"write beside that \(--plan says ")):
        check_output(tmp_path)
    check_output(tmp_path, overwrite=True)
    (tmp_path / "config.json").touch()
    with pytest.raises(OutputError, match=message.format(r"config\.json", "replace the model in it$")):
        check_output(tmp_path)
    check_output(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_adapter_s_directory_is_refused_since_the_adapter_would_be_put_on_the_merged_model(tmp_path, overwrite):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(OutputError, match=r"holds an adapter \(adapter_config\.json\), .*or move the adapter away$"):
        check_output(tmp_path, overwrite=overwrite)


def test_a_link_to_what_is_not_there_is_refused_with_where_it_leads(tmp_path):
    (tmp_path / "out").symlink_to("unmounted/disk")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a link to unmounted/disk, which is not there; make that directory"):
            check_output(tmp_path / "out", overwrite=overwrite)


def test_what_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be an output directory: Not a directory"):
            check_output(path)


def test_where_the_user_may_not_write_is_refused_before_anything_is_planned():
    """In a process of its own: root may write anywhere."""
    with TemporaryDirectory() as place:
        (Path(place) / "closed").mkdir(mode=0o555)
        Path(place).chmod(0o755)
        awaited, told = os.pipe()
        if os.fork() == 0:
            try:
                os.setuid(65534 if os.geteuid() == 0 else os.geteuid())
                for out in ("closed", "closed/new/deeper"):
                    try:
                        check_output(Path(place) / out)
                    except OutputError as error:
                        os.write(told, f"{error}\n".encode())
            finally:
                os._exit(0)
        os.wait()
        os.close(told)
        with open(awaited) as messages:
            message = f"{place}/closed: this user may not write there; give another directory\n"
            assert messages.read() == 2 * message


def test_what_is_in_the_place_of_an_unfinished_merge_is_named(tmp_path):
    (tmp_path / PARTIAL).touch()
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=rf"/{PARTIAL}: is no directory, .*; move it away$"):
            check_output(tmp_path, overwrite=overwrite)


def test_what_no_journal_accounts_for_is_neither_in_the_way_nor_kept(tmp_path):
    (tmp_path / PARTIAL / "deeper").mkdir(parents=True)
    (tmp_path / PARTIAL / "deeper" / "model.safetensors").touch()
    check_output(tmp_path)
    with staged(tmp_path, SAME) as stage:
        assert snapshot(stage.directory) == {}
    assert snapshot(tmp_path) == {}


def test_nothing_is_in_its_place_until_all_is(tmp_path):
    out = tmp_path / "new" / "out"
    with staged(out, SAME) as stage:
        write_model(stage)
        assert [path.name for path in out.iterdir()] == [PARTIAL]
    assert {path.name for path in out.iterdir()} == {*MODEL, INDEX}
    assert (out / "config.json").read_text() == "config.json"


def test_the_index_and_config_json_come_last(tmp_path, monkeypatch):
    moved = []
    rename = Path.rename
    with staged(tmp_path, SAME) as stage:
        write_model(stage)
        monkeypatch.setattr(Path, "rename", lambda self, target: (moved.append(self.name), rename(self, target)))
    assert sorted(moved) == sorted((*MODEL, INDEX))
    assert moved[-2:] == [INDEX, "config.json"]


def test_what_appeared_in_the_meantime_is_not_overwritten(tmp_path):
    def put_between(**how: bool) -> None:
        with staged(tmp_path, SAME, **how) as stage:
            write_model(stage)
            finish_something(stage)
            for name in ("config.json", "model.safetensors"):
                (tmp_path / name).write_text("a user's")

    with pytest.raises(
        OutputError, match=r"config\.json: has appeared there since the merge began; move it away"
    ) as error:
        put_between()
    assert error.value.__notes__ == ["what is finished is kept: run the same command again to go on"]
    assert snapshot(tmp_path)["config.json"] == b"a user's"
    assert not (tmp_path / "tokenizer.json").exists()
    put_between(overwrite=True)
    assert (tmp_path / "config.json").read_text() == "config.json"
    assert not (tmp_path / "model.safetensors").exists()


def test_nor_is_it_taken_away_where_no_new_file_has_its_name(tmp_path):
    with staged(tmp_path, SAME) as stage:
        write_model(stage)
        (tmp_path / "pytorch_model.bin").write_text("a user's")
    assert (tmp_path / "pytorch_model.bin").read_text() == "a user's"
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX, "pytorch_model.bin"}


def test_nothing_is_kept_where_the_same_run_would_fail_again(tmp_path):
    out = tmp_path / "out"

    def fail() -> None:
        with staged(out, SAME) as stage:
            write_model(stage)
            finish_something(stage)
            raise HopelessError("a weight is too large")

    with pytest.raises(HopelessError) as error:
        fail()
    assert not hasattr(error.value, "__notes__")
    assert not out.exists()


def stop_before_the_first_move(out: Path) -> None:
    def stop() -> None:
        with staged(out, SAME) as stage:
            write_model(stage)
            finish_something(stage)
            stage.journal.begin_publishing([*MODEL, INDEX], [])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()


def put_file(place: Path) -> None:
    place.write_text("a user's")


def put_link_that_leads_nowhere(place: Path) -> None:
    place.symlink_to("unmounted/config.json")


@pytest.mark.parametrize("put", [put_file, put_link_that_leads_nowhere])
def test_nor_is_what_appeared_before_a_stopped_finish_is_gone_on_with(tmp_path, monkeypatch, put):
    def finish(**how: bool) -> None:
        with staged(tmp_path, SAME, **how) as stage:
            assert stage.is_complete

    def broken(source: Path, target: Path) -> None:
        if source.name == "config.json" and source.parent.name == "model":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    rename, config = os.rename, tmp_path / "config.json"
    stop_before_the_first_move(tmp_path)
    put(config)
    before = content(config)
    with pytest.raises(OutputError, match=r"config\.json: has appeared there since the merge began"):
        finish()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", broken)
        with pytest.raises(RunError, match="could not be moved here"):
            finish(overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.name != PARTIAL] == ["config.json"]
    assert content(config) == before
    finish(overwrite=True)
    assert content(config) == "config.json"


def content(file: Path) -> str | Path:
    """The text of a file; where a link leads."""
    return file.readlink() if file.is_symlink() else file.read_text()


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_directory_that_appears_where_a_file_goes_is_not_taken_away(tmp_path, is_begun):
    place = tmp_path / "tokenizer.json"

    def put_directory() -> None:
        place.mkdir()
        (place / "notes.txt").touch()

    def finish() -> None:
        with staged(tmp_path, SAME, overwrite=True) as stage:
            write_model(stage)
            finish_something(stage)
            put_directory()

    if is_begun:
        stop_before_the_first_move(tmp_path)
        put_directory()
    with pytest.raises(OutputError, match=r"tokenizer\.json: is a directory, and no part of a model; move it away"):
        finish()
    assert {path.name for path in tmp_path.iterdir()} == {PARTIAL, "tokenizer.json"}
    (place / "notes.txt").rename(tmp_path / "notes.txt")
    place.rmdir()
    with staged(tmp_path, SAME) as stage:
        assert stage.is_complete == is_begun
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX, "notes.txt"}


def test_half_a_model_is_not_published_where_finished_files_are_gone(tmp_path):
    stop_before_the_first_move(tmp_path)
    (tmp_path / PARTIAL / "model" / MODEL[1]).unlink()
    message = f"{MODEL[1]}: is gone, though it was finished; remove {tmp_path / PARTIAL} and merge again"
    for again in (lambda: finish_publication(tmp_path), staged(tmp_path, SAME).__enter__):
        with pytest.raises(RunError, match=message) as raised:
            again()
        assert not hasattr(raised.value, "__notes__")
    assert [entry.name for entry in tmp_path.iterdir()] == [PARTIAL]


def test_config_json_is_moved_when_all_other_names_are_on_the_disk(tmp_path, monkeypatch):
    done = []
    rename, fsync = Path.rename, os.fsync
    with staged(tmp_path, SAME) as stage:
        write_model(stage)
        monkeypatch.setattr(Path, "rename", lambda self, target: (done.append(self.name), rename(self, target)))
        monkeypatch.setattr(
            os, "fsync", lambda fd: (done.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd))
        )
    model, at = done.index("model"), done.index("config.json")
    assert model < done.index("journal") < done.index(MODEL[1])
    assert done[at - 2 :] == [INDEX, tmp_path.name, "config.json", tmp_path.name]


def test_no_file_is_open_in_a_directory_that_is_removed(tmp_path, monkeypatch):
    """A network's file system would keep it."""
    rmtree = shutil.rmtree

    def checked(directory: Path, **how: bool) -> None:
        fds = Path("/proc/self/fd")
        assert not [fd for fd in fds.iterdir() if fd.exists() and str(fd.readlink()).startswith(str(directory))]
        rmtree(directory, **how)

    monkeypatch.setattr(shutil, "rmtree", checked)
    with staged(tmp_path / "good", SAME) as stage:
        write_model(stage)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "bad", SAME):
        raise KeyboardInterrupt
    assert {path.name for path in (tmp_path / "good").iterdir()} == {*MODEL, INDEX}
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("error", [RunError("the disk is full"), KeyboardInterrupt()])
def test_a_merge_that_finished_nothing_leaves_the_disk_as_it_was(tmp_path, error):
    def fail(out: Path) -> None:
        with staged(out, SAME) as stage:
            write_model(stage)
            raise error

    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new" / "deeper", tmp_path / "empty"):
        with pytest.raises(type(error)):
            fail(out)
    assert snapshot(tmp_path) == {"empty": None}
    assert not hasattr(error, "__notes__")


def test_what_is_finished_is_kept_gone_on_with_and_then_gone(tmp_path):
    with pytest.raises(RunError) as raised:
        fail_in_the_middle(tmp_path)
    assert raised.value.__notes__ == ["what is finished is kept: run the same command again to go on"]
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
    check_output(tmp_path)
    with staged(tmp_path, SAME) as stage:
        assert not stage.journal.is_empty
        assert (stage.directory / "tokenizer.json").read_text() == "tokenizer.json"
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX}


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        ({**SAME, "config": {"experts": 3}}, "config experts was 2 and is 3"),
        ({**SAME, "config": {}}, "config experts was 2 and is absent"),
        ({**SAME, "config": {"experts": "a\nb\x1b"}}, r"config experts was 2 and is a\nb\x1b. Undo"),
        ({**SAME, "config": {"experts": 61 * "x"}}, f"config experts was 2 and is {60 * 'x'}…. Undo"),
        (
            {**SAME, "config": {"x": 1, "y": 2}},
            "is absent; config x was absent and is 1; config y was absent and is 2. ",
        ),
        (
            {**SAME, "source": {"a": 1, "b": 2, "c": 3}, "config": {"x": 1}},
            "is absent; config x was absent and is 1; source a was absent and is 1; and 2 more. Undo",
        ),
        ({**SAME, "source": {"a": 2}, "plan": {"fingerprint": "1"}}, ", of something else: source a was absent"),
        ({**SAME, "plan": {"fingerprint": "1"}}, ", of something else: plan fingerprint was absent and is 1. Undo"),
        ({**OTHER, "plan": {"fingerprint": "1"}}, ", of something else: config experts was 2 and is 3. Undo"),
        ({**SAME, "file": {"a": {"sha256": "1"}}}, "file a is new."),
    ],
)
def test_an_unfinished_merge_of_something_else_is_refused_with_what_changed(tmp_path, now, difference):
    with pytest.raises(RunError):
        fail_in_the_middle(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError) as raised, staged(tmp_path, now):
        pass
    assert difference in str(raised.value)
    assert str(raised.value).endswith("Undo the change to go on with it, or add --restart to start afresh")
    assert snapshot(tmp_path) == before
    with staged(tmp_path, now, restart=True) as stage:
        assert stage.journal.is_empty
        assert snapshot(stage.directory) == {}


# All that is known of files, of whatever kind.
UNCHANGED = {"nbytes": 10, "mtime_ns": 1, "header_sha256": "0", "sample_sha256": "0", "sha256": "0", "etag": "0"}


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (UNCHANGED | {"mtime_ns": 2}, "source a was changed (time). Undo"),
        (UNCHANGED | {"nbytes": 11, "header_sha256": "1"}, "source a was changed (size, header). Undo"),
        (UNCHANGED | {"sample_sha256": "1", "sha256": "1"}, "source a was changed (weights, content). Undo"),
        (UNCHANGED | {"etag": "1"}, "source a was changed (ETag). Undo"),
        (None, "source a is gone. Undo"),
    ],
)
def test_a_source_that_was_changed_is_named_with_what_of_it(tmp_path, now, difference):
    def begin(source: object) -> None:
        with staged(tmp_path, {"source": {"a": source}}) as stage:
            finish_something(stage)
            raise RunError("the disk is full")

    with pytest.raises(RunError):
        begin(UNCHANGED)
    with pytest.raises(OutputError) as raised:
        begin(now)
    assert difference in str(raised.value)


def test_what_is_finished_is_kept_where_the_journal_cannot_be_opened(tmp_path, monkeypatch):
    with pytest.raises(RunError):
        fail_in_the_middle(tmp_path)
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_rewritten", lambda *_: (tmp_path / "nowhere").stat())
        with pytest.raises(RunError), staged(tmp_path, SAME):
            pass
    assert snapshot(tmp_path) == before


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"file/out: cannot be made: Not a directory"),
        staged(tmp_path / "file" / "out", SAME),
    ):
        pass
    assert snapshot(tmp_path) == {"file": b""}


def test_a_second_merge_into_the_same_directory_is_refused(tmp_path):
    with staged(tmp_path, SAME) as stage:
        write_model(stage)
        with pytest.raises(OutputError, match="another merge is writing there"), staged(tmp_path, SAME):
            pass
        assert (stage.directory / "config.json").exists()


def test_a_directory_that_another_merge_removes_when_it_ends_is_not_written_to_without_its_lock(tmp_path, monkeypatch):
    def removed(directory: Path) -> None:
        directory.parent.rmdir()

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(staging, "read_identity", removed)
    monkeypatch.setattr(staging, "_finish_publication", lambda *_: None)
    with pytest.raises(RunError, match=f"out/{PARTIAL}: cannot be made: No such file"), staged(out, SAME):
        pass
    assert not out.exists()


def test_nothing_is_planned_or_moved_where_a_merge_is_writing(tmp_path):
    with staged(tmp_path, SAME) as stage:
        write_model(stage)
        with pytest.raises(OutputError, match="a merge is writing there; wait until it is done"):
            check_unfinished(tmp_path, SAME)
        finish_publication(tmp_path)
        stage.journal.begin_publishing([*MODEL, INDEX], [])
        with pytest.raises(OutputError, match="another merge is writing there"):
            finish_publication(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]


def test_a_model_that_is_overwritten_stands_until_the_new_one_is_complete(tmp_path):
    put_old_model(tmp_path)
    for name in ("notes.txt", "model-00003-of-00003.safetensors"):
        (tmp_path / name).write_text("old")
    with pytest.raises(RunError):
        fail_in_the_middle(tmp_path, overwrite=True)
    assert {path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {"old"}
    with staged(tmp_path, SAME, overwrite=True) as stage:
        write_model(stage, "new")
        assert (tmp_path / "config.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX, "notes.txt"}
    assert {name for name in (*MODEL, INDEX, "notes.txt") if (tmp_path / name).read_text() == "old"} == {"notes.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_finish_that_fails_anywhere_undoes_itself_and_can_be_done_again(tmp_path, monkeypatch, overwrite):
    rename = os.rename
    for allowed in range(12):
        out = tmp_path / str(allowed)
        if overwrite:
            put_old_model(out)
        before = snapshot(out)
        left = allowed

        def failing(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(5, "Input/output error")
            rename(source, target)

        with pytest.MonkeyPatch.context() as patch:

            def finish(out: Path = out, patch: pytest.MonkeyPatch = patch) -> None:
                with staged(out, SAME, overwrite=overwrite) as stage:
                    write_model(stage, "new")
                    finish_something(stage)
                    patch.setattr(os, "rename", failing)

            try:
                finish()
                failed = False
            except RunError:
                failed = True
        if failed:
            now = {name: text for name, text in snapshot(out).items() if not name.startswith(PARTIAL)}
            assert now == (before or {})
            check_output(out, overwrite=overwrite)
            with staged(out, SAME, overwrite=overwrite) as stage:
                assert stage.is_complete
        assert {path.name for path in out.iterdir()} == {*MODEL, INDEX}
        assert {path.read_text() for path in out.iterdir()} == {"new"}
    assert not failed


def test_what_cannot_be_put_on_the_disk_is_not_moved_to_its_place(tmp_path, monkeypatch):
    sync = publication.sync

    def failing(path: Path) -> None:
        if path.name == "model":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    def finish() -> None:
        with staged(tmp_path, SAME) as stage:
            write_model(stage)
            finish_something(stage)

    with monkeypatch.context() as patch:
        patch.setattr(publication, "sync", failing)
        with pytest.raises(RunError, match="could not be moved here: Input/output error"):
            finish()
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
    finish()
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX}


@pytest.mark.parametrize("allowed", range(3))
def test_a_process_that_dies_while_it_clears_away_leaves_a_finish_that_can_be_done_again(tmp_path, allowed):
    put_old_model(tmp_path)
    child = os.fork()
    if child == 0:
        left, rmdir = allowed, os.rmdir

        def dying(*args: object, **kwargs: object) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                os._exit(1)
            rmdir(*args, **kwargs)

        os.rmdir = dying
        with staged(tmp_path, SAME, overwrite=True) as stage:
            write_model(stage, "new")
            (tmp_path / PARTIAL / "results").mkdir()
        os._exit(0)
    assert os.waitpid(child, 0)[1] != 0
    check_output(tmp_path)
    with staged(tmp_path, SAME) as stage:
        assert stage.is_complete
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_that_dies_while_it_moves_files_leaves_a_finish_that_can_be_done_again(tmp_path, overwrite):
    rename = os.rename
    for allowed in range(12):
        out = tmp_path / str(allowed)
        if overwrite:
            put_old_model(out)
        child = os.fork()
        if child == 0:
            left = allowed

            def dying(source: Path, target: Path) -> None:
                nonlocal left
                left -= 1
                if left == -1:
                    os._exit(1)
                rename(source, target)

            with staged(out, SAME, overwrite=overwrite) as stage:
                write_model(stage, "new")
                os.rename = dying
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            there = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
            if "config.json" in there:
                assert there == dict.fromkeys((*MODEL, INDEX), "old")
            if allowed % 2:
                finish_publication(out)  # the old model's files are no others that are in the way
            check_output(out, overwrite=overwrite)
            with staged(out, SAME, overwrite=overwrite) as stage:
                assert stage.is_complete
        assert {path.name for path in out.iterdir()} == {*MODEL, INDEX}
        assert {path.read_text() for path in out.iterdir()} == {"new"}
    assert not status


def stop_in_the_middle_of_the_finish(out: Path, at_move: int = 8) -> None:
    """Leaves half of a new model in the place of an old one, which had a file more: 6 moves away, 5 to the place."""
    put_old_model(out)
    (out / "pytorch_model.bin").write_text("old")
    if os.fork() == 0:
        left, rename = at_move, os.rename

        def dying(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(1)
            rename(source, target)

        with staged(out, SAME, overwrite=True) as stage:
            write_model(stage, "new")
            finish_something(stage)
            os.rename = dying
        os._exit(0)
    assert os.wait()[1] != 0
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("at_move", [7, 9, 11])
def test_what_is_put_where_an_old_file_was_is_not_taken_away_when_a_stopped_finish_is_gone_on_with(tmp_path, at_move):
    stop_in_the_middle_of_the_finish(tmp_path, at_move)
    (tmp_path / "pytorch_model.bin").write_text("a user's")
    finish_publication(tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_text() == "a user's"
    assert {(tmp_path / name).read_text() for name in (*MODEL, INDEX)} == {"new"}


def test_what_is_put_where_an_old_file_was_and_a_new_one_is_to_be_is_in_the_way(tmp_path):
    stop_in_the_middle_of_the_finish(tmp_path)
    (tmp_path / "config.json").write_text("a user's")
    with pytest.raises(OutputError, match=r"config\.json: has appeared there since the merge began"):
        finish_publication(tmp_path)
    assert (tmp_path / "config.json").read_text() == "a user's"
    finish_publication(tmp_path, overwrite=True)
    assert {(tmp_path / name).read_text() for name in (*MODEL, INDEX)} == {"new"}


def test_nothing_is_taken_away_when_all_was_moved_and_only_the_clearing_was_left(tmp_path, monkeypatch):
    def stop() -> None:
        with staged(tmp_path, SAME, overwrite=True) as stage:
            write_model(stage, "new")
            monkeypatch.setattr(staging, "_clear_away", interrupt)

    def interrupt(partial: Path) -> None:
        monkeypatch.undo()
        shutil.rmtree(partial / "replaced")
        raise KeyboardInterrupt

    put_old_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        stop()
    (tmp_path / "pytorch_model.bin").write_text("a user's")
    with staged(tmp_path, SAME) as stage:
        assert stage.is_complete
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX, "pytorch_model.bin"}
    assert (tmp_path / "pytorch_model.bin").read_text() == "a user's"


@pytest.mark.parametrize(("now", "restart"), [(OTHER, False), (OTHER, True), (SAME, True)])
def test_a_finish_that_was_stopped_is_done_whatever_is_to_be_merged_and_its_model_stands_in_the_way_of_that(
    tmp_path, now, restart
):
    stop_in_the_middle_of_the_finish(tmp_path)
    message = "holds a finished model, whose merge was stopped when it moved it here; give another directory, or --over"
    with pytest.raises(OutputError, match=message), staged(tmp_path, now, restart=restart):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX, PARTIAL}
    assert {(tmp_path / name).read_text() for name in (*MODEL, INDEX)} == {"new"}
    assert [path.name for path in (tmp_path / PARTIAL).iterdir()] == ["journal"]
    with staged(tmp_path, now, restart=restart, overwrite=True) as stage:
        assert stage.journal.is_empty
        write_model(stage, "newer")
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX}
    assert {path.read_text() for path in tmp_path.iterdir()} == {"newer"}


def test_a_finish_that_was_stopped_is_done_before_anything_is_planned(tmp_path):
    finish_publication(tmp_path / "nowhere")
    stop_in_the_middle_of_the_finish(tmp_path)
    for _ in range(2):  # since it can be stopped, too
        finish_publication(tmp_path)
        assert {(tmp_path / name).read_text() for name in (*MODEL, INDEX)} == {"new"}
    for overwrite in (False, True):
        check_unfinished(tmp_path, {"config": SAME["config"]}, overwrite=overwrite)
    check_unfinished(tmp_path, {"config": OTHER["config"]}, overwrite=True)
    with pytest.raises(OutputError, match="holds a finished model"):
        check_unfinished(tmp_path, {"config": OTHER["config"]})
    with staged(tmp_path, SAME) as stage:
        assert stage.is_complete
    assert {path.name for path in tmp_path.iterdir()} == {*MODEL, INDEX}
