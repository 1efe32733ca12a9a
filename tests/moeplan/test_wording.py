"""How numbers are written for people."""

import pytest

from moeplan.wording import runs


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2, 7], "0-2, 7"), ([1, 3, 4, 6, 7, 8], "1, 3-4, 6-8")],
)
def test_numbers_in_a_row_are_named_by_the_first_and_the_last(numbers, text):
    assert runs(numbers) == text
