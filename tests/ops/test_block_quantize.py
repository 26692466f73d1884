"""Blocks become small integers as a hand rounds them, and torch finds nothing wrong with the operator."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize import block_quantize, reference

OPERATOR = torch.ops.lightning_compress.block_quantize.default
BLOCKS = [(1, 0), (0, 0), (0, 1), (2, 3), (3, 2), (32, 32), (1, 4)]


def slowly(x: Tensor, bits: int, block: tuple[int, int], factor: str) -> tuple[list, list]:
    """Element by element, in fractions."""
    rows, columns = (side or size for side, size in zip(block, x.shape, strict=True))
    qmax = 2 ** (bits - 1) - 1
    payload = [[0] * x.shape[1] for _ in range(x.shape[0])]
    factors = []
    for top in range(0, x.shape[0], rows):
        factors.append([])
        for left in range(0, x.shape[1], columns):
            places = list(
                itertools.product(
                    range(top, min(top + rows, x.shape[0])), range(left, min(left + columns, x.shape[1]))
                )
            )
            values = [np.float32(x[place].item()) for place in places]
            amax = max(abs(value) for value in values)
            if factor == "shift":
                e = -32
                while e < 31 and Fraction(float(amax)) > qmax * Fraction(2) ** e:
                    e += 1
                factors[-1].append(e)
                quotients = [Fraction(float(value)) / Fraction(2) ** e for value in values]
            else:
                scale = amax / np.float32(qmax)
                factors[-1].append(float(scale))
                quotients = [Fraction(float(value / scale)) if scale else Fraction(0) for value in values]
            for (row, column), quotient in zip(places, quotients, strict=True):
                payload[row][column] = max(-qmax, min(qmax, round(quotient)))  # halves to even
    return payload, factors


def matrix(rows: int, columns: int, seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    spoiled = torch.rand(rows, columns, generator=generator) < 0.3
    return {
        "normal": x,
        "zeros": torch.where(spoiled, x, 0.0),
        "all zero": torch.zeros_like(x),
        "constant": torch.full_like(x, 0.37),
        "outliers": torch.where(spoiled, x * 1e30, x),
        "tiny": x * 1e-38,
        "halves": (x * 16).round() / 2,
        "many sizes": x * torch.exp(20 * torch.randn(rows, columns, generator=generator)),
    }[kind]


KINDS = ["normal", "zeros", "all zero", "constant", "outliers", "tiny", "halves", "many sizes"]


def test_integers_are_those_worked_by_hand():
    x = torch.tensor([[1.0, -2.5, 0.5], [14.0, 6.0, -5.0]])
    # 4 bits, qmax 7. Row 0: 2.5 / 7 is 0.357, e = -1: 2, -5, 1. Row 1: 14 / 7 is 2, e = 1: 7, 3, -2.5 to -2
    payload, exponents = block_quantize(x, 4, (1, 0), "shift")
    assert payload.tolist() == [[2, -5, 1], [7, 3, -2]] and exponents.tolist() == [[-1], [1]]
    assert payload.dtype == exponents.dtype == torch.int8
    # blocks of two rows and two columns: 14 / 7 = 2: 0.5, -1.25, 7, 3; then 5 / 7: 0.7, -7
    payload, scales = block_quantize(x, 4, (2, 2), "scale")
    assert payload.tolist() == [[0, -1, 1], [7, 3, -7]]
    assert scales.dtype == torch.float32 and torch.equal(
        scales, torch.tensor([[2.0, 5.0]]) / torch.tensor([1, 7])
    )


@pytest.mark.parametrize(
    ("amax", "bits", "exponent"),
    [
        (127.0, 8, 0),
        (127.00001, 8, 1),
        (63.5, 8, -1),
        (7.0, 4, 0),
        (7.0000005, 4, 1),
        (1.0, 2, 0),
        (0.5, 2, -1),
        (0.50000006, 2, 0),
        (0.0, 8, -32),
        (1e-45, 8, -32),
        (127 * 2.0**-32, 8, -32),
        (127 * 2.0**31, 8, 31),
        (3e38, 8, 31),
    ],
)
def test_the_exponent_is_the_smallest_that_fits(amax: float, bits: int, exponent: int):
    payload, exponents = block_quantize(torch.tensor([[amax, -amax]]), bits, (1, 0), "shift")
    assert exponents.item() == exponent
    if 1e-30 < amax < 1e12:  # else it is below half, or cut off
        assert abs(payload[0, 0].item() * 2.0**exponent - amax) <= 2.0 ** (exponent - 1)


def test_what_is_too_large_for_an_exponent_is_cut_off_and_what_is_too_small_is_zero():
    payload, exponents = block_quantize(
        torch.tensor([[3e38, -1e20, 1.0], [2e-11, -1e-10, 2e-10]]), 8, (1, 0), "shift"
    )
    assert exponents.tolist() == [[31], [-32]]
    assert payload.tolist() == [[127, -127, 0], [0, 0, 1]]


@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 7),
    bits=st.integers(2, 8),
    block=st.sampled_from(BLOCKS),
    factor=st.sampled_from(["scale", "shift"]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
)
def test_it_equals_a_slow_loop(
    rows: int, columns: int, bits: int, block: tuple[int, int], factor: str, kind: str, seed: int
):
    x = matrix(rows, columns, seed, kind)
    payload, factors = block_quantize(x, bits, block, factor)
    assert (payload.tolist(), factors.tolist()) == slowly(x, bits, block, factor)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    block=st.sampled_from(BLOCKS),
    kind=st.sampled_from(["normal", "zeros", "all zero", "constant", "halves"]),
    factor=st.sampled_from(["scale", "shift"]),
    seed=st.integers(0, 2**31),
)
def test_an_element_moves_by_half_a_step_at_most_and_quantising_again_changes_nothing(
    bits: int, block: tuple[int, int], kind: str, factor: str, seed: int
):
    x = matrix(5, 7, seed, kind)
    payload, factors = block_quantize(x, bits, block, factor)
    held = block_dequantize(payload, factors, block)
    step = block_dequantize(torch.ones_like(payload), factors, block)
    assert bool(((held - x).abs() <= step * 0.50001).all())
    again, same = block_quantize(held, bits, block, factor)
    assert torch.equal(again, payload)
    assert torch.equal(same, factors) if factor == "shift" else torch.allclose(same, factors)


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("block", BLOCKS)
def test_matrices_of_a_batch_have_blocks_of_their_own(block: tuple[int, int], factor: str):
    x = torch.randn(2, 3, 5, 4)
    payload, factors = block_quantize(x, 8, block, factor)
    for i, j in itertools.product(range(2), range(3)):
        alone = block_quantize(x[i, j], 8, block, factor)
        assert torch.equal(payload[i, j], alone[0]) and torch.equal(factors[i, j], alone[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_other_dtypes_and_strides_are_rounded_to_float32_first(dtype: torch.dtype, factor: str):
    x = torch.randn(7, 9).t()[1::2].to(dtype)
    found, expected = (
        block_quantize(x, 5, (2, 3), factor),
        block_quantize(x.float().contiguous(), 5, (2, 3), factor),
    )
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)])
@pytest.mark.parametrize("block", [(1, 0), (0, 0), (2, 2)])
def test_there_may_be_nothing_to_quantise(shape: tuple[int, ...], block: tuple[int, int]):
    payload, factors = block_quantize(torch.empty(shape), 8, block, "shift")
    assert payload.shape == shape and factors.numel() == 0
    assert block_dequantize(payload, factors, block).shape == shape


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("block", [(1, 0), (2, 3), (0, 1)])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (0, 3)])
def test_torch_finds_nothing_wrong_with_the_operator(
    shape: tuple[int, ...], block: tuple[int, int], factor: str
):
    opcheck(OPERATOR, (torch.randn(shape), 8, *block, factor))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("factor", ["scale", "shift"])
def test_what_is_not_finite_is_refused(bad: float, factor: str):
    x = torch.randn(4, 4)
    x[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite: quantise finite numbers only"):
        block_quantize(x, 8, (2, 2), factor)


def test_it_compiles_for_any_number_of_rows():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: block_quantize(x, 8, (2, 3), "shift"), fullgraph=True, dynamic=True, backend="eager"
    )
    for rows in (3, 8, 5):
        x = torch.randn(rows, 7)
        for found, expected in zip(compiled(x), reference.block_quantize(x, 8, 2, 3, "shift"), strict=True):
            assert torch.equal(found, expected)


def test_wrong_arguments_are_named():
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"x_RC is torch\.int64: give real numbers"):
        block_quantize(x.long(), 8, (1, 0), "scale")
    with pytest.raises(ValueError, match=r"x_RC is shaped \(3,\)"):
        block_quantize(x[0], 8, (1, 0), "scale")
    with pytest.raises(ValueError, match="bits=1 is not from 2 to 8"):
        block_quantize(x, 1, (1, 0), "scale")
    with pytest.raises(ValueError, match=r"block=\(-1, 0\) is not two numbers"):
        block_quantize(x, 8, (-1, 0), "scale")
    with pytest.raises(ValueError, match="factor='float' is not one of"):
        block_quantize(x, 8, (1, 0), "float")
