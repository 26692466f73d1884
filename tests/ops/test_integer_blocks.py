"""Operators on blocks are what their parts give one after the other, and near the float functions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from lightning_compress.nn.integer_functional import (
    LOGIT_BITS,
    activation_of_integers,
    layernorm_of_integers,
    rmsnorm_of_integers,
)
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.fixed_point import align_rows
from lightning_compress.ops.integer_blocks import gelu_of_blocks, layernorm_of_blocks, softmax_of_blocks
from lightning_compress.ops.integer_gelu import FUNCTIONS
from lightning_compress.ops.integer_layernorm import fixed_point_affine
from lightning_compress.ops.integer_softmax import integer_softmax, softmax_factor

OPERATORS = torch.ops.lightning_compress
FACTORS = ("scale", "shift")


def int8(numbers: list) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int8)


def test_blocks_of_a_row_have_factors_of_their_own():
    # 64 * 1/64 and 4 * 2: 1 and 8; relu keeps them, and -3 becomes 0
    payload, exponents = int8([[64, -3, 4, 0]]), int8([[-6, 1]])
    found, factors = gelu_of_blocks(payload, exponents, 2, "relu")
    assert found.tolist() == [[64, 0, 64, 0]] and factors.tolist() == [[-6, -3]]
    # the larger of 8 and 1 has all, whatever their blocks
    assert softmax_of_blocks(payload, exponents, 2, scale=2.0).tolist() == [[0, 0, 255, 0]]
    # mean 2, deviation 1
    affine = fixed_point_affine(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 3.0]))
    found, factors = layernorm_of_blocks(int8([[2, 3]]), torch.tensor([[0.5, 1.0]]), 1, affine, eps=0.0)
    assert found.tolist() == [[-127, 127]]
    torch.testing.assert_close(factors * 127, torch.tensor([[1.0, 3.5]]))


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 4),
    width=st.integers(1, 9),
    columns=st.integers(0, 5),
    factor=st.sampled_from(FACTORS),
    bits=st.sampled_from([2, 4, 8]),
    has_zeros=st.booleans(),
)
def test_they_are_their_parts_one_after_the_other(
    num_rows: int, width: int, columns: int, factor: str, bits: int, has_zeros: bool
):
    x, weight, bias = torch.randn(num_rows, width) * 3, torch.randn(width), torch.randn(width)
    x[: int(has_zeros)] = 0.0
    block = (1, columns)
    blocks = block_quantize(x, 8, block, factor)
    real = block_dequantize(*blocks, block)
    seen = torch.rand(num_rows, width) < 0.6
    for mask in (None, seen):
        logits = align_rows(real if mask is None else real.masked_fill(~mask, 0.0), LOGIT_BITS)
        found = softmax_of_blocks(*blocks, columns, 0.5, mask)
        assert torch.equal(found, integer_softmax(*logits, softmax_factor(0.5), mask))
    pairs = [
        (gelu_of_blocks(*blocks, columns, name, bits), activation_of_integers(real, name))
        for name in FUNCTIONS
    ]
    found = layernorm_of_blocks(*blocks, columns, fixed_point_affine(weight, bias), 1e-5, bits=bits)
    pairs.append((found, layernorm_of_integers(real, weight, bias, 1e-5)))
    found = layernorm_of_blocks(
        *blocks, columns, fixed_point_affine(weight), 1e-5, is_centred=False, bits=bits
    )
    pairs.append((found, rmsnorm_of_integers(real, weight, 1e-5)))
    for found, result in pairs:
        for ours, theirs in zip(found, block_quantize(result, bits, block, factor), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("factor", FACTORS)
def test_they_are_near_the_float_functions(factor: str):
    x, weight, bias = torch.randn(40, 96) * 2, torch.rand(96) + 0.5, torch.randn(96)
    blocks = block_quantize(x, 8, (1, 32), factor)
    real = block_dequantize(*blocks, (1, 32))
    affine = fixed_point_affine(weight, bias)
    for found, exact in (
        (gelu_of_blocks(*blocks, 32), F.gelu(real)),
        (layernorm_of_blocks(*blocks, 32, affine), F.layer_norm(real, (96,), weight, bias)),
    ):
        largest = exact.view(40, 3, 32).abs().amax(2, keepdim=True).expand(40, 3, 32).reshape(40, 96)
        step = largest / 127 * (2 if factor == "shift" else 1)
        assert bool(((block_dequantize(*found, (1, 32)) - exact).abs() <= step / 2 + 2e-3).all())


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (2, 0)])
def test_torch_finds_nothing_wrong_with_the_operators(factor: str, shape: tuple[int, int]):
    blocks = block_quantize(torch.randn(shape), 8, (1, 2), factor)
    affine = fixed_point_affine(torch.ones(max(shape[1], 1)))
    gamma = affine.gamma_C[: shape[1]]
    opcheck(OPERATORS.softmax_of_blocks.default, (*blocks, torch.rand(shape) < 0.5, 2, 5909))
    opcheck(OPERATORS.softmax_of_blocks.default, (*blocks, None, 2, 5909))
    opcheck(OPERATORS.gelu_of_blocks.default, (*blocks, 2, "gelu", 8))
    opcheck(OPERATORS.layernorm_of_blocks.default, (*blocks, gamma, None, 9, -20, 1e-5, True, 2, 8))


def test_they_compile_into_one_graph():
    def both(payload: Tensor, factors: Tensor) -> Tensor:
        return softmax_of_blocks(*gelu_of_blocks(payload, factors, 2), 2)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="eager")
    for rows in (3, 5):
        blocks = block_quantize(torch.randn(rows, 4), 8, (1, 2), "scale")
        assert torch.equal(compiled(*blocks), both(*blocks))


def test_wrong_arguments_are_named():
    payload, factors, affine = int8([[1, 2, 3]]), int8([[0, 0]]), fixed_point_affine(torch.ones(2))
    with pytest.raises(TypeError, match=r"integers are torch\.int32, factors torch\.int8"):
        gelu_of_blocks(payload.int(), factors, 2)
    with pytest.raises(TypeError, match=r"factors torch\.float64"):
        gelu_of_blocks(payload, factors.double(), 2)
    with pytest.raises(ValueError, match=r"factors are shaped \(1, 2\), not \(1, 1\)"):
        gelu_of_blocks(payload, factors, 0)
    with pytest.raises(ValueError, match=r"shaped \(3,\): give \[R, C\]"):
        gelu_of_blocks(payload[0], factors, 2)
    with pytest.raises(ValueError, match="columns=-1, bits=8"):
        softmax_of_blocks(payload, factors, -1)
    with pytest.raises(ValueError, match="columns=2, bits=9"):
        gelu_of_blocks(payload, factors, 2, bits=9)
    with pytest.raises(ValueError, match="function='tanh' is not one of"):
        gelu_of_blocks(payload, factors, 2, "tanh")
    with pytest.raises(ValueError, match=r"the mask is torch\.int8"):
        softmax_of_blocks(payload, factors, 2, seen_RC=payload)
    with pytest.raises(ValueError, match="gamma has 2"):
        layernorm_of_blocks(payload, factors, 2, affine)
    with pytest.raises(ValueError, match="eps=-1"):
        layernorm_of_blocks(payload, factors, 2, fixed_point_affine(torch.ones(3)), eps=-1)
