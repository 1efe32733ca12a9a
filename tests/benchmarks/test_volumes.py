"""File systems on loop devices are gone when a case is over, however it ended."""

import signal
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from benchmarks import volumes
from benchmarks.volumes import KINDS, VolumeError, volume


def enter(stack: ExitStack, kind: str, directory: Path) -> Path:
    """The place of a volume that is there until the end of `stack`. Skips the test where none can be made."""
    try:
        return stack.enter_context(volume(kind, directory, 0))
    except VolumeError as reason:
        pytest.skip(str(reason))


def assert_nothing_is_left(directory: Path) -> None:
    assert str(directory) not in Path("/proc/mounts").read_text()
    assert str(directory) not in subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_volume_is_of_its_kind_and_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        mounted = enter(stack, kind, tmp_path)
        (mounted / "file").write_bytes(b"x")
        mounts = Path("/proc/mounts").read_text()
        raise KeyboardInterrupt
    assert f" {mounted} {kind} " in mounts
    assert_nothing_is_left(tmp_path)


def test_a_volume_waits_for_a_program_that_is_about_to_end(tmp_path: Path) -> None:
    with ExitStack() as stack:
        mounted = enter(stack, "xfs", tmp_path)
        program = subprocess.Popen(["/bin/sleep", "0.5"], cwd=mounted)
    assert program.poll() == 0
    assert_nothing_is_left(tmp_path)


def test_a_volume_goes_out_of_sight_of_a_program_that_does_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes, "UNMOUNT_SECONDS", 0.2)
    with ExitStack() as stack:
        mounted = enter(stack, "xfs", tmp_path)
        program = subprocess.Popen(["/bin/sleep", "60"], cwd=mounted)
    assert str(mounted) not in Path("/proc/mounts").read_text()
    assert list(tmp_path.iterdir()) == []
    program.kill()
    program.wait()


def test_a_volume_that_is_being_taken_away_is_gone_before_an_interruption_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(mounted: Path) -> None:
        signal.raise_signal(signal.SIGALRM)
        unmount(mounted)

    unmount = volumes._unmount
    monkeypatch.setattr(volumes, "_unmount", interrupted)
    monkeypatch.setattr(volumes, "INTERRUPTIONS", (signal.SIGALRM,))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), ExitStack() as stack:
            enter(stack, "xfs", tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert_nothing_is_left(tmp_path)
