"""Integer probabilities are those that whole numbers give by hand, and near the exact ones."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lightning_compress.ops.integer_softmax import (
    MAX_COLUMNS,
    integer_softmax,
    integer_softmax_by_row,
    softmax_factor,
)

OPERATOR = torch.ops.lightning_compress.integer_softmax.default


def int32(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def slowly(
    row: list[int], exponent: int, factor: int, seen: list[bool], by_row: bool = False
) -> tuple[list[int], int]:
    """One number after the other, in whole numbers and fractions."""
    weights = [0] * len(row)
    if not any(seen):
        return weights, -8
    largest = max(x for x, sees in zip(row, seen, strict=True) if sees)
    for i, x in enumerate(row):
        steps = round(Fraction((largest - x) * factor) * Fraction(2) ** (exponent - 15 + 8))
        if seen[i] and steps < 17 * 256:
            weights[i] = round(Fraction(round(2**15 * 2 ** -((steps % 256) / 256)), 2 ** (steps // 256)))
    digits = 46 if by_row else 31
    shares = [Fraction(weight * (2**digits // sum(weights)), 2**digits) for weight in weights]
    unit = -8
    while by_row and max(shares) < Fraction(2) ** (unit + 7):  # the largest is to take 8 bits
        unit -= 1
    return [min(round(share / Fraction(2) ** unit), 255) for share in shares], unit


def test_a_row_is_what_a_hand_gives():
    # a quarter of a power of two: 2^-0.25 is 27554 / 2^15; the sum is 60322 and its inverse 35600
    # 32768 * 35600 / 2^23 = 139.06, 27554 * 35600 / 2^23 = 116.93
    assert integer_softmax(int32([[0, -1]]), int32([-2]), 2**15).tolist() == [[139, 117]]
    # with e instead of 2: e^-1 is 2^-1.4427, 369 steps, 12065 / 2^15; 44833 -> 47899: 187.1 and 68.9
    assert integer_softmax(int32([[5, 4]]), int32([0]), softmax_factor(1.0)).tolist() == [[187, 69]]


def test_all_of_the_probability_is_255():
    assert integer_softmax(int32([[7], [-7]]), int32([0, 3]), 1000).tolist() == [[255], [255]]


def test_equal_logits_get_equal_shares():
    for count, share in ((2, 128), (3, 85), (100, 3), (500, 1), (511, 0)):
        value = torch.full((1, count), -(2**29), dtype=torch.int32)
        assert integer_softmax(value, int32([9]), 5909).tolist() == [[share] * count]


def test_what_is_not_seen_gets_nothing_and_counts_for_nothing():
    value, exponent = int32([[9, 1, 2], [1, 5, 5]]), int32([0, 0])
    seen = torch.tensor([[False, True, True], [False, False, False]])
    found = integer_softmax(value, exponent, 4000, seen)
    assert found[:1, 1:].tolist() == integer_softmax(value[:1, 1:], exponent[:1], 4000).tolist()
    assert found[0, 0] == 0 and found[1].tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=150)
@given(
    num_columns=st.integers(1, 7),
    num_rows=st.integers(0, 3),
    scale=st.sampled_from([1e-3, 0.125, 1.0, 2.0]),
    data=st.data(),
)
def test_it_equals_a_slow_loop(num_columns: int, num_rows: int, scale: float, data: st.DataObject):
    largest = st.sampled_from([0, 3, 1000, 2**30 - 1]).flatmap(lambda most: st.integers(-most, most))
    rows = data.draw(
        st.lists(
            st.lists(largest, min_size=num_columns, max_size=num_columns),
            min_size=num_rows,
            max_size=num_rows,
        )
    )
    exponents = data.draw(st.lists(st.integers(-40, 40), min_size=num_rows, max_size=num_rows))
    seen = [[data.draw(st.booleans()) for _ in row] for row in rows]
    value, exponent = int32(rows).view(num_rows, num_columns), int32(exponents)
    factor = softmax_factor(scale)
    mask = torch.tensor(seen, dtype=torch.bool).view(num_rows, num_columns)
    arguments = list(zip(rows, exponents, [factor] * num_rows, seen, strict=True))
    assert integer_softmax(value, exponent, factor, mask).tolist() == [slowly(*row)[0] for row in arguments]
    everything = [slowly(*row[:3], [True] * num_columns)[0] for row in arguments]
    assert integer_softmax(value, exponent, factor).tolist() == everything
    found, unit = integer_softmax_by_row(value, exponent, factor, mask)
    expected = [slowly(*row, by_row=True) for row in arguments]
    assert list(zip(found.tolist(), unit.tolist(), strict=True)) == expected


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 300.0])
@pytest.mark.parametrize("width", [1, 2, 63, 512])
def test_probabilities_are_within_a_step_of_the_exact_ones(spread: float, width: int):
    logits = torch.randn(50, width) * spread
    value = (logits * 2**15).round().int()
    found = integer_softmax(value, torch.full((50,), -15, dtype=torch.int32), softmax_factor(1.0)) / 256
    exact = (value.double() / 2**15).softmax(-1)
    # half a step of rounding, 255 for 1, 0.14 % for the table and 1 / 2^16 for the inverse
    bound = torch.where(exact > 255 / 256, 1.0, 0.5) / 256 + 0.0028 * exact + 2**-16
    assert bool(((found - exact).abs() <= bound).all())


@pytest.mark.parametrize("width", [1, 2, 3, 511, 512, 5000])
def test_by_row_equal_logits_keep_their_digits(width: int):
    value = torch.zeros(1, width, dtype=torch.int32)
    found, unit = integer_softmax_by_row(value, int32([0]), 5909)
    assert found.unique().numel() == 1 and int(found[0, 0]) >= 128
    assert int(found[0, 0]) * 2.0 ** int(unit) == pytest.approx(1 / width, rel=1 / 255)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 300.0])
@pytest.mark.parametrize("width", [1, 2, 63, 512, 3000])
def test_by_row_probabilities_are_within_a_256th_of_the_largest(spread: float, width: int):
    logits = torch.randn(50, width) * spread
    value = (logits * 2**15).round().int()
    rows = integer_softmax_by_row(value, torch.full((50,), -15, dtype=torch.int32), softmax_factor(1.0))
    found = rows[0] * 2.0 ** rows[1][:, None]
    exact = (value.double() / 2**15).softmax(-1)
    largest = exact.amax(1, keepdim=True)
    # as above; the last digits of weights are 2^-15 of the largest each, and sums of them are up to the width
    bound = (
        torch.where(exact > 255 / 256, 1.0, 0.5) * largest / 128
        + (0.0028 + width * 2.0**-16 * largest) * exact
    )
    assert bool(((found - exact).abs() <= bound + 2.0**-15 * largest).all())


def test_many_rows_are_computed_in_pieces_and_any_strides_are_fine():
    value = torch.randint(-(2**20), 2**20, (300, 1400), dtype=torch.int32)
    exponent, seen = torch.randint(-22, -16, (300,), dtype=torch.int32), torch.rand(300, 1400) < 0.7
    found = integer_softmax(value, exponent, 5909, seen)
    for row in (0, 92, 93, 94, 299):
        one = slice(row, row + 1)
        assert torch.equal(integer_softmax(value[one], exponent[one], 5909, seen[one]), found[one])
    turned = integer_softmax(value.t().contiguous().t(), exponent, 5909, seen.t().contiguous().t())
    assert torch.equal(turned, found) and turned.is_contiguous()
    by_row = integer_softmax_by_row(value, exponent, 5909, seen)
    for row in (0, 93, 299):
        one = slice(row, row + 1)
        for ours, theirs in zip(
            integer_softmax_by_row(value[one], exponent[one], 5909, seen[one]), by_row, strict=True
        ):
            assert torch.equal(ours, theirs[one])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3, 5)])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_torch_finds_nothing_wrong_with_the_operator(shape: tuple[int, int], is_masked: bool, by_row: bool):
    value = torch.randint(-9, 9, shape, dtype=torch.int32)
    seen = torch.rand(shape) < 0.5 if is_masked else None
    opcheck(OPERATOR, (value, torch.zeros(shape[0], dtype=torch.int32), seen, 5909, by_row))


def test_it_compiles_into_one_graph():
    compiled = torch.compile(integer_softmax, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 5):
        value, exponent = (
            torch.randint(-9, 9, (rows, 4), dtype=torch.int32),
            torch.zeros(rows, dtype=torch.int32),
        )
        assert torch.equal(compiled(value, exponent, 5909), integer_softmax(value, exponent, 5909))


def test_wrong_arguments_are_named():
    value, exponent = int32([[1, 2]]), int32([0])
    with pytest.raises(TypeError, match=r"seen_RC is torch\.int32: give bool"):
        integer_softmax(value, exponent, 5, value)
    with pytest.raises(ValueError, match=r"the mask is \(1, 1\) on cpu, the logits are\s+\(1, 2\)"):
        integer_softmax(value, exponent, 5, value[:, :1] > 0)
    with pytest.raises(ValueError, match="factor=0 is not in"):
        integer_softmax(value, exponent, 0)
    with pytest.raises(ValueError, match="65537 columns"):
        integer_softmax(torch.zeros(1, MAX_COLUMNS + 1, dtype=torch.int32), exponent, 5)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-5, 2.1, math.nan, math.inf])
def test_a_scale_that_fifteen_digits_do_not_hold_is_refused(scale: float):
    with pytest.raises(ValueError, match="is not in"):
        softmax_factor(scale)
