"""Every file operation of a small merge fails in turn, in every way.

Nothing half-made loads, and the merge can be gone on with, to the same bytes.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import snapshot, write_config

import moeplan as api
from executor.errors import RunError
from moeplan.staging import PARTIAL

FAILING = ("open", "ftruncate", "posix_fallocate", "preadv", "pwrite", "fsync", "rename", "mkdir")
KINDS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EINTR": errno.EINTR}
SHORT = {"preadv": 1000, "pwrite": 1000}


@pytest.fixture
def merge(checkpoint, tmp_path) -> Callable[[Path], None]:
    """`merge(out)`: a merge of a few hundred kilobytes, with copies, casts and a gate from prompts."""
    base, other = checkpoint("llama-plain"), checkpoint("llama-plain", 1)
    experts = [base, {"source_model": other, "residual_scale": 0.5}]
    config = api.load_config(write_config(tmp_path / "config.yml", base, experts, gate_mode="hidden"))
    return lambda out: api.merge(config, out)


@pytest.fixture
def whole(merge, tmp_path) -> dict[str, Any]:
    merge(tmp_path / "whole")
    return snapshot(tmp_path / "whole")


@contextmanager
def fault(root: Path, number: int, kind: str) -> Iterator[list[str]]:
    """The operation with this number, of those on files below `root`, fails; yields the operations that there were."""
    seen: list[str] = []

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(at: Any, *args: Any, **kwargs: Any) -> Any:
            path = str(Path(f"/proc/self/fd/{at}").readlink()) if isinstance(at, int) else os.fspath(at)
            if not path.startswith(str(root)):
                return real(at, *args, **kwargs)
            seen.append(name)
            if len(seen) - 1 != number:
                return real(at, *args, **kwargs)
            if kind == "short" and name in SHORT:
                if name == "preadv":
                    return real(at, [args[0][0][: SHORT[name]]], *args[1:])
                return real(at, args[0][: SHORT[name]], *args[1:])
            if kind in KINDS:
                raise OSError(KINDS[kind], os.strerror(KINDS[kind]), path)
            return real(at, *args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in FAILING:
            patch.setattr(os, name, wrapped(name, getattr(os, name)))
        yield seen


def fails(merge: Callable[[Path], None], out: Path) -> bool:
    """Whether a merge fails, as a user is told."""
    try:
        merge(out)
    except RunError:
        return True
    return False


@pytest.mark.parametrize("kind", [*KINDS, "short"])
def test_whichever_operation_fails_the_merge_goes_on_to_the_same_bytes(merge, whole, tmp_path, kind):
    with fault(tmp_path / "counted", -1, kind) as operations:
        merge(tmp_path / "counted")
    assert len(operations) > 50
    failed = 0
    for number in range(len(operations)):
        out = tmp_path / "out" / str(number)
        with fault(out, number, kind):
            has_failed = fails(merge, out)
        if has_failed:
            failed += 1
            assert not any((out / name).exists() for name in ("config.json", "model.safetensors.index.json"))
            merge(out)
        elif (out / PARTIAL).exists():  # only clearing away failed: the next merge there does that
            merge(out)
        assert snapshot(out) == whole, (number, operations[number])
    assert failed == 0 if kind == "short" else failed > 30


def test_a_process_that_is_killed_anywhere_leaves_a_merge_that_goes_on_to_the_same_bytes(merge, whole, tmp_path):
    chance = random.Random(0)
    started = time.monotonic()
    merge(tmp_path / "timed")
    seconds = time.monotonic() - started
    killed = 0
    for number in range(50):
        out = tmp_path / "out" / str(number)
        child = os.fork()
        if child == 0:
            try:
                merge(out)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if (out / "config.json").exists():
            assert {name for name in snapshot(out) if "/" not in name} >= set(whole)
        if os.WIFSIGNALED(status) and snapshot(out) != whole:
            merge(out)
        assert snapshot(out) == whole
    assert killed > 25
