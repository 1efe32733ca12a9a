"""Every file operation of a small merge fails in turn, or is the last one.

Nothing half-made loads, and the merge can be gone on with, to the same bytes.
"""

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from commands import outcome, snapshot, sparse_llama, start, write_config

import moeplan as api
from executor import writer
from executor.errors import RunError
from moeplan.errors import UserError
from moeplan.gates import tokenizer
from moeplan.staging import PARTIAL

MODULES = dict.fromkeys(("open", "ftruncate", "preadv", "pwrite", "fsync", "rename", "mkdir"), os) | {"reserve": writer}
FAILING = {"EIO": tuple(MODULES), "ENOSPC": ("ftruncate", "pwrite", "mkdir", "reserve")}
SHORT_NBYTES = 1000


@pytest.fixture(autouse=True)
def _remember_tokens(monkeypatch) -> None:
    """What tokenises prompts is a process of its own, which takes half of a merge's time and is not to fail here."""
    answers: dict[str, dict[str, Any]] = {}
    ask = tokenizer._ask

    def remembering(file: Path, request: dict[str, Any], *fds: int) -> dict[str, Any]:
        key = f"{file} {request['texts']}"
        if key not in answers:
            answers[key] = ask(file, request, *fds)
        return dict(answers[key])

    monkeypatch.setattr(tokenizer, "_ask", remembering)


@pytest.fixture(autouse=True)
def _wait_for_no_disk(monkeypatch) -> None:
    """No power is cut here, and other tests keep the disk busy."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def merge(checkpoint, tmp_path) -> Callable[[Path], None]:
    """`merge(out)`: a merge of a few hundred kilobytes, with copies, casts and a gate from prompts."""
    base, other = (shutil.copytree(checkpoint("llama-plain", seed), tmp_path / f"source{seed}") for seed in range(2))
    experts = [base, {"source_model": other, "residual_scale": 0.5}]
    config = api.load_config(write_config(tmp_path / "config.yml", base, experts, gate_mode="hidden"))
    return lambda out: api.merge(config, out)


@pytest.fixture
def whole(merge, tmp_path) -> dict[str, Any]:
    merge(tmp_path / "whole")
    return snapshot(tmp_path / "whole")


@contextmanager
def striking(root: Path, names: Iterable[str], number: int, strike: Callable[[str], None]) -> Iterator[list[str]]:
    """Has `strike(path)` come before the operation with this number, of those with these names on files below `root`.

    Yields the operations that there were.
    """
    seen: list[str] = []
    numbers = count()

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(at: Any, *args: Any, **kwargs: Any) -> Any:
            path = str(Path(f"/proc/self/fd/{at}").readlink()) if isinstance(at, int) else os.fspath(at)
            if path.startswith(str(root)):
                seen.append(name)
                if next(numbers) == number:
                    strike(path)
            return real(at, *args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(MODULES[name], name, wrapped(name, getattr(MODULES[name], name)))
        yield seen


def operations(merge: Callable[[Path], None], root: Path, names: Iterable[str]) -> list[str]:
    """The operations with these names of a merge of files below `root`."""
    with striking(root, names, -1, str) as seen:  # none has this number
        merge(root / "counted")
    return seen


def fails(merge: Callable[[Path], None], out: Path) -> bool:
    """Whether a merge fails, as a user is told."""
    try:
        merge(out)
    except (RunError, UserError):
        return True
    return False


@pytest.mark.parametrize("kind", FAILING)
def test_whichever_operation_fails_the_merge_goes_on_to_the_same_bytes(merge, whole, tmp_path, kind):
    def fail(path: str) -> None:
        code = getattr(errno, kind)
        raise OSError(code, os.strerror(code), path)

    failed = 0
    for number, name in enumerate(operations(merge, tmp_path, FAILING[kind])):
        out = tmp_path / "out" / str(number)
        with striking(tmp_path, FAILING[kind], number, fail):
            has_failed = fails(merge, out)
        if has_failed:
            failed += 1
            assert not any((out / name).exists() for name in ("config.json", "model.safetensors.index.json"))
            merge(out)
        elif (out / PARTIAL).exists():  # only clearing away failed: the next merge there does that
            merge(out)
        assert snapshot(out) == whole, (number, name)
    assert failed > 100


def test_however_little_is_read_and_written_at_a_time_the_bytes_are_the_same(merge, whole, tmp_path, monkeypatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, into, *args: read(fd, [into[0][:SHORT_NBYTES]], *args))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, *args: write(fd, data[:SHORT_NBYTES], *args))
    assert len(operations(merge, tmp_path, ("preadv", "pwrite"))) > 500
    assert snapshot(tmp_path / "counted") == whole


def test_a_process_that_is_killed_anywhere_leaves_a_merge_that_goes_on_to_the_same_bytes(merge, whole, tmp_path):
    killed = 0
    for number in range(0, len(operations(merge, tmp_path, MODULES)), 6):
        out = tmp_path / "out" / str(number)
        child = os.fork()
        if child == 0:
            try:
                with striking(tmp_path, MODULES, number, lambda path: os.kill(os.getpid(), signal.SIGKILL)):
                    merge(out)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if (out / "config.json").exists():
            assert {name for name in snapshot(out) if "/" not in name} >= set(whole)
        if os.WIFSIGNALED(status) and snapshot(out) != whole:
            merge(out)
        assert snapshot(out) == whole, number
    assert killed > 40


PLANNED = """
import json, sys, moeplan
config, memory = sys.argv[1:]
plan = moeplan.plan(moeplan.load_config(config), options=moeplan.Options(max_memory=memory)).plan
print(json.dumps([plan.read_nbytes, plan.written_nbytes, plan.pool.workers * plan.pool.slab_nbytes]))
"""
"""Prints what a merge reads and writes, and has under way at most, in a process as small as the one that merges."""


def test_what_a_kill_costs_is_at_most_the_chunks_that_were_under_way(tmp_path):
    """By the system's own count of what the processes wrote. Each byte of this output is written to one place."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    base, other = (sparse_llama(tmp_path / name, **sizes) for name in ("base", "other"))
    experts = [{"source_model": source, "noise_scale": 0.1} for source in (base, other)]  # noise takes its time
    config, memory = write_config(tmp_path / "config.yml", base, experts), ("--max-memory", "104MiB")
    ran = outcome(start(config, *memory[1:], code=PLANNED))
    assert ran.status == 0, ran.stderr
    planned_read, written, under_way = json.loads(ran.stdout)
    out, chance = tmp_path / "out", random.Random(0)
    journal = out / PARTIAL / "journal"
    kills = counted = finished = 0
    while kills < 5:
        process = start(config, out, *memory, "--quiet")
        wanted = finished + chance.randrange(1, 4)
        while process.poll() is None and finished < wanted:
            finished = max(finished, journal.read_bytes().count(b"checksum") if journal.exists() else 0)
        if process.poll() is not None:
            break
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        io = Path(f"/proc/{process.pid}/io").read_text()
        counted += int(io.partition("wchar: ")[2].split()[0])
        process.communicate()
        kills += 1
    assert kills > 1
    result = json.loads(outcome(start(config, out, *memory, "--json")).stdout)["result"]
    resumed = result["nbytes_by_path"]["resumed"]
    assert resumed > 0
    assert result["read_nbytes"] <= planned_read - (resumed - (written - planned_read))
    beside_the_weights = 1 << 20  # journals, headers, config.json ..., of each process
    assert under_way < written / 10
    assert counted - resumed <= kills * (under_way + beside_the_weights)
