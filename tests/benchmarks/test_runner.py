"""The cases that are asked for are run; one is skipped where the disk has no room for what it adds."""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import runner
from benchmarks.__main__ import _chosen
from benchmarks.cases import CASES
from benchmarks.models import Models, make_models
from benchmarks.programs import Programs

ORDINARY = [case for case in CASES if not case.large]


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], dict[str, list[str | None]]]:
    """`skipped(free_nbytes)`: why which cases are skipped on a disk with so much room. None is really run."""
    taken = 0

    @contextmanager
    def models(made: Models, directory: Path) -> Iterator[tuple[Path, ...]]:
        nonlocal taken
        taken += made.disk_nbytes
        yield ()
        taken -= made.disk_nbytes

    def on_disk(free_nbytes: float) -> dict[str, list[str | None]]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_nbytes - taken))
        settings = runner.Settings(Path(), 1, Programs(Path(), Path()), warm_code=False)
        results = runner.run_cases(ORDINARY, settings, lambda _: None)
        return {case.name: [result.skipped for result in case.results] for case in results if case.results}

    monkeypatch.setattr(runner, "_models", models)
    for name in ("_run", "_on_volume"):
        monkeypatch.setattr(runner, name, lambda case, *_: runner._case_result(case, ()))
    return on_disk


def test_the_room_that_the_documentation_names_is_enough(skipped) -> None:
    assert skipped(40e9) == {}


def test_a_case_without_room_is_skipped_and_says_how_much_it_needs(skipped) -> None:
    small = skipped(5e9)
    assert list(small) == [case.name for case in ORDINARY if not case.models.sparse]
    assert small["growth-7b-8"] == ["needs 19 GB of disk, and 5 GB are free"]


def test_a_contender_that_takes_several_turns_is_skipped_once(skipped) -> None:
    assert len(skipped(5e9)["checks"]) == 2


def test_a_case_whose_models_cannot_be_made_has_failed_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(models: Models, directory: Path) -> list[Path]:
        if models.count == packed.models.count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return make_models(models, directory)

    packed, growth = (next(case for case in CASES if case.name == name).tiny() for name in ("packed", "growth-7b-8"))
    monkeypatch.setattr(runner, "make_models", make)
    programs = Programs(Path(sys.executable).with_name("moeplan"), Path())
    settings = runner.Settings(tmp_path, 1, programs, warm_code=False)
    full, measured = runner.run_cases([packed, growth], settings, lambda _: None)
    assert [result.name for result in full.results] == [contender.name for contender in packed.contenders]
    assert {result.failure for result in full.results} == {"[Errno 28] No space left on device"}
    assert not any(result.skipped for result in full.results)
    assert [result.failure for result in measured.results] == [None]
    assert list(tmp_path.iterdir()) == []


def test_a_large_case_is_run_where_it_is_named() -> None:
    assert [case.name for case in _chosen(["ridge", "random"], large=False, smoke=False)] == ["random", "ridge-7b-4"]
    assert _chosen([], large=False, smoke=False) == ORDINARY
    assert _chosen([], large=True, smoke=False) == list(CASES)


def test_a_case_that_is_named_is_run_on_tiny_models_too() -> None:
    assert [case.name for case in _chosen(["cold"], large=False, smoke=True)] == ["cold"]
    assert _chosen([], large=False, smoke=True) == [case for case in ORDINARY if case.smoke]
