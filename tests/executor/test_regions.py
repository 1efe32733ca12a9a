"""Memory that is cut into regions."""

import pytest

from executor.regions import block_nbytes, cut
from planner.expr import DType
from planner.layout import PAGE


def test_regions_follow_each_other_from_page_to_page() -> None:
    memory = memoryview(bytearray(4 * PAGE))
    first, rest = cut(memory, PAGE + 1, at=8)
    second, rest = cut(rest, 2 * PAGE)
    first[0], second[-1] = 1, 2
    assert (memory[8], memory[4 * PAGE - 1]) == (1, 2)
    assert (len(first), len(second), len(rest)) == (PAGE + 1, 2 * PAGE, 0)


def test_a_region_that_there_is_no_room_for_is_an_error_rather_than_a_shorter_one() -> None:
    with pytest.raises(AssertionError, match="cut short"):
        cut(memoryview(bytearray(PAGE)), PAGE, at=1)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 1000), (3, 1024)])
def test_a_block_has_room_for_its_rows_in_float32_and_as_they_are_read_wherever_these_lie_in_their_page(
    dtype: DType, rows: int, columns: int
) -> None:
    memory = memoryview(bytearray(block_nbytes(rows, columns, dtype)))
    for at in range(0, PAGE, dtype.itemsize):
        _, rest = cut(memory, rows * columns * DType.F32.itemsize)
        read, _ = cut(rest, rows * columns * dtype.itemsize, at)
        assert len(read) == rows * columns * dtype.itemsize
