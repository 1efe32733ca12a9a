"""Memory for whole tensors: what is freed serves again, and never makes the whole take more than it may."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.buffers import WholeTensors

PAGE = 4096


def test_the_next_tensor_of_a_size_gets_the_memory_of_one_that_was_freed():
    tensors = WholeTensors((PAGE, PAGE), keep_within_nbytes=PAGE)
    tensors.get(0)[:4] = b"used"
    tensors.free([0])
    assert tensors.nbytes == (0, PAGE)
    assert tensors.get(1)[:4] == b"used"
    assert tensors.nbytes == (PAGE, 0)


def test_a_tensor_of_another_size_gets_memory_of_its_own_and_the_smallest_that_is_kept_makes_room():
    tensors = WholeTensors((PAGE, 2 * PAGE, 3 * PAGE), keep_within_nbytes=5 * PAGE)
    tensors.get(0)[:4] = tensors.get(1)[:4] = b"used"
    tensors.free([0, 1])
    assert tensors.get(2)[:4] == bytes(4)
    assert tensors.nbytes == (3 * PAGE, 2 * PAGE)


def test_nothing_is_kept_where_nothing_may_be():
    tensors = WholeTensors((PAGE,))
    tensors.get(0)
    tensors.free([0])
    assert tensors.nbytes[1] == 0


def test_where_the_system_has_no_memory_for_a_tensor_that_is_what_is_said():
    tensors = WholeTensors((1 << 60,))
    with pytest.raises(MemoryError, match="1152921504606846976 bytes could not be mapped"):
        tensors.get(0)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40),
    st.integers(0, 12),
)
def test_keeping_never_takes_more_than_the_tensors_or_what_it_may(pages, actions, may_keep_pages):
    tensors = WholeTensors(tuple(PAGE * count for count in pages), PAGE * may_keep_pages)
    alive = set()
    for is_freed, number in actions:
        buffer = number % len(pages)
        if is_freed:
            tensors.free([buffer])
            alive.discard(buffer)
        else:
            assert len(tensors.get(buffer)) == PAGE * pages[buffer]
            alive.add(buffer)
        there, kept = tensors.nbytes
        assert there == PAGE * sum(pages[buffer] for buffer in alive)
        assert there + kept <= max(there, PAGE * may_keep_pages)
