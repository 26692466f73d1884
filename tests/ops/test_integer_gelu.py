"""Integer activations are those that whole numbers give by hand, and near the exact ones."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lightning_compress.ops.integer_gelu import FUNCTIONS, integer_gelu
from lightning_compress.ops.integer_gelu.reference import LIMITS, interpolated, table

OPERATOR = torch.ops.lightning_compress.integer_gelu.default
EXACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
CURVED = [function for function in FUNCTIONS if function != "relu"]


def int32(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def correction(x: float, function: str) -> float:
    """By how much the function is under relu at x >= 0, as its definition says."""
    if x >= LIMITS[function]:
        return 0.0
    if function == "gelu":
        return x - x * (1 + math.erf(x / math.sqrt(2))) / 2
    if function == "gelu_tanh":
        return x - x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x - x / (1 + math.exp(-x))


def slowly(x: int, exponent: int, function: str) -> Fraction:
    """One number, in fractions: on the straight line between two entries of the table."""
    if function == "relu":
        return max(Fraction(x) * Fraction(2) ** exponent, Fraction(0))
    fixed = Fraction(x) * Fraction(2) ** exponent
    if exponent < -15:
        fixed = Fraction(round(fixed * 2**15), 2**15)
    cell = math.floor(abs(fixed) * 64)
    left, right = (round(correction(k / 64, function) * 2**15) for k in (cell, cell + 1))
    line = left + round((right - left) * (abs(fixed) * 64 - cell))
    unit = Fraction(2) ** max(exponent - 15, -15)
    return max(fixed, Fraction(0)) - round(Fraction(line, 2**15) / unit) * unit


def test_a_row_is_what_a_hand_gives():
    # gelu(1) = 0.841345: 0.158655 * 2^15 = 5198.8 is in the table, 1/64 below it 5071 (correction(63/64) = 0.15786)
    found, exponent = integer_gelu(int32([[-1, 1, 4, -4]]), int32([0]), "gelu")
    assert found.tolist() == [[-5199, 32768 - 5199, 4 * 32768, 0]] and exponent.tolist() == [-15]


def test_between_two_entries_there_is_a_straight_line():
    entries = table("gelu", torch.device("cpu"))
    assert entries[:2].tolist() == [0, 253]  # 2^-6 * (1 - 0.506233) * 2^15 = 252.8
    found, _ = integer_gelu(int32([[0, 1, 3, 4, -1, -3]]), int32([-8]), "gelu")
    # quarters of 253 are 63.25 and 189.75; x itself is 128 a step
    assert found.tolist() == [[0, 128 - 63, 384 - 190, 512 - 253, -63, -190]]


def test_relu_is_exact_and_keeps_its_exponent():
    value, exponent = int32([[-3, 0, 5]]), int32([-77])
    found = integer_gelu(value, exponent, "relu")
    assert found[0].tolist() == [[0, 0, 5]] and found[1].tolist() == [-77]
    assert found[0].data_ptr() != value.data_ptr() and found[1].data_ptr() != exponent.data_ptr()


@pytest.mark.parametrize("function", CURVED)
def test_the_table_has_no_more_digits_than_sixteen_and_ends_in_zero(function: str):
    entries, lines = table(function, torch.device("cpu")), interpolated(function, torch.device("cpu"))
    assert len(entries) == LIMITS[function] * 64 + 2 and entries[-2:].tolist() == [0, 0]
    assert int(entries.min()) >= 0 and int(entries.max()) < 2**15
    assert torch.equal(lines[:: 2**9], entries[:-1])


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(-45, 30), st.integers(0, 15)), max_size=4),
    num_columns=st.integers(0, 5),
    function=st.sampled_from(FUNCTIONS),
    data=st.data(),
)
def test_it_equals_a_slow_loop(
    rows: list[tuple[int, int]], num_columns: int, function: str, data: st.DataObject
):
    values = [
        [data.draw(st.integers(-(2**digits) + 1, 2**digits - 1)) for _ in range(num_columns)]
        for _, digits in rows
    ]
    exponents = [exponent for exponent, _ in rows]
    found, exponent = integer_gelu(int32(values).view(len(rows), num_columns), int32(exponents), function)
    expected = [[slowly(x, e, function) for x in row] for row, e in zip(values, exponents, strict=True)]
    held = [
        [x * Fraction(2) ** e for x in row] for row, e in zip(found.tolist(), exponent.tolist(), strict=True)
    ]
    assert held == expected
    assert all(float(x) == torch.tensor(float(x)).item() for row in held for x in row)  # fp32 holds it


@pytest.mark.parametrize("function", CURVED)
@pytest.mark.parametrize("exponent", [-15, -12, -3, 0, 4])
def test_the_error_is_as_small_as_is_said(function: str, exponent: int):
    value = torch.arange(-(2**15) + 1, 2**15, dtype=torch.int32)[None]
    found, unit = integer_gelu(value, int32([exponent]), function)
    exact = EXACT[function](value.double() * 2.0**exponent)
    error = (found * 2.0 ** unit.double() - exact).abs()
    inside = value.double().abs() * 2.0**exponent < LIMITS[function] - 1 / 64
    digits = 2.0 ** (max(exponent, 0) - 16)  # of the last rounding
    assert float(error[inside].max()) < 6e-5 + digits
    assert float(error.max()) < 1.6e-4 + digits


def test_what_is_finer_than_the_table_is_rounded_to_it():
    value = torch.arange(-(2**15) + 1, 2**15, 7, dtype=torch.int32)[None]
    for exponent in (-16, -20, -40):
        found, unit = integer_gelu(value, int32([exponent]), "silu")
        exact = F.silu(value.double() * 2.0**exponent)
        assert unit.tolist() == [-15]
        assert float((found * 2.0**-15 - exact).abs().max()) < 6e-5 + 2.0**-15


def test_many_rows_are_computed_in_pieces_and_any_strides_are_fine():
    value = torch.randint(-(2**15) + 1, 2**15, (300, 1400), dtype=torch.int32)
    exponent = torch.randint(-20, 3, (300,), dtype=torch.int32)
    found, unit = integer_gelu(value, exponent)
    for row in (0, 92, 93, 94, 299):
        one = slice(row, row + 1)
        assert torch.equal(integer_gelu(value[one], exponent[one])[0], found[one])
    turned, units = integer_gelu(value.t().contiguous().t(), exponent)
    assert torch.equal(turned, found) and torch.equal(units, unit) and turned.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3, 5)])
@pytest.mark.parametrize("function", ["gelu", "relu"])
def test_torch_finds_nothing_wrong_with_the_operator(shape: tuple[int, int], function: str):
    value = torch.randint(-99, 99, shape, dtype=torch.int32)
    opcheck(OPERATOR, (value, torch.full(shape[:1], -5, dtype=torch.int32), function))


def test_it_compiles_into_one_graph():
    compiled = torch.compile(integer_gelu, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 5):
        value, exponent = (
            torch.randint(-9, 9, (rows, 4), dtype=torch.int32),
            torch.zeros(rows, dtype=torch.int32),
        )
        for found, expected in zip(compiled(value, exponent), integer_gelu(value, exponent), strict=True):
            assert torch.equal(found, expected)


def test_another_function_is_refused():
    with pytest.raises(ValueError, match="function='tanh' is not one of gelu, gelu_tanh, silu, relu"):
        integer_gelu(int32([[1]]), int32([0]), "tanh")
