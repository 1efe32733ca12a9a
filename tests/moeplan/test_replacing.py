"""What a merged model takes the place of: the model that is there, and what moeplan wrote about that."""

import json
import os
import shutil
import subprocess

import pytest
from commands import moeplan, snapshot, write_config

from moeplan import report
from moeplan.replacing import is_of_a_model, replaced_by


def test_weights_that_a_loader_might_take_for_the_model_belong_to_it_and_a_gguf_made_of_it_does_not():
    of_a_model = ["model.safetensors", "model-1-of-2.safetensors", "model.safetensors.index.json"]
    of_a_model += ["pytorch_model.bin", "pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json"]
    of_a_model += ["config.json", "tokenizer.json", "moeplan.json"]
    assert [name for name in of_a_model if not is_of_a_model(name)] == []
    others = ("model.gguf", "training_args.bin", "optimizer.bin", "README.md", "notes.txt")
    assert [name for name in others if is_of_a_model(name)] == []


@pytest.fixture
def old_model(checkpoint, tmp_path):
    """A merged model with a card, and the YAML file of another one, in `tmp_path`."""
    base, other = checkpoint("llama-plain"), checkpoint("llama-plain", 1)
    assert moeplan(write_config(tmp_path / "old.yml", base, [base, other]), tmp_path / "out").status == 0
    write_config(tmp_path / "new.yml", base, [other, base])
    return tmp_path / "out"


def test_without_a_card_of_its_own_a_model_leaves_none_that_moeplan_wrote_for_another(old_model, tmp_path):
    card = old_model / "README.md"
    card.write_text(card.read_text() + "\nA line of mine.\n")
    assert moeplan(tmp_path / "new.yml", old_model, "--overwrite", "--no-write-model-card").status == 0
    assert not card.exists()
    assert not (old_model / "moeplan_config.yml").exists()


def test_a_card_that_moeplan_did_not_write_stays_where_there_is_no_new_one(old_model, tmp_path):
    (old_model / "README.md").write_text("A model of mine, which moeplan merged.\n")
    assert moeplan(tmp_path / "new.yml", old_model, "--overwrite", "--no-write-model-card").status == 0
    assert (old_model / "README.md").read_text() == "A model of mine, which moeplan merged.\n"
    assert " replaces README.md, " in moeplan(tmp_path / "new.yml", old_model, "--overwrite", "--plan").stdout
    assert moeplan(tmp_path / "new.yml", old_model, "--overwrite").status == 0
    assert "merged with moeplan" in (old_model / "README.md").read_text()


def test_the_yaml_file_that_is_merged_is_not_lost_where_it_is_the_old_model_s(old_model):
    config = old_model / "moeplan_config.yml"
    text = config.read_text()
    assert moeplan(config, old_model, "--overwrite", "--no-write-model-card", "--random-seed", "1").status == 0
    assert config.read_text() == text


def test_a_card_or_a_yaml_file_that_cannot_be_read_as_one_is_not_waited_for(tmp_path):
    for name in ("README.md", "moeplan_config.yml"):
        os.mkfifo(tmp_path / name)
    assert replaced_by([], tmp_path, "base_model: a") == ["moeplan_config.yml"]


@pytest.mark.parametrize("link", [False, True])
def test_a_text_that_passages_are_drawn_from_is_not_replaced(old_model, tmp_path, link):
    text = tmp_path / "text.md" if link else old_model / "README.md"
    if link:
        text.symlink_to(old_model / "README.md")
    experts = json.loads((tmp_path / "new.yml").read_text())["experts"]
    experts[0]["positive_files"] = [str(text)]
    config = write_config(tmp_path / "texts.yml", experts[1]["source_model"], experts, gate_mode="hidden")
    before = snapshot(old_model)
    for option in ("--plan", "--write-model-card"):
        refused = moeplan(config, old_model, "--overwrite", "--no-write-model-card", option)
        assert refused.status == 2
        assert refused.error.startswith(f"{text}: is among this merge's `positive_files`, and the model would replace")
    assert snapshot(old_model) == before


@pytest.mark.parametrize("name", ["before-tuning.safetensors", "README.md", "config.json"])
def test_a_directory_is_not_taken_for_a_file_of_the_model_whatever_its_name(old_model, tmp_path, name):
    place = old_model / name
    place.unlink(missing_ok=True)
    place.mkdir()
    (place / "notes.txt").touch()
    before = snapshot(old_model)
    for option in ("--plan", "--write-model-card"):
        refused = moeplan(tmp_path / "new.yml", old_model, "--overwrite", option)
        assert refused.status == 2
        assert refused.error == f"{place}: is a directory, and no part of a model; move it away"
    assert snapshot(old_model) == before


def test_old_chat_templates_are_replaced_though_they_are_in_a_directory(old_model, tmp_path):
    (old_model / "additional_chat_templates").mkdir()
    assert moeplan(tmp_path / "new.yml", old_model, "--overwrite").status == 0
    assert not (old_model / "additional_chat_templates").exists()


def test_a_source_is_not_replaced_by_whichever_path_it_is_called(checkpoint, tmp_path):
    source, mounted = tmp_path / "source", tmp_path / "mounted"
    shutil.copytree(checkpoint("llama-plain"), source)
    config = write_config(tmp_path / "merge.yml", source, [source, checkpoint("llama-plain", 1)])
    before = snapshot(source)
    mounted.mkdir()
    if subprocess.run(["mount", "--bind", source, mounted], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a directory in two places here")
    try:
        refused = moeplan(config, mounted, "--overwrite")
    finally:
        subprocess.run(["umount", mounted], check=True)
    assert refused.error == f"{mounted}: is a source of this merge; give another directory"
    assert snapshot(source) == before


@pytest.mark.parametrize("option", ["--write-model-card", "--no-write-model-card"])
def test_the_plan_names_what_a_merge_takes_away(old_model, tmp_path, option):
    for name in ("model.gguf", "pytorch_model.bin", "tokenization_old.py"):
        (old_model / name).touch()
    before = {file.name: file.stat().st_ino for file in old_model.iterdir()}
    arguments = (tmp_path / "new.yml", old_model, "--overwrite", option)
    planned = moeplan(*arguments, "--plan")
    names = json.loads(moeplan(*arguments, "--json").stdout)["plan"]["output"]["replaced_files"]
    after = {file.name: file.stat().st_ino for file in old_model.iterdir()}
    assert names == sorted(name for name in before if after.get(name) != before[name])
    line = next(line.strip() for line in planned.stdout.splitlines() if "replaces" in line)
    assert line.startswith("replaces README.md, chat_template.jinja, config.json and ")
    assert line.endswith(f" and {len(names) - line.count(',') - 1} more")


def test_without_a_model_to_replace_the_plan_says_nothing_of_it(old_model, tmp_path):
    for arguments in ([tmp_path / "empty", "--overwrite"], ["--overwrite"], [tmp_path / "empty"]):
        planned = moeplan(tmp_path / "new.yml", *arguments, "--plan")
        assert planned.status == 0
        assert "replaces" not in planned.stdout


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["a", "b\x1b[2J"], "replaces a, b\\x1b[2J"),
        (["x" * 40, "y" * 30], f"replaces {'x' * 40} and 1 more"),
        (["x" * 80, "y"], "replaces 2 files"),
        ([f"{n:07}" for n in range(2000)], "replaces 0000000, 0000001, 0000002, 0000003, 0000004 and 1,995 more"),
    ],
)
def test_what_is_replaced_is_one_line_of_the_plan_however_much_it_is(names, line):
    assert report._replaced(names) == [line]
