"""The ways that bytes take into the output: each gives the same bytes, and where one does not work the next does."""

import errno
import fcntl
import mmap
import os
import random
import shutil
import struct
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import BinaryIO

import pytest
import torch
from plans import digest, load, planned, source

from executor import shortcuts
from executor.engine import RunResult, run
from executor.errors import RunError
from executor.local import LocalFile
from executor.ways import physical_nbytes
from executor.writer import ShardWriter
from planner.expr import DType, Expr, RemoteFile, Zeros, cast, scale, stack
from planner.layout import PAGE
from planner.plan import Plan

MIB = 1 << 20
FS_IOC_FIEMAP = 0xC020660B
FIEMAP_FLAG_SYNC = 1


def outputs(directory: Path) -> dict[str, Expr]:
    """A merge in small, from a source in `directory`: shared tensors, odd sizes, stacks, computed tensors."""
    generator = torch.Generator().manual_seed(0)
    reads = source(
        directory / "source.safetensors",
        {
            "large": torch.randn(3001, 2048, generator=generator).bfloat16(),
            "other": torch.randn(999, 2048, generator=generator).bfloat16(),
            "small": torch.randn(20, generator=generator),
        },
    )
    os.sync()
    large, other = reads["large"], reads["other"]
    half = cast(scale(large, 0.5), DType.BF16)
    return {
        "large": large,
        "large again": large,
        "small": reads["small"],
        "half": half,
        "half again": half,
        "stack": stack([large, large]),
        "other": other,
    }


def merged(plan: Plan, out: Path, *, share_extents: bool = True) -> RunResult:
    out.mkdir()
    return run(plan, out, share_extents=share_extents)


@pytest.fixture
def usual(tmp_path: Path) -> dict[str, str]:
    """The digests that every way must arrive at."""
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    merged(plan, tmp_path / "usual")
    return digest(tmp_path / "usual")


def extents(path: Path) -> list[tuple[int, int, int]]:
    """(logical, physical, length) of each extent of a file, in bytes, from the file system (FIEMAP)."""
    count = 512
    reply = bytearray(struct.pack("=QQLLLL", 0, 2**64 - 1, FIEMAP_FLAG_SYNC, 0, count, 0) + bytes(56 * count))
    with open(path, "rb") as file:
        fcntl.ioctl(file.fileno(), FS_IOC_FIEMAP, reply)
    (mapped,) = struct.unpack_from("=L", reply, 20)
    return [struct.unpack_from("=QQQ", reply, 32 + 56 * index) for index in range(mapped)]


def physical(path: Path, offset: int) -> int:
    """Where on the disk the byte at `offset` of a file lies."""
    return next(at + offset - start for start, at, length in extents(path) if start <= offset < start + length)


def place_of(plan: Plan, out: Path, name: str) -> tuple[Path, int]:
    """The file and the first whole page of an output tensor."""
    shard, tensor = next((s, t) for s in plan.shards for t in s.tensors if t.name == name)
    return out / shard.filename, tensor.offset + -tensor.offset % PAGE


def test_copies_are_shared_with_their_source_and_cost_no_space(reflinking: Path, usual: dict[str, str]) -> None:
    plan = planned(outputs(reflinking), shard=20 * MIB)
    forecast = physical_nbytes(plan, reflinking)
    before = shutil.disk_usage(reflinking).used
    result = merged(plan, reflinking / "shared")
    os.sync()
    used = shutil.disk_usage(reflinking).used - before
    assert digest(reflinking / "shared") == usual
    assert result.nbytes_by_path["reflinked"] > 50 * MIB
    assert forecast < used + MIB
    assert used < forecast + MIB < plan.written_nbytes / 3
    assert result.read_nbytes < plan.read_nbytes
    shutil.rmtree(reflinking / "shared")
    remote = tuple(RemoteFile(f"http://localhost/{at}", "e", file.nbytes) for at, file in enumerate(plan.sources))
    streamed = replace(plan, sources=remote)
    assert physical_nbytes(streamed, reflinking, downloaded_beside=True) == forecast
    assert physical_nbytes(streamed, reflinking) > forecast + 10 * MIB


def test_equal_tensors_share_extents_and_with_clone_tensors_each_has_its_own(
    reflinking: Path, usual: dict[str, str]
) -> None:
    plan = planned(outputs(reflinking), shard=20 * MIB)
    for share, directory in ((True, reflinking / "shared"), (False, reflinking / "cloned")):
        merged(plan, directory, share_extents=share)
        assert digest(directory) == usual
        for first, second in (("large", "large again"), ("half", "half again")):
            same = physical(*place_of(plan, directory, first)) == physical(*place_of(plan, directory, second))
            assert same is share
        shutil.rmtree(directory)


def test_a_source_on_another_file_system_is_streamed_once_and_then_shared(
    reflinking: Path, tmp_path: Path, usual: dict[str, str]
) -> None:
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    result = merged(plan, reflinking / "out")
    assert digest(reflinking / "out") == usual
    assert "reflinked" not in result.nbytes_by_path
    assert result.nbytes_by_path["shared within the output"] > 20 * MIB
    assert result.read_nbytes == plan.read_nbytes
    shutil.rmtree(reflinking / "out")


def test_nothing_is_shared_of_a_tensor_without_a_whole_page_and_what_follows_it_stays(
    reflinking: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*shape, generator=generator)
        for name, shape in {"a": (512, 512), "b": (512, 512), "norm": (16,), "c": (100,), "d": (100,)}.items()
    }
    read = {name: cast(read, DType.BF16) for name, read in source(tmp_path / "model.safetensors", tensors).items()}
    # In each of two shards of their own, the norm begins at a page, and something else follows.
    first, second = ({f"{of}.large": read[of], f"{of}.norm": read["norm"]} for of in "ab")
    plan = planned(first | {"a.rest": read["c"]} | second | {"b.rest": read["d"]}, shard=MIB // 2 + 300)
    norms = [tensor for shard in plan.shards for tensor in shard.tensors if tensor.name.endswith("norm")]
    assert [norm.offset % PAGE for norm in norms] == [0, 0]
    assert len(plan.shards) == 2
    merged(plan, tmp_path / "usual")
    result = merged(plan, reflinking / "out")
    assert digest(reflinking / "out") == digest(tmp_path / "usual")
    assert result.nbytes_by_path.keys() <= {"direct", "buffered"}
    shutil.rmtree(reflinking / "out")


def test_a_reflink_of_no_bytes_moves_none(reflinking: Path) -> None:
    with open(reflinking / "source", "w+b") as file, open(reflinking / "target", "w+b") as target:
        file.write(bytes(2 * PAGE))
        target.write(b"what is there" + bytes(2 * PAGE))
        target.flush()
        file.flush()
        assert shortcuts.Reflink().move(file.fileno(), 0, target.fileno(), 0, 0) == 0
        assert (reflinking / "target").read_bytes() == b"what is there" + bytes(2 * PAGE)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EPERM])
def test_where_reflinks_are_refused_bytes_are_copied(
    code: int, reflinking: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(outputs(reflinking), shard=20 * MIB)

    tried: list[object] = []

    def refuse(*args: object) -> None:
        tried.append(args)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    result = merged(plan, reflinking / "out")
    monkeypatch.undo()
    assert len(tried) == 2  # within the output, and from the source: not for each range
    assert digest(reflinking / "out") == usual
    assert result.nbytes_by_path.keys() == {"direct", "buffered"}
    shutil.rmtree(reflinking / "out")


def test_reflinks_that_fail_after_they_were_counted_on_are_made_up_for(
    reflinking: Path, tmp_path: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    ioctl, calls = fcntl.ioctl, 0

    def fail_later(fd: int, request: int, argument: bytes) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.EINVAL, "no")
        return ioctl(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", fail_later)
    merged(plan, reflinking / "out")
    monkeypatch.undo()
    assert digest(reflinking / "out") == usual
    shutil.rmtree(reflinking / "out")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_io_is_written_through_the_page_cache(
    code: int, tmp_path: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    opened = os.open

    def without_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", without_direct)
    result = merged(plan, tmp_path / "out")
    assert digest(tmp_path / "out") == usual
    assert result.nbytes_by_path.keys() == {"buffered"}


def test_direct_writes_that_are_refused_or_short_are_finished_through_the_page_cache(
    tmp_path: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    pwrite, calls = os.pwrite, 0

    def moody(fd: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            calls += 1
            if calls % 3 == 1:
                raise OSError(errno.EINVAL, "no")
            if calls % 3 == 2:
                return pwrite(fd, data[: 5 * PAGE], offset) - 100
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", moody)
    result = merged(plan, tmp_path / "out")
    assert calls > 3
    assert digest(tmp_path / "out") == usual
    assert result.nbytes_by_path["buffered"] > PAGE


def test_a_disk_that_a_direct_write_fails_on_ends_the_run_at_once(
    tmp_path: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache would take all that follows, and say so when it is synced."""
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    pwrite = os.pwrite

    def failing(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(RunError, match=r"model-0000\d-of-0000\d\.safetensors: Input/output error"):
        merged(plan, tmp_path / "out")


def test_a_header_that_is_large_enough_to_be_written_directly_is_written_as_well(tmp_path: Path) -> None:
    names = [f"{number:04} {'x' * 200}" for number in range(400)]
    plan = planned({name: Zeros(DType.F32, (1,)) for name in names})
    assert plan.shards[0].data_start > 64 << 10
    merged(plan, tmp_path / "out")
    assert sorted(load(plan, tmp_path / "out")) == names


def test_a_file_server_copies_what_it_can(
    tmp_path: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    monkeypatch.setattr(shortcuts, "file_system", lambda fd: "nfs4")
    copy_file_range, calls = os.copy_file_range, 0

    def sometimes(source: int, target: int, count: int, from_offset: int, to_offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise OSError(errno.EXDEV, "no")
        return copy_file_range(source, target, count // 2 + 1, from_offset, to_offset)

    monkeypatch.setattr(os, "copy_file_range", sometimes)
    result = merged(plan, tmp_path / "out")
    assert digest(tmp_path / "out") == usual
    assert result.nbytes_by_path["copied by the server"] > MIB


def test_a_file_server_copies_ranges_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    odd = {name: torch.randn(1001, 1001, generator=generator).bfloat16() for name in ("first", "second")}
    reads = source(tmp_path / "odd.safetensors", odd)
    plan = planned({"second": reads["second"], "first": reads["first"], "second again": reads["second"]})
    merged(plan, tmp_path / "usual")
    monkeypatch.setattr(shortcuts, "file_system", lambda fd: "nfs4")
    result = merged(plan, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "usual")
    assert result.nbytes_by_path["copied by the server"] == 3 * 1001 * 1001 * 2
    assert result.read_nbytes == 0


def test_a_file_server_is_asked_for_nothing_of_another_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old kernels would read and write it, and fill the page cache."""
    asked: list[int] = []
    monkeypatch.setattr(shortcuts, "file_system", lambda fd: "nfs4")
    monkeypatch.setattr(os, "copy_file_range", lambda *args: asked.append(args[2]))
    with TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if Path(elsewhere).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is one file system")
        plan = planned(outputs(Path(elsewhere)))
        result = merged(plan, tmp_path / "out")
    assert asked == []
    assert "copied by the server" not in result.nbytes_by_path


def test_a_shard_has_its_size_from_the_start_also_where_space_cannot_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing that was written before a kill would count."""
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    with closing(ShardWriter(tmp_path, plan.shards)):
        assert [(tmp_path / of.filename).stat().st_size for of in plan.shards] == [of.nbytes for of in plan.shards]


@pytest.mark.parametrize(
    ("source", "target", "reach"),
    [(8, 8 + PAGE, (PAGE - 8, 3 * PAGE - 8)), (0, 0, (0, 3 * PAGE)), (8, 16, (0, 0)), (12, 12, (0, 0))],
)
def test_only_whole_pages_that_lie_alike_and_begin_with_an_element_can_be_shared(
    source: int, target: int, reach: tuple[int, int]
) -> None:
    assert shortcuts.Reflink().reach(source, target, 3 * PAGE) == reach


@pytest.mark.parametrize("nbytes", [0, 100, PAGE, 2 * PAGE - 9])
def test_of_a_range_without_a_whole_page_nothing_can_be_shared(nbytes: int) -> None:
    assert shortcuts.Reflink().reach(8, 8, nbytes) == (0, 0)


def test_a_range_that_lies_where_it_cannot_be_shared_keeps_no_other_from_being_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (1024, 1024), "b": (4,), "c": (512, 1024)}
    reads = source(
        tmp_path / "pages.safetensors",
        {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()},
    )
    assert (reads["c"].offset - reads["a"].offset) % PAGE == 16
    plan = planned({"c": reads["c"], "a": reads["a"]})
    merged(plan, tmp_path / "usual")

    def share(target: int, request: int, argument: bytes) -> None:
        from_fd, offset, nbytes, to_offset = struct.unpack("qQQQ", argument)
        os.pwrite(target, os.pread(from_fd, nbytes, offset), to_offset)

    monkeypatch.setattr(fcntl, "ioctl", share)
    result = merged(plan, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "usual")
    assert result.nbytes_by_path["reflinked"] > 3 * MIB
    assert result.read_nbytes > 2 * MIB


def test_the_kind_of_file_system_is_known() -> None:
    if not Path("/dev/shm").exists():
        pytest.skip("needs /dev/shm")
    with open("/dev/shm/moeplan-test", "w+b") as file:
        Path(file.name).unlink()
        assert shortcuts.file_system(file.fileno()) == "tmpfs"


def test_a_mount_may_have_any_name(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"\xff \\040")
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        with TemporaryFile(dir=place) as file:
            assert shortcuts.file_system(file.fileno()) == "tmpfs"
    finally:
        subprocess.run(["umount", place], check=True)


def test_large_copies_go_to_the_disk_directly(tmp_path: Path) -> None:
    plan = planned(outputs(tmp_path), shard=20 * MIB)
    result = merged(plan, tmp_path / "out")
    if "direct" not in result.nbytes_by_path:
        pytest.skip("needs a file system with direct I/O")
    assert result.nbytes_by_path["direct"] > 0.99 * plan.written_nbytes


def cached_nbytes(file: BinaryIO, offset: int) -> int:
    """How much of the MiB at `offset` the page cache has, up to the first page that it has not."""
    try:
        return os.preadv(file.fileno(), [bytearray(MIB)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0


def test_what_the_page_cache_has_is_taken_from_there_and_the_rest_stays_out_of_it(tmp_path: Path) -> None:
    path, memory = tmp_path / "source", memoryview(mmap.mmap(-1, 4 * MIB))
    content = random.Random(1).randbytes(4 * MIB)
    path.write_bytes(content)
    with open(path, "rb") as file, closing(LocalFile(str(path))) as source:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 2 * MIB, 0, os.POSIX_FADV_DONTNEED)
        if cached_nbytes(file, 0) != MIB or shortcuts.file_system(file.fileno()) == "tmpfs":
            pytest.skip("needs a file system with direct I/O and a page cache")
        read = disk_read_nbytes()
        source.read_into(0, memory, 0, 2 * MIB)
        assert disk_read_nbytes() == read
        source.read_into(2 * MIB, memory, 2 * MIB, 2 * MIB)
        assert memory == content
        assert 2 * MIB <= disk_read_nbytes() - read <= 2 * MIB + PAGE
        assert (cached_nbytes(file, MIB), cached_nbytes(file, 3 * MIB)) == (MIB, 0)


def disk_read_nbytes() -> int:
    """What this process has had the disk read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])
