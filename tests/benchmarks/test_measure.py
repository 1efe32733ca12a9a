"""What is measured is what the program did: its memory, its bytes, its time to the disk, how it ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import floor, page_cache
from benchmarks.machine import file_system
from benchmarks.measure import Limits, measure
from benchmarks.results import Measurement

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


@pytest.fixture
def run(tmp_path: Path):
    """`run(argv...)`: the measurement of a program that writes to `out`, if it writes anything."""

    def measured(*argv: object, **limits: float) -> Measurement:
        return measure([str(word) for word in argv], tmp_path / "out", tmp_path / "log", Limits(tmp_path, **limits))

    return measured


def python(run, code: str) -> Measurement:
    return run(sys.executable, "-I", "-S", "-c", code)


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A directory whose files are not in memory alone."""
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("the temporary directory is in memory")
    return tmp_path


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system that has no direct I/O."""
    place = tmp_path / "ram fs"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "ramfs", "none", place], capture_output=True).returncode:
        pytest.skip("only root can mount a file system without direct I/O")
    yield place
    subprocess.run(["umount", place], check=True)


def test_peak_memory_is_that_of_the_program_and_not_of_who_started_it(run) -> None:
    held = bytearray(os.urandom(MIB) * 300)
    small = run("/bin/sleep", "0.2").peak_rss_nbytes
    large = python(run, "x = bytearray(200 << 20); x[::4096] = b'1' * len(x[::4096]); del x").peak_rss_nbytes
    assert 0 < small < 8 * MIB
    assert 200 * MIB < large < 230 * MIB
    assert len(held) == 300 * MIB


def test_bytes_are_those_that_the_program_read_and_wrote(run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    measured = python(run, f"open({str(tmp_path / 'out' / 'x')!r}, 'wb').write(bytes(10 << 20))")
    assert 10 * MIB <= measured.written_nbytes < 11 * MIB


def test_time_includes_waiting_for_the_output_to_be_on_the_disk(run, on_disk: Path) -> None:
    file = on_disk / "out" / "x"
    file.parent.mkdir()
    measured = python(run, f"open({str(file)!r}, 'wb').write(bytes(32 << 20))")
    assert measured.seconds > measured.sync_seconds > 0
    page_cache.evict([file])  # which leaves what is not yet on the disk where it is
    assert run("/bin/cat", file).disk_read_nbytes >= 32 * MIB


def test_what_a_failing_program_said_is_kept(run) -> None:
    error = run("/bin/ls", "/no/such/place").error
    assert error is not None
    assert error.startswith("exit status 2: ")
    assert "/no/such/place" in error


def test_a_program_that_cannot_be_started_has_failed(run) -> None:
    error = run("/no/such/program").error
    assert error is not None
    assert error.endswith("No such file or directory: '/no/such/program'")


def test_a_program_ignores_what_who_measures_it_was_told_to_ignore(run) -> None:
    """As `nohup` has it, so that the terminal may be closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("/bin/sh", "-c", "kill -HUP $$").error is None
    finally:
        signal.signal(signal.SIGHUP, before)
    assert run("/bin/sh", "-c", "kill -HUP $$").error is not None


def test_a_program_is_stopped_when_its_time_is_over(run) -> None:
    measured = run("/bin/sleep", "60", seconds=0.2)
    assert measured.error == "stopped after 0.2 s"
    assert measured.seconds < 10


def test_a_program_is_stopped_before_the_disk_is_full(run) -> None:
    assert "were left on the disk" in (run("/bin/sleep", "60", keep_free_nbytes=1 << 60).error or "")


@pytest.fixture
def measuring(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A process that measures a program of 60 seconds, and the program's place in /proc."""
    code = f"""
from pathlib import Path
from benchmarks.measure import Limits, measure
limits = Limits(Path.cwd(), keep_free_nbytes=0)
measure(["/bin/sh", "-c", "echo $$; exec sleep 60"], None, Path({str(tmp_path / "log")!r}), limits)
"""
    log = tmp_path / "log.out"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        program = Path("/proc") / log.read_text().strip()
        yield process, program
    if program.exists():
        os.kill(int(program.name), signal.SIGKILL)


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_has_ended_when_its_measurement_is_interrupted(measuring: tuple[subprocess.Popen, Path]) -> None:
    process, program = measuring
    process.send_signal(signal.SIGINT)
    process.wait()
    assert not program.exists()


def test_a_program_ends_with_the_process_that_measures_it(measuring: tuple[subprocess.Popen, Path]) -> None:
    process, program = measuring
    process.kill()
    wait_until(lambda: not program.exists())


def test_what_is_evicted_comes_from_the_disk_and_what_is_warm_does_not(run, on_disk: Path) -> None:
    file = on_disk / "file"
    file.write_bytes(os.urandom(8 * MIB))
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
    page_cache.evict([file])
    cold = run("/bin/cat", file).disk_read_nbytes
    page_cache.evict([file])
    page_cache.warm([file])
    warm = run("/bin/cat", file).disk_read_nbytes
    assert cold >= 8 * MIB
    assert warm < MIB


def test_the_floor_moves_as_many_bytes_as_asked_for_in_whole_pages(tmp_path: Path) -> None:
    written, _ = floor.write(str(tmp_path / "a"), 20 * MIB + 5)
    assert written == (tmp_path / "a").stat().st_size == 20 * MIB + 4096
    (tmp_path / "b").write_bytes(bytes(3 * MIB + 7))
    names = [str(tmp_path / "b"), str(tmp_path / "a")]
    assert floor.read(names, 1 << 40)[0] == 23 * MIB + 7 + 4096
    assert floor.read(names, 3 * MIB)[0] == 3 * MIB


def test_the_floor_says_where_there_is_no_direct_io(ramfs: Path) -> None:
    assert floor.write(str(ramfs / "x"), MIB) == (MIB, False)
    assert floor.read([str(ramfs / "x")], MIB) == (MIB, False)


def test_a_file_system_is_known_by_any_directory_in_it(ramfs: Path) -> None:
    below = ramfs / "below"
    below.mkdir()
    assert {file_system(place) for place in (ramfs, below)} == {"ramfs"}
    assert file_system(ramfs.parent) != "ramfs"
