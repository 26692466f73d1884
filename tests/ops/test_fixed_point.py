"""Rows of integers are the nearest to their floats, shifts round half to even, and roots are exact."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.ops.fixed_point import (
    align_rows,
    bit_length,
    check_rows,
    held_in_floats,
    integer_sqrt,
    power_of_two,
    row_pieces,
    shift_right,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def aligned_slowly(row: list[float], bits: int) -> tuple[list[int], int]:
    """In fractions, looking for the exponent one by one."""
    largest = max(abs(Fraction(x)) for x in row)
    if largest == 0:
        return [0] * len(row), -32
    exponent = -126
    while largest > (2 ** (bits - 1) - 1) * Fraction(2) ** exponent:
        exponent += 1
    return [round(Fraction(x) / Fraction(2) ** exponent) for x in row], exponent


def test_a_row_gets_the_smallest_exponent_with_which_it_fits():
    x = torch.tensor([[127.0, 1.5], [127.5, 2.5], [0.0, -0.0], [-128.0, 1.0]])
    value, exponent = align_rows(x, bits=8)
    assert exponent.tolist() == [0, 1, -32, 1]
    assert value.tolist() == [[127, 2], [64, 1], [0, 0], [-64, 0]]  # 63.75, 1.25 and 0.5 are rounded
    assert (value.dtype, exponent.dtype) == (torch.int32, torch.int32)


@settings(deadline=None, max_examples=150)
@given(
    row=st.lists(
        FLOATS
        | st.floats(-8, 8, width=32)
        | st.sampled_from([0.0, 1.5 * 2.0**127, 2.0**-149, 32767.0, 32767.5]),
        min_size=1,
        max_size=6,
    ),
    bits=st.sampled_from([8, 15, 16, 24, 25, 26, 31]),
)
def test_rows_are_aligned_as_fractions_say(row: list[float], bits: int):
    value, exponent = align_rows(torch.tensor([row]), bits)
    assert (value[0].tolist(), int(exponent)) == aligned_slowly(row, bits)


def test_rows_without_columns_and_no_rows_are_aligned():
    value, exponent = align_rows(torch.zeros(2, 0), 16)
    assert value.shape == (2, 0) and exponent.tolist() == [-32, -32]
    assert align_rows(torch.zeros(0, 3), 16)[1].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_aligned_as_their_fp32(dtype: torch.dtype):
    x = torch.randn(5, 7).to(dtype)
    for found, expected in zip(align_rows(x, 16), align_rows(x.float(), 16), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_no_integers_hold_is_refused(number: float):
    with pytest.raises(ValueError, match="inf or NaN"):
        align_rows(torch.tensor([[1.0, number], [0.0, 2.0]]), 16)


@pytest.mark.parametrize("bits", [7, 32])
def test_other_numbers_of_bits_are_refused(bits: int):
    with pytest.raises(ValueError, match=rf"bits={bits} is not in \[8, 31\]"):
        align_rows(torch.zeros(1, 1), bits)


def test_floats_hold_integers_at_any_exponent():
    exponent = torch.tensor([-126, -1, 0, 103], dtype=torch.int32)
    value = torch.tensor([[1], [-3], [2**24], [2**24 - 1]], dtype=torch.int32)
    expected = [[2.0**-126], [-1.5], [2.0**24], [(2.0**24 - 1) * 2.0**103]]
    assert held_in_floats(value, exponent).tolist() == expected
    every = torch.arange(-126, 128)
    assert power_of_two(every).tolist() == [2.0**e for e in range(-126, 128)]


@settings(deadline=None, max_examples=150)
@given(
    pairs=st.lists(
        st.tuples(st.integers(-(2**30) + 1, 2**30 - 1), st.integers(0, 60)), min_size=1, max_size=8
    ),
    is_long=st.booleans(),
    factor=st.integers(1, 2**31),
)
def test_shifts_round_half_to_even(pairs: list[tuple[int, int]], is_long: bool, factor: int):
    numbers, counts = zip(*pairs, strict=True)
    numbers = [number * factor for number in numbers] if is_long else list(numbers)
    value = torch.tensor(numbers, dtype=torch.int64 if is_long else torch.int32)
    expected = [round(Fraction(v, 2**n)) for v, n in zip(numbers, counts, strict=True)]
    found = shift_right(value, torch.tensor(counts, dtype=torch.int32))
    assert found.tolist() == expected and found.dtype == value.dtype
    assert [int(shift_right(value[i], n)) for i, n in enumerate(counts)] == expected


def test_digits_are_counted():
    numbers = [0, 1, 2, 3, 2**31, 2**32 - 1, 2**61 - 1, 2**62 - 1]
    assert bit_length(torch.tensor(numbers)).tolist() == [number.bit_length() for number in numbers]


@settings(deadline=None, max_examples=150)
@given(
    root=st.integers(math.isqrt(2**59) + 1, 2**31 - 1),
    away=st.integers(-1, 1),
    other=st.integers(2**59, 2**62 - 1),
)
def test_roots_are_exact(root: int, away: int, other: int):
    numbers = [root * root + away, other, 2**59, 2**62 - 1]
    assert integer_sqrt(torch.tensor(numbers)).tolist() == [math.isqrt(number) for number in numbers]


@pytest.mark.parametrize("shape", [(0, 4), (5, 0), (1, 2**18), (700, 300)])
def test_pieces_are_all_rows_in_their_order(shape: tuple[int, int]):
    rows = torch.arange(shape[0])
    pieces = [rows[piece] for piece in row_pieces(torch.empty(shape))]
    assert torch.equal(torch.cat([rows[:0], *pieces]), rows)
    assert all(0 < len(piece) * shape[1] <= max(2**17, shape[1]) for piece in pieces if shape[1])


def test_what_is_no_rows_of_integers_is_refused():
    value, exponent = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    check_rows(value, exponent)
    with pytest.raises(TypeError, match=r"value_RC is torch\.float32: give int32"):
        check_rows(value.float(), exponent)
    with pytest.raises(TypeError, match=r"exponent_R is torch\.int64: give int32"):
        check_rows(value, exponent.long())
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\): give \[R, C\] and \[R\]"):
        check_rows(value, exponent[:, None])
    with pytest.raises(ValueError, match="one exponent for each row"):
        check_rows(value, exponent[:1])
    with pytest.raises(ValueError, match="values are on cpu, exponents on meta"):
        check_rows(value, exponent.to("meta"))
