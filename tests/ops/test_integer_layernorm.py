"""Integer norms are those that whole numbers give by hand, and near the exact ones."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lightning_compress.ops.integer_layernorm import (
    MAX_COLUMNS,
    FixedPointAffine,
    fixed_point_affine,
    integer_layernorm,
)

OPERATOR = torch.ops.lightning_compress.integer_layernorm.default


def int32(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def slowly(
    row: list[int], exponent: int, affine: FixedPointAffine, eps: float, is_centred: bool
) -> list[int]:
    """One row, in whole numbers of any size: 7 digits after the point of the mean, 16 after that of the result."""
    width = len(row)
    mean = round(Fraction(sum(row) * round(2**46 / width), 2**39)) if is_centred else 0
    rest = [x * 2**7 - mean for x in row]
    digits, power = math.frexp(width * eps)
    digits, left = round(digits * 2**24), power - 24 + 14 - 2 * exponent
    pairs = max((left - 35) // 2, 0) if eps else 0
    total = round(Fraction(sum(x * x for x in rest), 4**pairs)) + round(
        digits * Fraction(2) ** (left - 2 * pairs)
    )
    total = max(total, 1)
    doubled = (62 - total.bit_length()) // 2
    inverse = (round(math.sqrt(width) * 2**16) << 36) // math.isqrt(total << 2 * doubled)
    result = []
    for i, x in enumerate(rest):
        normal = round(Fraction(x * inverse) / Fraction(2) ** (36 - doubled + pairs))
        scaled = round(Fraction(normal * int(affine.gamma_C[i]), 2**affine.shift))
        result.append(scaled + (int(affine.beta_C[i]) if affine.beta_C is not None else 0))
    return result


def test_a_row_is_what_a_hand_gives():
    # mean 2, deviation 1: -1 and 1; gamma 1 and 1/2, beta 0 and 3
    affine = fixed_point_affine(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 3.0]))
    found, exponent = integer_layernorm(int32([[1, 3], [5, 5]]), int32([0, 9]), affine, eps=0.0)
    assert (found * 2.0 ** exponent[:, None]).tolist() == [[-1.0, 3.5], [0.0, 3.0]]
    # root mean square of 3 and 4: sqrt(12.5); 3 / 3.535534 = 0.848528, times 2^16 55609.1; 4 gives 74145.5
    plain = FixedPointAffine(torch.tensor([1, 1], dtype=torch.int16), None, 0, -16)
    found, exponent = integer_layernorm(int32([[3, 4]]), int32([-7]), plain, eps=0.0, is_centred=False)
    assert found.tolist() == [[55609, 74146]] and exponent.tolist() == [-16]


def test_eps_counts_in_the_unit_of_the_row():
    plain = FixedPointAffine(torch.tensor([1, 1], dtype=torch.int16), None, 0, -16)
    value = int32([[-1, 1]] * 3)
    found, _ = integer_layernorm(value, int32([0, -1, 1]), plain, eps=1.0)
    # variances 1, 1/4 and 4: 1 / sqrt(2), 0.5 / sqrt(1.25) and 2 / sqrt(5), times 2^16
    assert found[:, 1].tolist() == [46341, 29309, 58617]
    assert torch.equal(found[:, 0], -found[:, 1])


@pytest.mark.parametrize("gamma", [1.0, 0.0, 1e-30, 1e30])
@pytest.mark.parametrize("beta", [None, 0.0, 1.0, -1e-30, 1e30])
def test_weights_of_any_size_become_integers(gamma: float, beta: float | None):
    weight = torch.tensor([gamma, -gamma / 3, 0.0])
    bias = None if beta is None else torch.tensor([beta, beta / 7, 0.0])
    affine = fixed_point_affine(weight, bias)
    value = int32([[5, -1, 100], [-32767, 32767, 0]])
    found, exponent = integer_layernorm(value, int32([0, 0]), affine, eps=0.0)
    exact = F.layer_norm(value.double(), (3,), weight.double(), None if bias is None else bias.double(), 0.0)
    largest = math.sqrt(3) * gamma + abs(beta or 0.0)
    assert (affine.gamma_C.dtype, found.dtype) == (torch.int16, torch.int32)
    assert int(found.abs().max()) < 2**23 and affine.shift >= 0
    assert float((found * 2.0 ** exponent[:, None].double() - exact).abs().max()) <= 1e-4 * largest


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(st.tuples(st.integers(-80, 60), st.integers(0, 15)), max_size=3),
    num_columns=st.integers(1, 6),
    eps=st.sampled_from([0.0, 1e-12, 1e-5, 1.0]),
    is_centred=st.booleans(),
    has_bias=st.booleans(),
    data=st.data(),
)
def test_it_equals_a_slow_loop(
    rows: list[tuple[int, int]],
    num_columns: int,
    eps: float,
    is_centred: bool,
    has_bias: bool,
    data: st.DataObject,
):
    values = []
    for _, digits in rows:
        most = 2**digits - 1
        constant = data.draw(st.none() | st.integers(-most, most))
        values.append(
            [
                data.draw(st.integers(-most, most)) if constant is None else constant
                for _ in range(num_columns)
            ]
        )
    exponents = [exponent for exponent, _ in rows]
    affine = fixed_point_affine(torch.randn(num_columns), torch.randn(num_columns) if has_bias else None)
    value = int32(values).view(len(rows), num_columns)
    found, exponent = integer_layernorm(value, int32(exponents), affine, eps, is_centred)
    expected = [slowly(row, e, affine, eps, is_centred) for row, e in zip(values, exponents, strict=True)]
    assert found.tolist() == expected
    assert exponent.tolist() == [affine.exponent] * len(rows)


@pytest.mark.parametrize("width", [1, 2, 31, 384, 5000])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5])
@pytest.mark.parametrize("outlier", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("is_centred", [True, False])
def test_the_error_is_as_small_as_is_said(width: int, eps: float, outlier: float, is_centred: bool):
    x = torch.randn(40, width, dtype=torch.float64)
    x[:, 0] *= outlier
    value = (x / x.abs().amax(1, keepdim=True) * 32767).round().int()
    exponent = torch.arange(-40, 0, dtype=torch.int32)
    weight, bias = torch.randn(width), torch.randn(width)
    affine = fixed_point_affine(weight, bias)
    found, unit = integer_layernorm(value, exponent, affine, eps, is_centred)
    same = value.double() * 2.0 ** exponent[:, None].double()
    if not is_centred:
        rms = (same.square().mean(1, keepdim=True) + eps).sqrt()
        normal = same / rms if eps else torch.nan_to_num(same / rms)
    else:
        normal = F.layer_norm(same, (width,), eps=eps) if width > 1 else torch.zeros_like(same)
    error = (found * 2.0 ** unit[:, None].double() - (normal * weight + bias)).abs()
    # mean and digits of the normalised number, of gamma, of the root, and of the result
    deviation = value.double().std(1, correction=0, keepdim=True).clamp(min=1)
    bound = (2.0**-8 / deviation + 2.0**-17 + 2.0**-19 * normal.abs()) * weight.abs()
    bound = bound + 2.0**-15 * weight.abs().max() * normal.abs() + 2.0**affine.exponent
    assert bool((error <= bound).all())


def test_wide_rows_do_not_overflow():
    value = torch.full((3, MAX_COLUMNS), 32767, dtype=torch.int32)
    value[0, ::2] = -32767
    value[1, 0] = -32767
    affine = fixed_point_affine(torch.ones(MAX_COLUMNS))
    found, exponent = integer_layernorm(value, int32([0, 0, 0]), affine)
    normal = found * 2.0 ** exponent[:, None]
    assert normal[0].unique().tolist() == pytest.approx([-1.0, 1.0], abs=1e-4)
    assert normal[1, 0].item() == pytest.approx(-256.0, rel=1e-4)
    assert not normal[2].any()


def test_many_rows_are_computed_in_pieces_and_any_strides_are_fine():
    value = torch.randint(-(2**15) + 1, 2**15, (300, 1400), dtype=torch.int32)
    exponent, affine = torch.randint(-20, 3, (300,), dtype=torch.int32), fixed_point_affine(torch.randn(1400))
    found, unit = integer_layernorm(value, exponent, affine)
    for row in (0, 92, 93, 94, 299):
        one = slice(row, row + 1)
        assert torch.equal(integer_layernorm(value[one], exponent[one], affine)[0], found[one])
    turned, units = integer_layernorm(value.t().contiguous().t(), exponent, affine)
    assert torch.equal(turned, found) and torch.equal(units, unit) and turned.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3, 5)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_torch_finds_nothing_wrong_with_the_operator(shape: tuple[int, int], has_bias: bool):
    value = torch.randint(-99, 99, shape, dtype=torch.int32)
    gamma = torch.ones(shape[1], dtype=torch.int16)
    beta = torch.ones(shape[1], dtype=torch.int32) if has_bias else None
    exponent = torch.full(shape[:1], -5, dtype=torch.int32)
    opcheck(OPERATOR, (value, exponent, gamma, beta, 8, -20, 1e-5, has_bias))


def test_it_compiles_into_one_graph():
    affine = fixed_point_affine(torch.randn(4), torch.randn(4))
    compiled = torch.compile(integer_layernorm, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 5):
        value, exponent = (
            torch.randint(-9, 9, (rows, 4), dtype=torch.int32),
            torch.zeros(rows, dtype=torch.int32),
        )
        expected = integer_layernorm(value, exponent, affine, 1e-5)
        for ours, theirs in zip(compiled(value, exponent, affine, 1e-5), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_wrong_arguments_are_named():
    affine = fixed_point_affine(torch.ones(3))
    value, exponent = int32([[1, 2, 3]]), int32([0])
    with pytest.raises(ValueError, match="the rows have 2 columns, gamma has 3"):
        integer_layernorm(value[:, :2], exponent, affine)
    for eps in (-1e-5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"eps={eps} is not in"):
            integer_layernorm(value, exponent, affine, eps)
    with pytest.raises(ValueError, match="65537 columns"):
        integer_layernorm(torch.zeros(1, MAX_COLUMNS + 1, dtype=torch.int32), exponent, affine)
    with pytest.raises(ValueError, match=r"weight and bias are shaped \(3,\) and \(2,\)"):
        fixed_point_affine(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="inf or NaN"):
        fixed_point_affine(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="inf or NaN"):
        fixed_point_affine(torch.ones(1), torch.tensor([math.inf]))
