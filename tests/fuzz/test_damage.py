"""A short look at what `make fuzz` looks at for long: the corpus, damaged at random, brings nothing but refusals."""

from functools import lru_cache

import pytest
from fuzz.targets import TARGETS, WORDS, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

seeds = lru_cache(seeds)


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    content = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 4))] = draw(
            st.binary(max_size=3) | st.sampled_from(WORDS).map(str.encode)
        )
    return bytes(content)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_taken_or_refused(name: str) -> None:
    @settings(max_examples=150)
    @given(damaged(name))
    def attack(data: bytes) -> None:
        TARGETS[name](data)

    attack()
