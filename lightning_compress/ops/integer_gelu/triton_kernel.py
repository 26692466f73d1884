"""``integer_gelu`` as one Triton kernel, a tile of elements in each program. Needs the extra ``triton``.

Shape legend: R rows and C columns of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fixed_point.triton_functions import (
    NUM_ELEMENTS,
    places,
    shift_right,
    shift_right_by,
)
from lightning_compress.ops.integer_gelu import reference

__all__ = ["activated", "gelu_kernel", "integer_gelu", "tile_sizes"]

CELL_BITS = tl.constexpr(reference.CELL_BITS)
CELL_MASK = tl.constexpr(2**reference.CELL_BITS - 1)
FRACTION = tl.constexpr(reference.FRACTION)


def integer_gelu(value_RC: Tensor, exponent_R: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """Do what :func:`lightning_compress.ops.integer_gelu.reference.integer_gelu` does; unchecked."""
    if function == "relu" or value_RC.numel() == 0:
        return reference.integer_gelu(value_RC, exponent_R, function)
    num_rows, width = value_RC.shape
    out_RC = torch.empty(value_RC.shape, dtype=torch.int32, device=value_RC.device)
    unit_R = torch.empty(num_rows, dtype=torch.int32, device=value_RC.device)
    sizes = tile_sizes(width)
    constants: dict[str, Any] = sizes | {"LIMIT": reference.LIMITS[function] << reference.FRACTION}
    with torch.cuda.device_of(value_RC):  # Triton launches on the current device
        gelu_kernel[(triton.cdiv(num_rows, sizes["R"]), triton.cdiv(width, sizes["C"]))](
            value_RC.contiguous(),
            exponent_R.contiguous(),
            reference.table(function, value_RC.device),
            out_RC,
            unit_R,
            num_rows,
            width,
            **constants,
        )
    return out_RC, unit_R


def tile_sizes(width: int) -> dict[str, Any]:
    """Return the constants that the kernel is compiled with for rows of this width.

    Example:
        >>> tile_sizes(3072)
        {'R': 2, 'C': 1024}
    """
    columns = min(triton.next_power_of_2(max(width, 1)), 1024)
    return {"R": NUM_ELEMENTS // columns, "C": columns}


@triton.jit(do_not_specialize=["num_rows"])
def gelu_kernel(
    value_ptr,
    exponent_ptr,
    table_ptr,
    out_ptr,
    unit_ptr,
    num_rows,
    width,
    LIMIT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Apply the function to a tile; see the reference."""
    tile = places(num_rows, width, R, C, tl.program_id(1))
    row_R, _, inside_RC, at_RC = tile
    value_RC = tl.load(value_ptr + at_RC, mask=inside_RC, other=0)
    exponent_R = tl.load(exponent_ptr + row_R, mask=row_R < num_rows, other=0)
    result = activated(value_RC, exponent_R, table_ptr, LIMIT)
    out_RC, unit_R = result
    tl.store(out_ptr + at_RC, out_RC, mask=inside_RC)
    if tl.program_id(1) == 0:
        tl.store(unit_ptr + row_R, unit_R, mask=row_R < num_rows)


@triton.jit
def activated(value_RC, exponent_R, table_ptr, LIMIT: tl.constexpr):
    """Return the function of a tile, and the exponents of its rows; limits are in steps of 2^-15, 0 is relu."""
    if LIMIT == 0:
        return tl.maximum(value_RC, 0), exponent_R
    digits = 18 if LIMIT <= 2**17 else 20  # of the limit
    exponent_R1 = exponent_R[:, None]
    fixed_RC = shift_right(value_RC, tl.maximum(-(exponent_R1 + FRACTION), 0))
    finer_R1 = tl.minimum(tl.maximum(exponent_R1 + FRACTION, 0), digits)
    least_R1 = (LIMIT >> finer_R1) + 1
    position_RC = tl.minimum(tl.minimum(tl.abs(fixed_RC), least_R1) << finer_R1, LIMIT)
    cell_RC = position_RC >> CELL_BITS
    left_RC = tl.load(table_ptr + cell_RC)
    rise_RC = (tl.load(table_ptr + cell_RC + 1) - left_RC) * (position_RC & CELL_MASK)
    correction_RC = left_RC + shift_right_by(rise_RC, CELL_BITS)
    correction_RC = shift_right(correction_RC, tl.maximum(exponent_R1, 0))
    result_RC = (tl.maximum(fixed_RC, 0) << tl.minimum(finer_R1, FRACTION)) - correction_RC
    return result_RC, tl.maximum(exponent_R, 0) - FRACTION
