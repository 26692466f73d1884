"""Integers times the factors of their blocks, and torch finds nothing wrong with the operator."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from lightning_compress.ops.block_dequantize import block_dequantize

OPERATOR = torch.ops.lightning_compress.block_dequantize.default
BLOCKS = [(1, 0), (0, 0), (2, 3), (32, 32), (1, 4)]


def test_numbers_are_those_worked_by_hand():
    payload = torch.tensor([[1, -2, 3], [-4, 5, 127]], dtype=torch.int8)
    exponents = torch.tensor([[-1, 3]], dtype=torch.int8)
    assert block_dequantize(payload, exponents, (2, 2)).tolist() == [[0.5, -1.0, 24.0], [-2.0, 2.5, 1016.0]]
    scales = torch.tensor([[0.3], [0.0]])
    expected = torch.tensor([[1.0, -2.0, 3.0], [0.0, 0.0, 0.0]]) * 0.3
    assert torch.equal(block_dequantize(payload, scales, (1, 0)), expected)


def test_unsigned_integers_have_factors_too():
    payload = torch.tensor([[255, 128]], dtype=torch.uint8)
    exponents = torch.tensor([[-8]], dtype=torch.int8)
    assert block_dequantize(payload, exponents, (0, 0)).tolist() == [[255 / 256, 0.5]]


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 7),
    block=st.sampled_from(BLOCKS),
    is_shift=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_equals_a_slow_loop(rows: int, columns: int, block: tuple[int, int], is_shift: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    payload = torch.randint(-127, 128, (columns, rows), generator=generator, dtype=torch.int8).t()
    high, wide = block[0] or rows, block[1] or columns
    shape = (-(-rows // high), -(-columns // wide))
    exponents = torch.randint(-32, 32, shape, generator=generator, dtype=torch.int8)
    factors = exponents if is_shift else torch.randn(shape, generator=generator)
    found = block_dequantize(payload, factors, block)
    assert found.dtype == torch.float32 and found.is_contiguous()
    for row, column in itertools.product(range(rows), range(columns)):
        factor = factors[row // high, column // wide].item()
        real = torch.tensor(2.0**factor if is_shift else factor)
        assert found[row, column] == payload[row, column].float() * real


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (0, 5)])
def test_torch_finds_nothing_wrong_with_the_operator(shape: tuple[int, ...]):
    payload = torch.randint(-127, 128, shape, dtype=torch.int8)
    factors = torch.zeros(*shape[:-1], 1)
    opcheck(OPERATOR, (payload, factors, 1, 0))
    opcheck(OPERATOR, (payload, factors.to(torch.int8), 1, 0))


def test_wrong_arguments_are_named():
    payload, factors = torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1)
    with pytest.raises(TypeError, match=r"payload_RC is torch\.int32: give int8"):
        block_dequantize(payload.int(), factors, (1, 0))
    with pytest.raises(TypeError, match=r"factors of payload_RC are torch\.float64"):
        block_dequantize(payload, factors.double(), (1, 0))
    with pytest.raises(ValueError, match=r"the block of payload_RC=\(1,\)"):
        block_dequantize(payload, factors, (1,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"payload_RC is shaped \(3,\)"):
        block_dequantize(payload[0], factors, (1, 0))
    with pytest.raises(
        ValueError, match=r"in blocks of \(1, 2\): its factors are shaped \(2, 1\), but .* \(2, 2\)"
    ):
        block_dequantize(payload, factors, (1, 2))
    with pytest.raises(ValueError, match="on cpu and meta: move them"):
        block_dequantize(payload, factors.to("meta"), (1, 0))
