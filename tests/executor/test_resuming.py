"""Runs that are interrupted and gone on with: nothing is done twice, and the bytes are those of a run in one go."""

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from plans import Stop, column_sums, digest, go_on, planned, source, stopping_after
from safetensors.torch import load_file

from executor import journal, ways
from executor.chunk_runner import ChunkRunner
from executor.engine import RunResult
from executor.errors import RunError
from executor.reader import SourceReader
from executor.results import Results
from planner.expr import Concat, DType, Expr, Opaque, Read, add_low_rank, cast, mean, rows
from planner.plan import BufferRoot, Plan, StreamStep


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_an_interrupted_run_goes_on_where_it_was(
    plan: Plan, whole: tuple[dict[str, str], RunResult], tmp_path: Path, share: float
) -> None:
    digests, in_one_go = whole
    place = tmp_path / "place"
    with pytest.raises(Stop):
        go_on(plan, place, on_progress=stopping_after(int(share * plan.written_nbytes)))
    written = 0
    pwrite = os.pwrite

    def counting(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        count = pwrite(fd, data, offset)
        written += count
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", counting)
        result = go_on(plan, place)
    assert digest(place / "model") == digests
    assert result.checksums == in_one_go.checksums
    resumed = result.nbytes_by_path.get("resumed", 0)
    under_way = plan.pool.workers * plan.pool.slab_nbytes * 2  # a chunk may go to two places
    assert resumed >= share * plan.written_nbytes - under_way - (1 << 20)
    journal_nbytes = sum(file.stat().st_size for file in place.iterdir() if file.is_file())
    assert written <= plan.written_nbytes - resumed + journal_nbytes + (1 << 16)


def test_what_was_finished_under_one_budget_counts_under_another(
    reads: dict[str, Read], whole: tuple[dict[str, str], RunResult], plan: Plan, tmp_path: Path
) -> None:
    outputs: dict[str, Expr] = {"a": reads["large"], "b": reads["other"], "c": cast(reads["third"], DType.F32)}
    digests = set()
    for number, budgets in enumerate([(32 << 20,), (32 << 20, 2 << 20), (2 << 20, 32 << 20)]):
        place = tmp_path / f"place {number}"
        for budget in budgets[:-1]:
            with pytest.raises(Stop):
                go_on(planned(outputs, budget), place, on_progress=stopping_after(9_000_000))
        result = go_on(planned(outputs, budgets[-1]), place)
        assert ("resumed" in result.nbytes_by_path) is (len(budgets) > 1)
        digests.add(str((digest(place / "model"), sorted(result.checksums.items(), key=str))))
    assert len(digests) == 1


def test_the_factors_of_a_product_are_read_again_where_what_it_is_added_to_is_left(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (3001, 1000), "b": (3001, 5), "a": (5, 1000)}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    reads = source(tmp_path / "source.safetensors", tensors)
    adapted = cast(add_low_rank(reads["weight"], reads["b"], reads["a"], 0.5), DType.BF16)
    outputs: dict[str, Expr] = {"copy": reads["weight"], "adapted": adapted, "factor": reads["a"]}
    digests, read = set(), []
    for number, stop in enumerate((None, 1.0, 0.5)):
        place = tmp_path / f"place {number}"
        if stop is not None:
            small = planned(outputs, 2 << 20)
            with pytest.raises(Stop):
                go_on(small, place, on_progress=stopping_after(int(stop * small.written_nbytes)))
        result = go_on(planned(outputs, 32 << 20), place)
        digests.add(str((digest(place / "model"), sorted(result.checksums.items(), key=str))))
        read.append(result.read_nbytes)
    assert len(digests) == 1
    assert read[0] == sum(tensor.nbytes for tensor in tensors.values())
    assert read[1] == 0
    factors = tensors["b"].nbytes + tensors["a"].nbytes
    assert factors < read[2] < read[0]


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_a_mean_goes_on_where_it_was_and_has_the_checksums_of_a_run_in_one_go(
    reads: dict[str, Read], tmp_path: Path, share: float
) -> None:
    averaged = mean([reads["large"], reads["third"], reads["other"]])
    rounded = cast(averaged, DType.BF16)
    sums = Opaque("column_sums", "1", (rows(rounded, 2000, 2003),), DType.F32, (1000,))
    outputs: dict[str, Expr] = {"mean": rounded, "mean again": rounded, "float32": averaged, "sums": sums}
    whole = go_on(planned(outputs, 3 << 20), tmp_path / "whole")
    small = planned(outputs, 2 << 20)
    with pytest.raises(Stop):
        go_on(small, tmp_path / "place", on_progress=stopping_after(int(share * small.written_nbytes)))
    result = go_on(planned(outputs, 32 << 20), tmp_path / "place")
    assert digest(tmp_path / "place" / "model") == digest(tmp_path / "whole" / "model")
    assert result.checksums == whole.checksums
    assert len(result.checksums) == 3
    assert result.nbytes_by_path["resumed"] > 0
    assert result.read_nbytes < whole.read_nbytes == small.read_nbytes == 3 * reads["large"].nbytes


def test_kernels_whose_results_were_saved_do_not_run_again(plan: Plan, tmp_path: Path, whole: Any) -> None:
    ran: list[int] = []

    def counted(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        ran.append(params)
        if params == 2 and len(ran) == 2:
            raise Stop
        column_sums(params, inputs, output)

    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    result = go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    assert ran == [1, 2, 2]
    assert digest(tmp_path / "place" / "model") == whole[0]
    assert result.checksums == whole[1].checksums
    assert list((tmp_path / "place" / journal.RESULTS).iterdir()) == []


def test_a_kernel_whose_results_are_written_does_not_run_again(plan: Plan, tmp_path: Path, whole: Any) -> None:
    ran: list[int] = []

    def counted(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        ran.append(params)
        column_sums(params, inputs, output)

    with pytest.raises(Stop):
        go_on(
            plan, tmp_path / "place", on_progress=stopping_after(plan.written_nbytes), kernels={"column_sums": counted}
        )
    go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    assert ran == [1, 2]
    assert digest(tmp_path / "place" / "model") == whole[0]


def test_a_result_that_is_damaged_while_it_is_needed_ends_the_run_and_is_made_again_by_the_next(
    plan: Plan, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def counted(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        ran.append(params)
        if len(ran) == 2:
            raise Stop
        column_sums(params, inputs, output)

    def damaged(self: Results, key: str, checksum: int, memory: memoryview) -> None:
        (tmp_path / "place" / journal.RESULTS / key).write_bytes(bytes(len(memory)))
        load(self, key, checksum, memory)

    load = Results.load
    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    monkeypatch.setattr(Results, "load", damaged)
    with pytest.raises(RunError, match="is not what was saved there any more; the next run computes it again"):
        go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    assert ran == [1, 2, 1, 2]
    assert digest(tmp_path / "place" / "model") == whole[0]


def test_a_result_is_kept_until_what_is_made_of_it_is_written(
    plan: Plan, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or all kernels would run again that it is made of."""
    ran: list[int] = []

    def counted(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        ran.append(params)
        column_sums(params, inputs, output)

    def failing(self: ChunkRunner, slab: memoryview, step: StreamStep, piece: object) -> tuple[int, int]:
        if isinstance(step.root, BufferRoot):
            raise Stop
        return work(self, slab, step, piece)

    work = ChunkRunner.run
    monkeypatch.setattr(ChunkRunner, "run", failing)
    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    monkeypatch.setattr(ChunkRunner, "run", work)
    go_on(plan, tmp_path / "place", kernels={"column_sums": counted})
    assert ran == [1, 2, 2]
    assert digest(tmp_path / "place" / "model") == whole[0]


def test_a_saved_result_that_was_damaged_is_computed_again(plan: Plan, tmp_path: Path, whole: Any) -> None:
    def stopping(params: Any, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        if params == 2:
            raise Stop
        column_sums(params, inputs, output)

    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", kernels={"column_sums": stopping})
    (saved,) = (tmp_path / "place" / journal.RESULTS).iterdir()
    saved.write_bytes(saved.read_bytes()[:-1] + b"\x7f")
    go_on(plan, tmp_path / "place")
    assert digest(tmp_path / "place" / "model") == whole[0]


@pytest.mark.parametrize("sharing", [(True,), (False, True), (True, True)])
def test_what_was_written_to_one_place_to_be_shared_with_others_is_written_again_where_that_does_not_work_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharing: Sequence[bool]
) -> None:
    weight = torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0))
    read = source(tmp_path / "pages.safetensors", {"weight": weight})["weight"]
    plan = planned({"weight": read, "again": read}, budget=2 << 20)
    whole = go_on(plan, tmp_path / "whole")
    for number, shares in enumerate(sharing, 1):
        monkeypatch.setattr(ways, "can_reflink", lambda *_, shares=shares: shares)
        with pytest.raises(Stop):
            go_on(plan, tmp_path / "place", on_progress=stopping_after(number * 6_000_000))
    monkeypatch.setattr(ways, "can_reflink", lambda *_: False)
    result = go_on(plan, tmp_path / "place")
    assert digest(tmp_path / "place" / "model") == digest(tmp_path / "whole" / "model")
    assert result.checksums == whole.checksums
    assert result.read_nbytes == weight.nbytes


def test_more_shards_are_gone_on_with_than_files_may_be_open(tmp_path: Path, few_open_files: None) -> None:
    tensors = {f"{number:03}": torch.full((2048,), float(number)) for number in range(150)}
    reads = source(tmp_path / "source.safetensors", tensors)
    plan = planned({name: cast(read, DType.BF16) for name, read in reads.items()}, shard=4096)
    assert len(plan.shards) == 150
    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", on_progress=stopping_after(plan.written_nbytes))
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert go_on(plan, tmp_path / "place").nbytes_by_path["resumed"] == 150 * 4096


class Copying:
    """A shortcut that works anywhere."""

    name = "copied"

    def reach(self, source_offset: int, target_offset: int, nbytes: int) -> tuple[int, int]:
        return 0, nbytes

    def move(self, source: int, source_offset: int, target: int, target_offset: int, nbytes: int) -> int:
        return os.pwrite(target, os.pread(source, nbytes, source_offset), target_offset)


def test_a_mean_takes_no_shortcut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(512, 1024, generator=generator) for name in "abc"}
    reads = source(tmp_path / "pages.safetensors", tensors)
    averaged = mean([reads["a"], reads["b"]])
    plan = planned({"mean": averaged, "rounded": cast(averaged, DType.BF16), "copy": reads["c"]}, budget=8 << 20)
    whole = go_on(plan, tmp_path / "whole")
    monkeypatch.setattr(ways, "SHORTCUTS", (Copying(),))
    result = go_on(plan, tmp_path / "place")
    assert digest(tmp_path / "place" / "model") == digest(tmp_path / "whole" / "model")
    assert result.read_nbytes == 2 * reads["a"].nbytes
    assert result.checksums.items() < whole.checksums.items()


def test_a_stream_of_which_one_place_is_shared_is_known_by_its_first_place_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CopyingOnce(Copying):
        left = 1

        def move(self, *place: int) -> int:
            self.left -= 1
            return super().move(*place) if self.left >= 0 else 0

    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    read = source(tmp_path / "pages.safetensors", {"weight": weight})["weight"]
    plan = planned({"weight": read, "again": read}, budget=8 << 20)
    whole = go_on(plan, tmp_path / "whole")
    monkeypatch.setattr(ways, "SHORTCUTS", (CopyingOnce(),))
    result = go_on(plan, tmp_path / "place")
    assert digest(tmp_path / "place" / "model") == digest(tmp_path / "whole" / "model")
    assert result.nbytes_by_path["copied"] == weight.nbytes
    assert result.checksums == whole.checksums


def test_of_a_stream_that_was_begun_and_then_shared_there_is_no_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(8192, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    plan = planned(dict(source(tmp_path / "pages.safetensors", {"weight": weight})), budget=2 << 20)
    whole = go_on(plan, tmp_path / "whole")
    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", on_progress=stopping_after(4_000_000))
    monkeypatch.setattr(ways, "SHORTCUTS", (Copying(),))
    result = go_on(plan, tmp_path / "place")
    assert digest(tmp_path / "place" / "model") == digest(tmp_path / "whole" / "model")
    assert result.nbytes_by_path["copied"] == weight.nbytes
    assert whole.checksums
    assert result.checksums == {}


def test_a_run_that_fails_waits_for_no_network(
    plan: Plan, reads: dict[str, Read], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that waits for a server is interrupted, and what it says then does not hide why."""
    is_waiting, interrupted, read_into = Event(), Event(), SourceReader.read_into
    waited: list[bool] = []

    def waiting(self: SourceReader, source: int, offset: int, *args: Any, **how: Any) -> None:
        if offset == reads["other"].offset:
            is_waiting.set()
            waited.append(interrupted.wait(30))
            raise RunError("interrupted")
        read_into(self, source, offset, *args, **how)

    def failing(*args: Any) -> None:
        assert is_waiting.wait(30)
        raise Stop

    monkeypatch.setattr(SourceReader, "read_into", waiting)
    monkeypatch.setattr(SourceReader, "interrupt", lambda _: interrupted.set())
    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", kernels={"column_sums": failing})
    assert waited == [True]


def test_a_journal_that_ends_in_the_middle_of_a_line_counts_up_to_there(plan: Plan, tmp_path: Path, whole: Any) -> None:
    place = tmp_path / "place"
    with pytest.raises(Stop):
        go_on(plan, place, on_progress=stopping_after(plan.written_nbytes))
    text = (place / journal.NAME).read_bytes()
    lines = text.count(b"\n")
    assert lines > 8
    (place / journal.NAME).write_bytes(text[: len(text) * 2 // 3] + b"\x00\xff{")
    assert "resumed" in go_on(plan, place).nbytes_by_path
    assert digest(place / "model") == whole[0]


def test_a_shard_that_cannot_be_looked_at_is_named(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        go_on(plan, tmp_path, on_progress=stopping_after(plan.written_nbytes // 2))
    shard = tmp_path / "model" / plan.shards[0].filename
    shard.unlink()
    shard.symlink_to(300 * "x")
    with pytest.raises(RunError, match=f"^{shard}: File name too long$"):
        go_on(plan, tmp_path)


def test_rows_that_a_kernel_needs_of_what_is_written_already_are_read_again_and_nothing_else(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3001, 1000, generator=generator)
    reads = source(tmp_path / "source.safetensors", {"table": table})
    taken = {
        "sums": (DType.F32, [3000, 7, 8, 0, 1500]),
        "other sums": (DType.F32, [9, 1500, 8]),
        "sums of rounded rows": (DType.BF16, [7, 3000, 8]),
    }
    outputs: dict[str, Expr] = {"table": reads["table"]}
    for name, (dtype, numbers) in taken.items():
        some = tuple(cast(rows(reads["table"], row, row + 1), dtype) for row in numbers)
        outputs[name] = Opaque("column_sums", "1", (Concat(some, (len(numbers), 1000)),), DType.F32, (1000,))
    plan = planned(outputs, 8 << 20)

    def stopping(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        go_on(plan, tmp_path / "place", kernels={"column_sums": stopping})
    result = go_on(plan, tmp_path / "place")
    assert result.read_nbytes == len({row for _, numbers in taken.values() for row in numbers}) * 4000
    (shard,) = (tmp_path / "place" / "model").iterdir()
    written = load_file(shard)
    for name, (dtype, numbers) in taken.items():
        some_rows = table[numbers] if dtype is DType.F32 else table[numbers].bfloat16().float()
        torch.testing.assert_close(written[name], some_rows.sum(dim=0))
    assert torch.equal(written["table"], table)
