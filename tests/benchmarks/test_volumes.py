"""File systems on loop devices are gone when a case is over, however it ended."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.volumes import KINDS, VolumeError, volume


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_volume_is_of_its_kind_and_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    try:
        with volume(kind, tmp_path, 0) as mounted:
            (mounted / "file").write_bytes(b"x")
            mounts = Path("/proc/mounts").read_text()
            raise KeyboardInterrupt
    except VolumeError as reason:
        pytest.skip(str(reason))
    except KeyboardInterrupt:
        pass
    assert f" {mounted} {kind} " in mounts
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert str(tmp_path) not in subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout
    assert list(tmp_path.iterdir()) == []
