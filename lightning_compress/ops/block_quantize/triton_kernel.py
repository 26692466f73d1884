"""``block_quantize`` as one Triton kernel: a program reads some blocks once. Needs the extra ``triton``.

Blocks of more elements than a program can hold, such as a whole large matrix, are left to plain torch.

Shape legend: R rows, C columns, P blocks over the rows, Q blocks over the columns; in a program G blocks below each
other, H rows and W columns of each, padded to powers of two.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.block_quantize import reference
from lightning_compress.ops.block_quantize.reference import num_blocks
from lightning_compress.ops.fixed_point.triton_functions import power_of_two

__all__ = ["block_quantize", "integer_constants", "quantize_kernel", "round_to_even", "tile_sizes"]

MAX_ELEMENTS = 16_384
"""Elements of one block, padded, that a program holds."""

NUM_ELEMENTS = 4096
"""Elements of a program, if its blocks are smaller."""

ALL = tl.constexpr(2**30)
"""Stands for the side of a block that has all there are."""


def block_quantize(x_RC: Tensor, bits: int, rows: int, columns: int, factor: str) -> tuple[Tensor, Tensor]:
    """Do what :func:`lightning_compress.ops.block_quantize.reference.block_quantize` does, equal bit for bit.

    Arguments are not checked. Elements that are not finite give unspecified integers.
    """
    *leading, num_rows, num_columns = x_RC.shape
    sizes = tile_sizes(num_rows, num_columns, rows, columns)
    if sizes["H"] * sizes["W"] > MAX_ELEMENTS or x_RC.numel() == 0:
        return reference.block_quantize(x_RC, bits, rows, columns, factor)
    x_RC = (x_RC.float() if x_RC.dtype == torch.float64 else x_RC).contiguous()
    down, across = num_blocks(num_rows, rows), num_blocks(num_columns, columns)
    payload_RC = torch.empty(x_RC.shape, dtype=torch.int8, device=x_RC.device)
    kind = torch.int8 if factor == "shift" else torch.float32
    factor_PQ = torch.empty(*leading, down, across, dtype=kind, device=x_RC.device)
    num_matrices = x_RC.numel() // (num_rows * num_columns)
    grid = (triton.cdiv(down, sizes["G"]), across, num_matrices)
    constants: dict[str, Any] = sizes | integer_constants(bits) | {"IS_SHIFT": factor == "shift"}
    with torch.cuda.device_of(x_RC):  # Triton launches on the current device
        quantize_kernel[grid](x_RC, payload_RC, factor_PQ, num_rows, num_columns, down, **constants)
    return payload_RC, factor_PQ


def tile_sizes(num_rows: int, num_columns: int, rows: int, columns: int) -> dict[str, Any]:
    """Return the constants that the kernel is compiled with for these sizes, and how it is run.

    Example:
        >>> {name: tile_sizes(50, 384, 1, 128)[name] for name in "GHW"}
        {'G': 32, 'H': 1, 'W': 128}
    """
    high = triton.next_power_of_2(min(rows or num_rows, num_rows) or 1)
    wide = triton.next_power_of_2(min(columns or num_columns, num_columns) or 1)
    return {
        "ROWS": rows or ALL.value,
        "COLUMNS": columns or ALL.value,
        "G": max(NUM_ELEMENTS // (high * wide), 1),
        "H": high,
        "W": wide,
        "num_warps": 8 if high * wide > NUM_ELEMENTS else 4,
    }


def integer_constants(bits: int) -> dict[str, Any]:
    """Return the constants of integers with this many bits: the largest, and its float32 behind the leading one.

    Example:
        >>> integer_constants(3)  # 3 is 1.5 times 2
        {'BITS': 3, 'QMAX': 3, 'QMAX_MANTISSA': 4194304}
    """
    largest = 2 ** (bits - 1) - 1
    (pattern,) = struct.unpack("<i", struct.pack("<f", largest))
    return {"BITS": bits, "QMAX": largest, "QMAX_MANTISSA": pattern & 0x7FFFFF}


@triton.jit(do_not_specialize=["num_rows", "num_down"])
def quantize_kernel(
    x_ptr,
    payload_ptr,
    factor_ptr,
    num_rows,
    num_columns,
    num_down,
    BITS: tl.constexpr,
    QMAX: tl.constexpr,
    QMAX_MANTISSA: tl.constexpr,
    IS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
):
    """Find the largest magnitude of each block, its factor, and its integers; see the module."""
    block_G = tl.program_id(0) * G + tl.arange(0, G)
    matrix = tl.program_id(2).to(tl.int64)
    high_H, wide_W = tl.arange(0, H), tl.arange(0, W)
    row_GH = block_G[:, None] * ROWS + high_H[None, :]
    column_W = tl.program_id(1) * COLUMNS + wide_W
    inside_GH = (row_GH < num_rows) & (high_H < ROWS)[None, :] & (block_G < num_down)[:, None]
    mask_GHW = inside_GH[:, :, None] & ((column_W < num_columns) & (wide_W < COLUMNS))[None, None, :]
    at_GHW = (matrix * num_rows + row_GH)[:, :, None] * num_columns + column_W[None, None, :]
    x_GHW = tl.load(x_ptr + at_GHW, mask=mask_GHW, other=0.0).to(tl.float32)
    amax_G = tl.max(tl.max(tl.abs(x_GHW), axis=2), axis=1)
    if IS_SHIFT:
        pattern_G = amax_G.to(tl.int32, bitcast=True)
        e_G = (pattern_G >> 23) - 126 - (BITS - 1) + ((pattern_G & 0x7FFFFF) > QMAX_MANTISSA).to(tl.int32)
        e_G = tl.minimum(tl.maximum(e_G, -32), 31)
        quotient_GHW = x_GHW * power_of_two(-e_G)[:, None, None]
        factor_G = e_G.to(tl.int8)
    else:
        factor_G = tl.div_rn(amax_G, tl.full((G,), QMAX, tl.float32))
        divisor_G = tl.where(factor_G > 0, factor_G, 1.0)
        quotient_GHW = tl.div_rn(x_GHW, tl.broadcast_to(divisor_G[:, None, None], (G, H, W)))
    integer_GHW = round_to_even(tl.minimum(tl.maximum(quotient_GHW, -QMAX), QMAX))
    tl.store(payload_ptr + at_GHW, integer_GHW.to(tl.int8), mask=mask_GHW)
    factor_at_G = (matrix * num_down + block_G) * tl.num_programs(1) + tl.program_id(1)
    tl.store(factor_ptr + factor_at_G, factor_G, mask=block_G < num_down)


@triton.jit
def round_to_even(x):
    """Nearest whole number, halves to even, of magnitudes below 2^22: above 2^23 float32 has no fractions."""
    return (x + 12582912.0) - 12582912.0
