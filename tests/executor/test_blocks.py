"""Where streams may be cut."""

import pytest

from executor.blocks import block_number, chunks
from planner.expr import BLOCK


@pytest.mark.parametrize("head_numel", [1, BLOCK // 2 + 3, BLOCK])
@pytest.mark.parametrize("first_block", [0, 2])
def test_chunks_are_whole_blocks_of_no_more_than_so_many_elements_the_first_and_the_last_one_shorter(
    head_numel: int, first_block: int
) -> None:
    first, end = head_numel + (first_block - 1) * BLOCK if first_block else 0, head_numel + 9 * BLOCK + 7
    cut = list(chunks(first, end - first, head_numel, 3 * BLOCK))
    begins = [begin for begin, _ in cut]
    assert [begin + numel for begin, numel in cut] == [*begins[1:], end]
    assert max(numel for _, numel in cut) <= 3 * BLOCK
    assert all((begin - head_numel) % BLOCK == 0 for begin in begins if begin)
    assert [block_number(begin, head_numel) for begin in begins] == list(range(first_block, 11, 3))
