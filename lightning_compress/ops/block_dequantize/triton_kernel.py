"""``block_dequantize`` as one Triton kernel, a tile of elements in each program. Needs the extra ``triton``.

Shape legend: R rows, C columns, P blocks over the rows, Q blocks over the columns; H rows and W columns of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fixed_point.triton_functions import places, power_of_two

__all__ = ["block_dequantize", "dequantize_kernel", "tile_sizes"]

TILE_ROWS = 8
MAX_COLUMNS = 512
ALL = 2**30
"""Stands for the side of a block that has all there are."""


def block_dequantize(payload_RC: Tensor, factor_PQ: Tensor, rows: int, columns: int) -> Tensor:
    """Do what :func:`lightning_compress.ops.block_dequantize.reference.block_dequantize` does, equal bit for bit.

    Arguments are not checked.
    """
    out_RC = torch.empty(payload_RC.shape, dtype=torch.float32, device=payload_RC.device)
    if out_RC.numel() == 0:
        return out_RC
    num_rows, num_columns = out_RC.shape[-2:]
    num_all = out_RC.numel() // num_columns
    sizes: dict[str, Any] = tile_sizes(num_columns, rows, columns) | {
        "IS_SHIFT": factor_PQ.dtype == torch.int8
    }
    grid = (triton.cdiv(num_all, sizes["H"]), triton.cdiv(num_columns, sizes["W"]))
    with torch.cuda.device_of(out_RC):  # Triton launches on the current device
        dequantize_kernel[grid](
            payload_RC.contiguous(),
            factor_PQ.contiguous(),
            out_RC,
            num_all,
            num_rows,
            num_columns,
            factor_PQ.shape[-2],
            factor_PQ.shape[-1],
            **sizes,
        )
    return out_RC


def tile_sizes(num_columns: int, rows: int, columns: int) -> dict[str, Any]:
    """Return the constants that the kernel is compiled with for these sizes.

    Example:
        >>> tile_sizes(384, 1, 128)
        {'ROWS': 1, 'COLUMNS': 128, 'H': 8, 'W': 512}
    """
    wide = min(triton.next_power_of_2(max(num_columns, 1)), MAX_COLUMNS)
    return {"ROWS": rows or ALL, "COLUMNS": columns or ALL, "H": TILE_ROWS, "W": wide}


@triton.jit(do_not_specialize=["num_all", "num_rows", "num_down", "num_across"])
def dequantize_kernel(
    payload_ptr,
    factor_ptr,
    out_ptr,
    num_all,
    num_rows,
    num_columns,
    num_down,
    num_across,
    IS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
):
    """Multiply a tile by its factors; rows are counted over all matrices."""
    tile = places(num_all, num_columns, H, W, tl.program_id(1))
    row_H, column_W, mask_HW, at_HW = tile
    below_H = (row_H // num_rows) * num_down + (row_H % num_rows) // ROWS
    factor_at_HW = below_H.to(tl.int64)[:, None] * num_across + (column_W // COLUMNS)[None, :]
    factor_HW = tl.load(factor_ptr + factor_at_HW, mask=mask_HW, other=0)
    if IS_SHIFT:
        factor_HW = power_of_two(factor_HW.to(tl.int32))
    payload_HW = tl.load(payload_ptr + at_HW, mask=mask_HW, other=0)
    tl.store(out_ptr + at_HW, payload_HW.to(tl.float32) * factor_HW, mask=mask_HW)
