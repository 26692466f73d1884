"""Operators on blocks in one pass each: a program holds whole rows, a byte a number read and written. Needs ``triton``.

Rows that a program cannot hold, and blocks whose width is no power of two, are left to plain torch.

Shape legend: R rows and C columns of a tile; Q blocks of W columns each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fixed_point.triton_functions import (
    MAX_COLUMNS,
    align_rows,
    places,
    power_of_two,
    row_tiles,
)
from lightning_compress.ops.integer_blocks import reference
from lightning_compress.ops.integer_blocks.triton_tiles import block_sizes, load_blocks, store_blocks
from lightning_compress.ops.integer_gelu import reference as gelu
from lightning_compress.ops.integer_gelu.triton_kernel import activated
from lightning_compress.ops.integer_layernorm import reference as layernorm
from lightning_compress.ops.integer_layernorm.triton_kernel import normalised, scaled
from lightning_compress.ops.integer_softmax.triton_kernel import probabilities, weights_of_steps

__all__ = [
    "gelu_blocks_kernel",
    "gelu_of_blocks",
    "layernorm_blocks_kernel",
    "layernorm_of_blocks",
    "softmax_blocks_kernel",
    "softmax_of_blocks",
]

ROW_BITS = tl.constexpr(reference.ROW_BITS)
LOGIT_BITS = tl.constexpr(reference.LOGIT_BITS)


def softmax_of_blocks(
    payload_RC: Tensor, factor_RQ: Tensor, seen_RC: Tensor | None, columns: int, factor: int
) -> Tensor:
    """Do what :func:`lightning_compress.ops.integer_blocks.reference.softmax_of_blocks` does; unchecked."""
    num_rows, width = payload_RC.shape
    if width > MAX_COLUMNS or payload_RC.numel() == 0:
        return reference.softmax_of_blocks(payload_RC, factor_RQ, seen_RC, columns, factor)
    out_RC = torch.empty(payload_RC.shape, dtype=torch.uint8, device=payload_RC.device)
    sizes = row_tiles(width)
    constants: dict[str, Any] = {"HAS_MASK": seen_RC is not None, "IS_SHIFT": factor_RQ.dtype == torch.int8}
    constants |= sizes | {"COLUMNS": columns or sizes["C"]}
    with torch.cuda.device_of(payload_RC):  # Triton launches on the current device
        softmax_blocks_kernel[(triton.cdiv(num_rows, sizes["R"]),)](
            payload_RC.contiguous(),
            factor_RQ.contiguous(),
            out_RC if seen_RC is None else seen_RC.contiguous().view(torch.uint8),
            weights_of_steps(payload_RC.device),
            out_RC,
            num_rows,
            width,
            factor,
            **constants,
        )
    return out_RC


def gelu_of_blocks(
    payload_RC: Tensor, factor_RQ: Tensor, columns: int, function: str, bits: int
) -> tuple[Tensor, Tensor]:
    """Do what :func:`lightning_compress.ops.integer_blocks.reference.gelu_of_blocks` does; unchecked."""
    sizes = block_sizes(payload_RC, factor_RQ, columns, bits)
    if sizes is None:
        return reference.gelu_of_blocks(payload_RC, factor_RQ, columns, function, bits)
    num_rows, width = payload_RC.shape
    device, out = payload_RC.device, _empty_blocks(payload_RC, factor_RQ)
    constants: dict[str, Any] = sizes | {"LIMIT": gelu.LIMITS[function] << gelu.FRACTION}
    with torch.cuda.device_of(payload_RC):
        gelu_blocks_kernel[(triton.cdiv(num_rows, sizes["R"]),)](
            payload_RC.contiguous(),
            factor_RQ.contiguous(),
            payload_RC if function == "relu" else gelu.table(function, device),
            *out,
            num_rows,
            width,
            **constants,
        )
    return out


def layernorm_of_blocks(
    payload_RC: Tensor,
    factor_RQ: Tensor,
    gamma_C: Tensor,
    beta_C: Tensor | None,
    shift: int,
    exponent: int,
    eps: float,
    is_centred: bool,
    columns: int,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`lightning_compress.ops.integer_blocks.reference.layernorm_of_blocks` does; unchecked."""
    sizes = block_sizes(payload_RC, factor_RQ, columns, bits)
    if sizes is None:
        affine = (gamma_C, beta_C, shift, exponent)
        return reference.layernorm_of_blocks(payload_RC, factor_RQ, *affine, eps, is_centred, columns, bits)
    num_rows, width = payload_RC.shape
    out = _empty_blocks(payload_RC, factor_RQ)
    constants: dict[str, Any] = sizes | {"IS_CENTRED": is_centred, "HAS_BETA": beta_C is not None}
    with torch.cuda.device_of(payload_RC):
        layernorm_blocks_kernel[(triton.cdiv(num_rows, sizes["R"]),)](
            payload_RC.contiguous(),
            factor_RQ.contiguous(),
            gamma_C.contiguous(),
            gamma_C if beta_C is None else beta_C.contiguous(),
            *out,
            num_rows,
            width,
            *layernorm.numbers(width, eps),
            shift,
            exponent,
            **constants,
        )
    return out


def _empty_blocks(payload_RC: Tensor, factor_RQ: Tensor) -> tuple[Tensor, Tensor]:
    payload = torch.empty(payload_RC.shape, dtype=torch.int8, device=payload_RC.device)
    return payload, torch.empty(factor_RQ.shape, dtype=factor_RQ.dtype, device=payload_RC.device)


@triton.jit(do_not_specialize=["num_rows", "factor"])
def softmax_blocks_kernel(
    payload_ptr,
    factor_ptr,
    seen_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    width,
    factor,
    HAS_MASK: tl.constexpr,
    IS_SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Probabilities of whole rows; see the reference."""
    tile = places(num_rows, width, R, C)
    _, _, inside_RC, at_RC = tile
    x_RC = load_blocks(payload_ptr, factor_ptr, tile, width, COLUMNS, IS_SHIFT)
    seen_RC = inside_RC
    if HAS_MASK:
        seen_RC = tl.load(seen_ptr + at_RC, mask=inside_RC, other=0) != 0
        x_RC = tl.where(seen_RC, x_RC, 0.0)
    value_RC, exponent_R = align_rows(x_RC, LOGIT_BITS)
    result = probabilities(value_RC, exponent_R, seen_RC, factor, weight_ptr, False)
    out_RC, _ = result
    tl.store(out_ptr + at_RC, out_RC.to(tl.uint8), mask=inside_RC)


@triton.jit(do_not_specialize=["num_rows"])
def gelu_blocks_kernel(
    payload_ptr,
    factor_ptr,
    table_ptr,
    out_ptr,
    out_factor_ptr,
    num_rows,
    width,
    LIMIT: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    QMAX: tl.constexpr,
    QMAX_MANTISSA: tl.constexpr,
    IS_SHIFT: tl.constexpr,
):
    """The function of whole rows; see the reference."""
    tile = places(num_rows, width, R, C)
    x_RC = load_blocks(payload_ptr, factor_ptr, tile, width, W, IS_SHIFT)
    value_RC, exponent_R = align_rows(x_RC, ROW_BITS)
    value_RC, exponent_R = activated(value_RC, exponent_R, table_ptr, LIMIT)
    y_RC = value_RC.to(tl.float32) * power_of_two(exponent_R)[:, None]
    store_blocks(
        y_RC, out_ptr, out_factor_ptr, tile, num_rows, width, R, C, W, BITS, QMAX, QMAX_MANTISSA, IS_SHIFT
    )


@triton.jit(do_not_specialize=["num_rows", "mean", "root", "eps", "eps_exponent", "shift", "exponent"])
def layernorm_blocks_kernel(
    payload_ptr,
    factor_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    out_factor_ptr,
    num_rows,
    width,
    mean,
    root,
    eps,
    eps_exponent,
    shift,
    exponent,
    IS_CENTRED: tl.constexpr,
    HAS_BETA: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BITS: tl.constexpr,
    QMAX: tl.constexpr,
    QMAX_MANTISSA: tl.constexpr,
    IS_SHIFT: tl.constexpr,
):
    """The norm of whole rows; see the reference."""
    tile = places(num_rows, width, R, C)
    _, column_C, inside_RC, _ = tile
    x_RC = load_blocks(payload_ptr, factor_ptr, tile, width, W, IS_SHIFT)
    value_RC, exponent_R = align_rows(x_RC, ROW_BITS)
    normal_RC = normalised(value_RC, exponent_R, inside_RC, mean, root, eps, eps_exponent, IS_CENTRED)
    value_RC = scaled(normal_RC, gamma_ptr, beta_ptr, column_C, width, shift, HAS_BETA)
    y_RC = value_RC.to(tl.float32) * power_of_two(exponent)
    store_blocks(
        y_RC, out_ptr, out_factor_ptr, tile, num_rows, width, R, C, W, BITS, QMAX, QMAX_MANTISSA, IS_SHIFT
    )
