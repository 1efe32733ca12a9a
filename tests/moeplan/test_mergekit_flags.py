"""The command line of mergekit-moe: no flag of it is unknown here, and the documentation tells the truth about each."""

import json
import os
import subprocess
from pathlib import Path

import mergekit_options
import pytest
import typer.main
from commands import moeplan, snapshot, write_config

from benchmarks.peer import DIRECTORY
from moeplan.cli import app
from moeplan.help import FROM_MERGEKIT, GROUPS
from moeplan.mergekit_flags import BY_SPELLING, FLAGS, Fate

ROOT = Path(__file__).parents[2]
PEER_PYTHON = Path(os.environ.get("PEER_PYTHON", ROOT / DIRECTORY / "bin" / "python"))

VALUES = {"text": "float16", "integer": "2", "size": "1B"}
COMMAND = typer.main.get_command(app)
UNNEEDED = [spelling for spelling, flag in BY_SPELLING.items() if flag.fate is Fate.UNNEEDED]


def as_typed(spelling: str) -> list[str]:
    """The flag, and a value if it takes one."""
    takes = mergekit_options.OPTIONS[spelling]
    if spelling == "--device":
        return [spelling, "auto"]
    return [spelling, VALUES[takes]] if takes in VALUES else [spelling]


@pytest.fixture
def config(checkpoint, tmp_path) -> Path:
    base = checkpoint("llama-plain")
    return write_config(tmp_path / "config.yml", base, [base, checkpoint("llama-plain", 1)])


def test_each_of_its_flags_has_a_fate_and_no_other_has():
    assert sorted(BY_SPELLING) == sorted(mergekit_options.OPTIONS)
    assert len(BY_SPELLING) == sum(len(flag.spellings) for flag in FLAGS)


@pytest.mark.skipif(not PEER_PYTHON.exists(), reason="mergekit is not installed (python -m benchmarks.peer)")
def test_the_list_of_its_flags_is_what_mergekit_declares():
    script = [PEER_PYTHON, mergekit_options.__file__]
    assert json.loads(subprocess.run(script, check=True, capture_output=True).stdout) == mergekit_options.OPTIONS


def test_each_of_its_flags_is_declared_and_takes_what_it_takes_there():
    """An option that takes no value, or another number of them, would swallow OUT or leave it over."""
    declared = {spelling: option for option in COMMAND.params for spelling in (*option.opts, *option.secondary_opts)}
    for spelling, takes in mergekit_options.OPTIONS.items():
        assert declared[spelling].is_flag is (takes in ("flag", "count")), spelling


@pytest.mark.parametrize("spelling", mergekit_options.OPTIONS)
def test_each_of_its_flags_is_followed_explained_or_refused(config, tmp_path, spelling):
    flag = BY_SPELLING[spelling]
    before = snapshot(tmp_path)
    result = moeplan(config, tmp_path / "out", "--plan", *as_typed(spelling))
    assert snapshot(tmp_path) == before
    match flag.fate:
        case Fate.WORKS:
            assert (result.status, result.stderr) == (0, "")
        case Fate.UNNEEDED:
            shown = spelling.replace("-j", "--num-threads") if len(spelling) == 2 else spelling
            assert (result.status, result.stderr) == (0, f"note: {shown} is not needed: {flag.why}\n")
        case Fate.REFUSED:
            assert (result.status, result.stderr) == (2, f"error: {spelling}: {flag.why}\n")


def test_all_its_flags_at_once_change_nothing_but_what_they_say(config, tmp_path):
    assert moeplan(config, tmp_path / "plain").status == 0
    typed = [word for spelling in UNNEEDED for word in as_typed(spelling)]
    result = moeplan(*typed, config, tmp_path / "out", "-vv", "--out-shard-size=5B", "--safe-serialization")
    assert result.status == 0
    assert all(line.startswith("note: ") for line in result.stderr.splitlines())
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "plain")
    assert moeplan(*typed, config, "--plan", "--quiet").stderr == ""


def test_the_documentation_has_a_row_for_each_of_its_flags():
    lines = (ROOT / "docs" / "from-mergekit.md").read_text().splitlines()
    rows = [
        f"| {', '.join(f'`{spelling}`' for spelling in flag.spellings)} | {flag.fate.value} | {flag.why} |"
        for flag in FLAGS
    ]
    assert [line for line in lines if line.startswith("| `")] == rows


def test_help_shows_every_option_in_one_group_and_lists_the_flags_that_are_not_needed():
    options = [parameter for parameter in COMMAND.params if parameter.param_type_name == "option"]
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(["help", *(option.name for option in options if not option.hidden)])

    listed = moeplan("--help").stdout.partition(FROM_MERGEKIT)[2].split()
    unneeded = {option.name for option in options if {*UNNEEDED} & {*option.opts}}
    assert {spelling[2:].replace("-", "_") for spelling in listed[1:]} == unneeded
