"""Whatever a stranger sends is refused by a message that names it, soon, with little memory, and nothing is touched."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile.corpus import CASES, make_merge

MAX_SECONDS = 2.0
MAX_KIB = 200 << 10


@pytest.fixture(scope="module")
def command() -> Iterator[Callable[..., dict[str, Any]]]:
    """`command(directory, *args)`: how the command ended there, its processor time, and its peak of memory."""
    program = [sys.executable, str(Path(__file__).with_name("forks.py"))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run(directory: Path, *args: str) -> dict[str, Any]:
            assert process.stdin
            assert process.stdout
            print(json.dumps([args, str(directory)]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def state(root: Path) -> dict[str, tuple[int, ...]]:
    """What every file below `root` is, without following a link."""
    statuses = {str(path.relative_to(root)): path.lstat() for path in [root, *root.rglob("*")]}
    return {name: (s.st_mode, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in statuses.items()}


SAME = "--i-understand-this-is-not-useful-without-training"


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name: str, command: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    case = CASES[name]
    make_merge(tmp_path)
    case.make(tmp_path)
    before = state(tmp_path)
    ended = command(tmp_path, "config.yml", "out", SAME)
    message = ended["stderr"].removeprefix("error: ").strip()
    assert case.reason in message
    assert case.file in message
    assert message.replace("\n", "").isprintable()
    assert len(message) < 2000
    assert ended["status"] == 2
    assert "Traceback" not in ended["stderr"]
    assert ended["stdout"] == ""
    assert state(tmp_path) == before
    assert ended["seconds"] < MAX_SECONDS
    assert ended["peak_kib"] < MAX_KIB


def test_the_merge_that_the_cases_spoil_is_fine(command: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    make_merge(tmp_path)
    for mode in ("random", "cheap_embed"):
        (tmp_path / "config.yml").write_text((tmp_path / "config.yml").read_text().replace("random", mode))
        assert command(tmp_path, "config.yml", "out", SAME, "--plan")["status"] == 0


def test_there_are_more_than_a_hundred_messages() -> None:
    assert len({case.reason for case in CASES.values()}) > 100
