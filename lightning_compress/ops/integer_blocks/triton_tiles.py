"""How kernels on blocks read and write their tiles of whole rows. Needs the extra ``triton``.

Shape legend: R rows and C columns of a tile; Q blocks of W columns each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.block_quantize.triton_kernel import integer_constants, round_to_even
from lightning_compress.ops.fixed_point.triton_functions import MAX_COLUMNS, power_of_two, row_tiles

__all__ = ["block_sizes", "load_blocks", "store_blocks"]


def block_sizes(payload_RC: Tensor, factor_RQ: Tensor, columns: int, bits: int) -> dict[str, Any] | None:
    """Return the constants that kernels with blocks as results are compiled with; None if no kernel can do it."""
    width = payload_RC.shape[1]
    sizes = row_tiles(width)
    columns = min(columns or sizes["C"], sizes["C"])
    if width > MAX_COLUMNS or payload_RC.numel() == 0 or columns & (columns - 1):
        return None
    return sizes | integer_constants(bits) | {"W": columns, "IS_SHIFT": factor_RQ.dtype == torch.int8}


@triton.jit
def load_blocks(payload_ptr, factor_ptr, tile, width, COLUMNS: tl.constexpr, IS_SHIFT: tl.constexpr):
    """Integers times the factors of their blocks, in fp32; 0 behind the edges. The tile is as of ``places``."""
    row_R, column_C, inside_RC, at_RC = tile
    num_blocks = (width + COLUMNS - 1) // COLUMNS
    factor_at_RC = row_R.to(tl.int64)[:, None] * num_blocks + (column_C // COLUMNS)[None, :]
    factor_RC = tl.load(factor_ptr + factor_at_RC, mask=inside_RC, other=0)
    if IS_SHIFT:
        factor_RC = power_of_two(factor_RC.to(tl.int32))
    return tl.load(payload_ptr + at_RC, mask=inside_RC, other=0).to(tl.float32) * factor_RC


@triton.jit
def store_blocks(
    y_RC,
    out_ptr,
    factor_ptr,
    tile,
    num_rows,
    width,
    R: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    QMAX: tl.constexpr,
    QMAX_MANTISSA: tl.constexpr,
    IS_SHIFT: tl.constexpr,
):
    """Quantise blocks of W columns as ``block_quantize`` does, and store them."""
    row_R, _, inside_RC, at_RC = tile
    y_RQW = tl.reshape(tl.where(inside_RC, y_RC, 0.0), (R, C // W, W))
    amax_RQ = tl.max(tl.abs(y_RQW), axis=2)
    if IS_SHIFT:
        field_RQ = amax_RQ.to(tl.int32, bitcast=True)
        e_RQ = (field_RQ >> 23) - 126 - (BITS - 1) + ((field_RQ & 0x7FFFFF) > QMAX_MANTISSA).to(tl.int32)
        e_RQ = tl.minimum(tl.maximum(e_RQ, -32), 31)
        factor_RQ = e_RQ.to(tl.int8)
        quotient_RQW = y_RQW * power_of_two(-e_RQ)[:, :, None]
    else:
        factor_RQ = tl.div_rn(amax_RQ, tl.full((R, C // W), QMAX, tl.float32))
        divisor_RQ = tl.where(factor_RQ > 0, factor_RQ, 1.0)
        quotient_RQW = tl.div_rn(y_RQW, tl.broadcast_to(divisor_RQ[:, :, None], (R, C // W, W)))
    integer_RQW = round_to_even(tl.minimum(tl.maximum(quotient_RQW, -QMAX), QMAX))
    tl.store(out_ptr + at_RC, tl.reshape(integer_RQW, (R, C)).to(tl.int8), mask=inside_RC)
    num_blocks = (width + W - 1) // W
    block_Q = tl.arange(0, C // W)
    factor_at_RQ = row_R.to(tl.int64)[:, None] * num_blocks + block_Q[None, :]
    inside_RQ = (row_R < num_rows)[:, None] & (block_Q < num_blocks)[None, :]
    tl.store(factor_ptr + factor_at_RQ, factor_RQ, mask=inside_RQ)
