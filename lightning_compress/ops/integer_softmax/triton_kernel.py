"""``integer_softmax`` as one Triton kernel: a program holds whole rows. Needs the extra ``triton``.

Rows that a program cannot hold are left to plain torch.

Shape legend: R rows and C columns of a tile; T entries of the table of powers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fixed_point.triton_functions import (
    MAX_COLUMNS,
    bit_length,
    places,
    row_tiles,
    shift_right,
    shift_right_by,
)
from lightning_compress.ops.integer_softmax import reference

__all__ = ["integer_softmax", "probabilities", "softmax_kernel", "weights_of_steps"]

FAR = tl.constexpr(reference.FAR)
FIXED_EXPONENT = tl.constexpr(reference.FIXED_EXPONENT)
MASKED = tl.constexpr(-reference.MASKED)


def integer_softmax(
    value_RC: Tensor, exponent_R: Tensor, seen_RC: Tensor | None, factor: int, by_row: bool
) -> tuple[Tensor, Tensor]:
    """Do what :func:`lightning_compress.ops.integer_softmax.reference.integer_softmax` does; unchecked."""
    num_rows, width = value_RC.shape
    if width > MAX_COLUMNS or value_RC.numel() == 0:
        return reference.integer_softmax(value_RC, exponent_R, seen_RC, factor, by_row)
    out_RC = torch.empty(value_RC.shape, dtype=torch.uint8, device=value_RC.device)
    digits_R = torch.empty(num_rows, dtype=torch.int32, device=value_RC.device)
    sizes = row_tiles(width)
    constants: dict[str, Any] = sizes | {"HAS_MASK": seen_RC is not None, "BY_ROW": by_row}
    seen = None if seen_RC is None else seen_RC.contiguous().view(torch.uint8)
    with torch.cuda.device_of(value_RC):  # Triton launches on the current device
        softmax_kernel[(triton.cdiv(num_rows, sizes["R"]),)](
            value_RC.contiguous(),
            exponent_R.contiguous(),
            out_RC if seen is None else seen,
            weights_of_steps(value_RC.device),
            out_RC,
            digits_R,
            num_rows,
            width,
            factor,
            **constants,
        )
    return out_RC, digits_R


@lru_cache
def weights_of_steps(device: torch.device) -> Tensor:
    """Return the powers of the reference in int32: 17 KiB, which a cache holds."""
    return reference.powers(device).int()


@triton.jit(do_not_specialize=["num_rows", "factor"])
def softmax_kernel(
    value_ptr,
    exponent_ptr,
    seen_ptr,
    weight_ptr,
    out_ptr,
    digits_ptr,
    num_rows,
    width,
    factor,
    HAS_MASK: tl.constexpr,
    BY_ROW: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Normalise whole rows; see the reference."""
    tile = places(num_rows, width, R, C)
    row_R, _, inside_RC, at_RC = tile
    value_RC = tl.load(value_ptr + at_RC, mask=inside_RC, other=0)
    exponent_R = tl.load(exponent_ptr + row_R, mask=row_R < num_rows, other=0)
    seen_RC = inside_RC
    if HAS_MASK:
        seen_RC = tl.load(seen_ptr + at_RC, mask=inside_RC, other=0) != 0
    result = probabilities(value_RC, exponent_R, seen_RC, factor, weight_ptr, BY_ROW)
    out_RC, digits_R = result
    tl.store(digits_ptr + row_R, digits_R, mask=row_R < num_rows)
    tl.store(out_ptr + at_RC, out_RC.to(tl.uint8), mask=inside_RC)


@triton.jit
def probabilities(value_RC, exponent_R, seen_RC, factor, weight_ptr, BY_ROW: tl.constexpr):
    """Return the probabilities of whole rows in 8 bits, and the exponents of the rows."""
    value_RC = tl.where(seen_RC, value_RC, MASKED)
    distance_RC = tl.max(value_RC, axis=1)[:, None] - value_RC
    shift_R1 = (7 - exponent_R)[:, None]
    scaled_RC = shift_right(distance_RC.to(tl.int64) * factor, tl.maximum(shift_R1, 0))
    step_RC = tl.minimum(scaled_RC << tl.minimum(tl.maximum(-shift_R1, 0), 14).to(tl.int64), FAR)
    weight_RC = tl.where(seen_RC, tl.load(weight_ptr + step_RC.to(tl.int32)), 0)
    sum_R = tl.maximum(tl.sum(weight_RC, axis=1), 32768).to(tl.int64)
    exponent_R = tl.zeros_like(exponent_R) + FIXED_EXPONENT
    if BY_ROW:
        inverse_R = 70368744177664 // sum_R  # 2^46
        shift_R = tl.minimum(bit_length(inverse_R) + 7, 46 + FIXED_EXPONENT)
        exponent_R = (shift_R - 46).to(tl.int32)
        share_RC = shift_right(weight_RC.to(tl.int64) * inverse_R[:, None], shift_R[:, None])
    else:
        inverse_R = 2147483648 // sum_R  # 2^31
        share_RC = shift_right_by(weight_RC.to(tl.int64) * inverse_R[:, None], 31 + FIXED_EXPONENT)
    return tl.minimum(share_RC, 255), exponent_R
