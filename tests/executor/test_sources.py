"""Sources that change, or are other ones when read again: that is noticed, and nothing that was made of them counts."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from plans import KERNELS, Stop, column_sums, digest, go_on, planned

from executor.engine import Progress, RunResult, run
from executor.errors import RunError
from executor.local import LocalFile
from planner.expr import Expr, Read, mean
from planner.plan import Plan


def test_a_source_that_changed_since_planning_is_refused(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    path = tmp_path / "source.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(RunError, match=r"source\.safetensors: the file was changed since"):
        run(plan, tmp_path, {"column_sums": column_sums})
    assert list(tmp_path.iterdir()) == [path]


def test_a_source_that_is_gone_is_named(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs)
    (tmp_path / "source.safetensors").unlink()
    with pytest.raises(RunError, match=r"source\.safetensors: cannot be opened any more: No such file"):
        run(plan, tmp_path, {"column_sums": column_sums})


def test_a_source_that_shrinks_or_changes_during_the_run_is_noticed(tmp_path: Path, outputs: dict[str, Expr]) -> None:
    plan = planned(outputs, budget=8 << 20)
    path = tmp_path / "source.safetensors"

    def shrink(state: Progress) -> None:
        os.truncate(path, 1000)

    with pytest.raises(RunError, match=r"source\.safetensors: the file (ends at byte|was changed)"):
        run(plan, tmp_path, {"column_sums": column_sums}, shrink)


def test_a_source_that_is_replaced_while_it_is_opened_is_read_as_it_was_planned(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, path, opening = planned({"copy": outputs["copy"]}), tmp_path / "source.safetensors", os.open
    (tmp_path / "whole").mkdir()
    (tmp_path / "out").mkdir()
    run(plan, tmp_path / "whole")
    other = tmp_path / "other"
    other.write_bytes(bytes(path.stat().st_size))

    def replacing(name: Any, flags: int, *mode: int) -> int:
        fd = opening(name, flags, *mode)
        if name == str(path) and other.exists():
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk
            other.replace(path)
        return fd

    monkeypatch.setattr(os, "open", replacing)
    run(plan, tmp_path / "out")
    assert not other.exists()
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_source_that_cannot_be_looked_at_any_more_is_named(
    tmp_path: Path, outputs: dict[str, Expr], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a server that has forgotten the file."""
    plan, fstat, path = planned({"copy": outputs["copy"]}), os.fstat, tmp_path / "source.safetensors"
    is_read = False

    def stale(fd: int) -> os.stat_result:
        if is_read and Path(f"/proc/self/fd/{fd}").readlink() == path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fstat(fd)

    def note(state: Progress) -> None:
        nonlocal is_read
        is_read = state.read_nbytes > 0

    monkeypatch.setattr(os, "fstat", stale)
    with pytest.raises(RunError, match=r"source\.safetensors: Stale file handle"):
        run(plan, tmp_path, on_progress=note)


@pytest.mark.parametrize("fails", [None, "copying", "syncing"])
def test_what_was_made_of_a_source_that_changed_meanwhile_does_not_count_when_it_is_as_it_was_again(
    plan: Plan, whole: tuple[dict[str, str], RunResult], tmp_path: Path, fails: str | None
) -> None:
    place, path = tmp_path / "place", tmp_path / "source.safetensors"
    data, before = path.read_bytes(), path.stat()

    def change(state: Any) -> None:
        if state.written_nbytes >= plan.written_nbytes // 3 and path.stat().st_mtime_ns == before.st_mtime_ns:
            with path.open("r+b") as file:  # which stays as long as it is, so that reading goes on
                file.write(bytes(len(data)))
        if fails == (state.doing or "copying") and state.written_nbytes >= plan.written_nbytes // 2:
            raise Stop

    with pytest.raises(Stop if fails else RunError):
        go_on(plan, place, on_progress=change)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = go_on(plan, place)
    assert "resumed" not in result.nbytes_by_path
    assert digest(place / "model") == whole[0]


def test_a_second_reading_that_differs_is_told(
    plan: Plan, reads: dict[str, Read], tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checked").mkdir()
    run(plan, tmp_path / "checked", KERNELS, check_sources=True)
    assert digest(tmp_path / "checked") == whole[0]
    read_into = LocalFile.read_into

    def flipping(
        self: LocalFile, offset: int, slab: memoryview, begin: int, nbytes: int, *, cached: bool = True
    ) -> None:
        read_into(self, offset, slab, begin, nbytes, cached=cached)
        slab[begin] ^= 0 if cached else 4

    monkeypatch.setattr(LocalFile, "read_into", flipping)
    averaged = planned({"mean": mean([reads["large"], reads["other"]])})
    for checked in (plan, averaged):
        with pytest.raises(
            RunError, match=r"source\.safetensors: the [\d,]+ bytes from byte [\d,]+ on were other ones"
        ):
            run(checked, tmp_path / "checked", KERNELS, check_sources=True)


def test_what_a_second_reading_found_wrong_is_not_taken_for_finished(
    plan: Plan, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_into, wrong = LocalFile.read_into, iter([0, 0, 4])

    def flipping(
        self: LocalFile, offset: int, slab: memoryview, begin: int, nbytes: int, *, cached: bool = True
    ) -> None:
        read_into(self, offset, slab, begin, nbytes, cached=cached)
        slab[begin] ^= next(wrong, 0) if cached else 0

    monkeypatch.setattr(LocalFile, "read_into", flipping)
    with pytest.raises(RunError, match="were other ones when read again"):
        go_on(plan, tmp_path / "place", check_sources=True)
    go_on(plan, tmp_path / "place")
    assert digest(tmp_path / "place" / "model") == whole[0]
