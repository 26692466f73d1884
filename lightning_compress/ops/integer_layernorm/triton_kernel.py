"""``integer_layernorm`` as one Triton kernel: a program holds whole rows. Needs the extra ``triton``.

Rows that a program cannot hold are left to plain torch.

Shape legend: R rows and C columns of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fixed_point.triton_functions import (
    MAX_COLUMNS,
    bit_length,
    integer_sqrt,
    places,
    row_tiles,
    shift_right,
    shift_right_by,
)
from lightning_compress.ops.integer_layernorm import reference

__all__ = ["integer_layernorm", "layernorm_kernel", "normalised", "scaled"]

GUARD = tl.constexpr(reference.GUARD)
FRACTION = tl.constexpr(reference.FRACTION)


def integer_layernorm(
    value_RC: Tensor,
    exponent_R: Tensor,
    gamma_C: Tensor,
    beta_C: Tensor | None,
    shift: int,
    exponent: int,
    eps: float,
    is_centred: bool,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`lightning_compress.ops.integer_layernorm.reference.integer_layernorm` does; unchecked."""
    num_rows, width = value_RC.shape
    if width > MAX_COLUMNS or value_RC.numel() == 0:
        arguments = (value_RC, exponent_R, gamma_C, beta_C, shift, exponent, eps, is_centred)
        return reference.integer_layernorm(*arguments)
    out_RC = torch.empty(value_RC.shape, dtype=torch.int32, device=value_RC.device)
    sizes = row_tiles(width)
    constants: dict[str, Any] = sizes | {"IS_CENTRED": is_centred, "HAS_BETA": beta_C is not None}
    with torch.cuda.device_of(value_RC):  # Triton launches on the current device
        layernorm_kernel[(triton.cdiv(num_rows, sizes["R"]),)](
            value_RC.contiguous(),
            exponent_R.contiguous(),
            gamma_C.contiguous(),
            gamma_C if beta_C is None else beta_C.contiguous(),
            out_RC,
            num_rows,
            width,
            *reference.numbers(width, eps),
            shift,
            **constants,
        )
    return out_RC, torch.full_like(exponent_R, exponent)


@triton.jit(do_not_specialize=["num_rows", "mean", "root", "eps", "eps_exponent", "shift"])
def layernorm_kernel(
    value_ptr,
    exponent_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    num_rows,
    width,
    mean,
    root,
    eps,
    eps_exponent,
    shift,
    IS_CENTRED: tl.constexpr,
    HAS_BETA: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Normalise whole rows; see the reference."""
    tile = places(num_rows, width, R, C)
    row_R, column_C, inside_RC, at_RC = tile
    value_RC = tl.load(value_ptr + at_RC, mask=inside_RC, other=0)
    exponent_R = tl.load(exponent_ptr + row_R, mask=row_R < num_rows, other=0)
    normal_RC = normalised(value_RC, exponent_R, inside_RC, mean, root, eps, eps_exponent, IS_CENTRED)
    out_RC = scaled(normal_RC, gamma_ptr, beta_ptr, column_C, width, shift, HAS_BETA)
    tl.store(out_ptr + at_RC, out_RC, mask=inside_RC)


@triton.jit
def normalised(value_RC, exponent_R, inside_RC, mean, root, eps, eps_exponent, IS_CENTRED: tl.constexpr):
    """Return normalised numbers with FRACTION digits after the point, int64; 0 behind the edges."""
    rest_RC = value_RC.to(tl.int64) << GUARD
    if IS_CENTRED:
        sum_R = tl.sum(value_RC, axis=1).to(tl.int64)
        mean_R = shift_right_by(sum_R * mean, 46 - GUARD)
        rest_RC = tl.where(inside_RC, rest_RC - mean_R[:, None], 0)
    squares_R = tl.sum(rest_RC * rest_RC, axis=1)
    left_R = (eps_exponent - 2 * (exponent_R - GUARD)).to(tl.int64)
    halves_R = tl.maximum(left_R - 35, 0) >> 1
    left_R -= 2 * halves_R
    one_R = tl.full(left_R.shape, 1, tl.int64)
    eps_R = shift_right(eps * (one_R << tl.maximum(left_R, 0)), tl.maximum(-left_R, 0))
    total_R = tl.maximum(shift_right(squares_R, 2 * halves_R) + eps_R, 1)
    doubled_R = (62 - bit_length(total_R)) >> 1
    root_R = integer_sqrt(total_R << (2 * doubled_R))
    inverse_R = (one_R * root << 36) // root_R
    places_R = halves_R - doubled_R + (52 - FRACTION)
    return shift_right(rest_RC * inverse_R[:, None], places_R[:, None])


@triton.jit
def scaled(normal_RC, gamma_ptr, beta_ptr, column_C, width, shift, HAS_BETA: tl.constexpr):
    """Return normalised numbers times gamma, plus beta if there is one, int32."""
    gamma_C = tl.load(gamma_ptr + column_C, mask=column_C < width, other=0)
    out_RC = shift_right(normal_RC * gamma_C.to(tl.int64)[None, :], shift).to(tl.int32)
    if HAS_BETA:
        out_RC += tl.load(beta_ptr + column_C, mask=column_C < width, other=0)[None, :]
    return out_RC
