"""Expressions: which are one, and which there are none of."""

import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
from source_files import FACTORS, FILES

from planner.expr import (
    AddLowRank,
    Concat,
    DType,
    Expr,
    Opaque,
    Read,
    Shape,
    Slice,
    SourceFile,
    add_low_rank,
    add_noise,
    cast,
    mean,
    rows,
    scale,
    stack,
)


def test_the_mean_of_one_tensor_is_that_tensor() -> None:
    x = Read(FILES[0], 8, DType.F16, (4, 4))
    assert mean([x, x, x]) is x


def test_what_is_no_mean_of_ranges_of_one_shape_is_refused() -> None:
    x = Read(FILES[0], 8, DType.F32, (4, 4))
    with pytest.raises(ValueError, match="of one shape"):
        mean([x, Read(FILES[1], 8, DType.F32, (2, 8))])
    with pytest.raises(ValueError, match="no more than averaged and cast"):
        Opaque("layer", "", (), DType.F32, (4,), weights=(scale(x, 0.5),))


def test_equal_expressions_are_one_node() -> None:
    same_file = SourceFile(1, 0, 1 << 40, 0, "/models/0")
    first = scale(Read(FILES[0], 8, DType.F16, (2, 2)), 0.5)
    assert first is scale(Read(same_file, 8, DType.F16, (2, 2)), 0.5)
    assert first is not scale(Read(FILES[0], 8, DType.F16, (2, 2)), 0.25)
    assert math.prod(first.shape) == first.numel == 4


def test_equal_expressions_of_several_threads_are_one_node() -> None:
    """Or plans that are made beside each other would read things twice, and not be those of another time."""
    together = Barrier(2)

    def nodes() -> list[Expr]:
        together.wait()
        return [scale(Read(FILES[0], 8 * number, DType.F16, (4,)), 0.5) for number in range(20_000)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            first, second = (made.result() for made in [threads.submit(nodes) for _ in range(2)])
    finally:
        sys.setswitchinterval(before)
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_nothing_is_done_to_what_is_rounded() -> None:
    rounded = cast(Read(FILES[0], 8, DType.F32, (8, 4)), DType.BF16)
    b, a = (Read(FACTORS, 8, DType.F32, shape) for shape in ((8, 2), (2, 4)))
    for more in (lambda: scale(rounded, 0.5), lambda: cast(rounded, DType.F16), lambda: add_low_rank(rounded, b, a, 1)):
        with pytest.raises(ValueError, match="arithmetic comes before rounding"):
            more()


def test_what_is_strung_together_is_of_one_dtype_and_fills_its_shape() -> None:
    x = Read(FILES[0], 8, DType.F32, (8, 4))
    with pytest.raises(ValueError, match="of one dtype"):
        stack([x, cast(x, DType.BF16)])
    with pytest.raises(ValueError, match="do not fill the shape"):
        Concat((x, x), (3, 8, 4))


def test_rows_are_had_of_what_is_no_more_than_averaged_and_cast() -> None:
    x = add_noise(Read(FILES[0], 8, DType.F32, (8, 4)), 0.1, seed=1)
    assert rows(x, 0, 8) is x
    with pytest.raises(TypeError, match="no rows to be had of Elementwise"):
        rows(x, 0, 1)


@pytest.mark.parametrize(
    ("b", "a"), [((7, 2), (2, 5)), ((8, 2), (3, 4)), ((8, 0), (0, 4)), ((4, 2), (2, 8)), ((8, 2), (2, 2, 2))]
)
def test_factors_that_do_not_make_a_matrix_of_the_shape_are_refused(b: Shape, a: Shape) -> None:
    x = Read(FILES[0], 8, DType.F32, (8, 4))
    with pytest.raises(ValueError, match=r"is not|cannot be multiplied"):
        add_low_rank(x, Read(FACTORS, 8, DType.F32, b), Read(FACTORS, 8, DType.F32, a), 1.0)


def test_a_factor_must_be_float32_and_be_read_from_a_file() -> None:
    x, b, a = (Read(FILES[0], 8, DType.F32, shape) for shape in ((8, 4), (8, 2), (2, 4)))
    for factor in (cast(b, DType.BF16), Opaque("kernel", "", (), DType.F32, (8, 2)), mean([b, replace(b, offset=80)])):
        with pytest.raises(ValueError, match="must be float32, and made elementwise of a Read"):
            AddLowRank(x, factor, a)


def test_a_slice_lies_within_the_result_that_it_is_of() -> None:
    result = Opaque("kernel", "", (), DType.F32, (8, 4))
    assert Slice(result, 28, (1, 4)).numel == 4
    for begin, shape in ((-1, (4,)), (29, (4,)), (0, (9, 4))):
        with pytest.raises(ValueError, match="does not lie within"):
            Slice(result, begin, shape)
