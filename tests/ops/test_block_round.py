"""Rounding is quantising and dequantising, and torch finds nothing wrong with the operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.block_round import block_round

OPERATOR = torch.ops.lightning_compress.block_round.default
BLOCKS = [(1, 0), (0, 0), (2, 3), (32, 32), (1, 4), (0, 2)]


@settings(deadline=None, max_examples=120)
@given(
    shape=st.sampled_from([(3, 5), (2, 3, 5), (1, 1), (0, 5), (5, 0)]),
    bits=st.integers(2, 8),
    block=st.sampled_from(BLOCKS),
    factor=st.sampled_from(["scale", "shift"]),
    magnitude=st.sampled_from([0.0, 1e-45, 1e-20, 1.0, 3e38]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_is_both_halves(
    shape: tuple, bits: int, block: tuple, factor: str, magnitude: float, dtype: torch.dtype
):
    x = (torch.rand(shape) * 2 - 1).mul(magnitude).to(dtype)
    found = block_round(x, bits, block, factor)
    assert found.dtype == torch.float32 and found.is_contiguous()
    assert torch.equal(found, block_dequantize(*block_quantize(x, bits, block, factor), block))
    assert torch.equal(block_round(x.mT.contiguous().mT, bits, block, factor), found)


@pytest.mark.parametrize("factor", ["scale", "shift"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (0, 3)])
def test_torch_finds_nothing_wrong_with_the_operator(shape: tuple[int, ...], factor: str):
    opcheck(OPERATOR, (torch.randn(shape), 8, 2, 3, factor))
    opcheck(OPERATOR, (torch.randn(shape).double(), 4, 1, 0, factor))


def test_it_compiles_into_one_graph():
    compiled = torch.compile(
        lambda x: block_round(x, 4, (1, 2), "scale"), fullgraph=True, dynamic=True, backend="eager"
    )
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        assert torch.equal(compiled(x), block_round(x, 4, (1, 2), "scale"))


def test_wrong_arguments_are_named():
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"x_RC is torch\.int64"):
        block_round(x.long(), 8, (1, 0), "scale")
    with pytest.raises(ValueError, match=r"shaped \(4,\): give \[\.\.\., R, C\]"):
        block_round(x[0], 8, (1, 0), "scale")
    with pytest.raises(ValueError, match="bits=9"):
        block_round(x, 9, (1, 0), "scale")
    with pytest.raises(ValueError, match="factor='power'"):
        block_round(x, 8, (1, 0), "power")
    with pytest.raises(ValueError, match=r"block=\(1, -1\)"):
        block_round(x, 8, (1, -1), "scale")
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        block_round(x, 8, (1, 0), "scale")
