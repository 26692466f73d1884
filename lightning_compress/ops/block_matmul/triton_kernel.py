"""``block_matmul`` as one Triton kernel: int8 tensor cores within a block, factors on sums. Needs the extra ``triton``.

A program computes a tile of outputs. The integers of a block over K are multiplied and summed in int32; only these
sums meet the factors, not the operands, so that 1 x 128 by 128 x 128 costs one multiplication per output and block.
With exponents the largest is found in a first, short pass over the factors, and all the rest is whole numbers.

Shape legend: M rows of a, N rows of b, K columns of both; P, Q blocks over rows and columns; in a tile BM, BN, BK.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_compress.ops.fixed_point.triton_functions import power_of_two

__all__ = ["block_matmul", "matmul_kernel", "tile_sizes"]

ALL = 2**30
"""Stands for the side of a block that has all there are."""


def block_matmul(
    a_MK: Tensor,
    a_factor_PQ: Tensor,
    b_NK: Tensor,
    b_factor_PQ: Tensor,
    bias_N: Tensor | None,
    a_rows: int,
    a_columns: int,
    b_rows: int,
    b_columns: int,
    guard_bits: int,
) -> Tensor:
    """Do what :func:`lightning_compress.ops.block_matmul.reference.block_matmul` does, equal bit for bit.

    Arguments are not checked.
    """
    *leading, num_rows, depth = a_MK.shape
    num_outputs = b_NK.shape[-2]
    out_MN = torch.empty(*leading, num_rows, num_outputs, dtype=torch.float32, device=a_MK.device)
    if out_MN.numel() == 0:
        return out_MN
    edge = min(a_columns or depth, b_columns or depth)
    is_unsigned = a_MK.dtype == torch.uint8
    largest = (255 if is_unsigned else 127) * 127
    is_shift = a_factor_PQ.dtype == torch.int8
    sizes = tile_sizes(num_rows, num_outputs, edge, is_shift)
    constants: dict[str, Any] = {
        "A_ROWS": a_rows or ALL,
        "B_ROWS": b_rows or ALL,
        "A_IS_ONE": a_factor_PQ.shape[-1] == 1,
        "B_IS_ONE": b_factor_PQ.shape[-1] == 1,
        "GUARD_BITS": guard_bits,
        "IS_SHIFT": is_shift,
        "IS_UNSIGNED": is_unsigned,
        "IS_WIDE": depth * largest * 2**guard_bits >= 2**30,
        "HAS_BIAS": bias_N is not None,
    }
    num_matrices = out_MN.numel() // (num_rows * num_outputs)
    grid = (triton.cdiv(num_rows, sizes["BM"]), triton.cdiv(num_outputs, sizes["BN"]), num_matrices)
    with torch.cuda.device_of(out_MN):  # Triton launches on the current device
        matmul_kernel[grid](
            a_MK.contiguous(),
            a_factor_PQ.contiguous(),
            b_NK.contiguous(),
            b_factor_PQ.contiguous(),
            out_MN if bias_N is None else bias_N.contiguous(),
            out_MN,
            num_rows,
            num_outputs,
            depth,
            max(edge, 1),
            a_factor_PQ.shape[-2],
            b_factor_PQ.shape[-2],
            **constants,
            **sizes,
        )
    return out_MN


def tile_sizes(num_rows: int, num_outputs: int, edge: int, is_shift: bool) -> dict[str, Any]:
    """Return the tile that the kernel is compiled with for these sizes, and how it is run.

    Exponents need more registers for each output than scales do, so that their tiles are smaller.

    Example:
        >>> [tile_sizes(1000, 384, 128, is_shift)["BM"] for is_shift in (False, True)]
        [64, 32]
    """
    tall = min(max(triton.next_power_of_2(num_rows), 16), 32 if is_shift else 64)
    broad = min(max(triton.next_power_of_2(num_outputs), 16), 64 if is_shift else 128)
    deep = min(max(triton.next_power_of_2(edge or 1), 32), 128)
    return {
        "BM": tall,
        "BN": broad,
        "BK": deep,
        "IS_ONE_STEP": edge <= deep,
        "num_warps": 8 if tall * broad >= 2048 else 4,
        "num_stages": 3,
        "enable_fp_fusion": False,  # so that it rounds as the reference does
    }


@triton.jit(do_not_specialize=["num_rows", "a_down", "b_down"])
def matmul_kernel(
    a_ptr,
    a_factor_ptr,
    b_ptr,
    b_factor_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    depth,
    edge,
    a_down,
    b_down,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    A_IS_ONE: tl.constexpr,
    B_IS_ONE: tl.constexpr,
    GUARD_BITS: tl.constexpr,
    IS_SHIFT: tl.constexpr,
    IS_UNSIGNED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IS_ONE_STEP: tl.constexpr,
):
    """Compute a tile of outputs; see the module. All matrices are contiguous."""
    row_M = tl.program_id(0) * BM + tl.arange(0, BM)
    output_N = tl.program_id(1) * BN + tl.arange(0, BN)
    matrix = tl.program_id(2).to(tl.int64)
    is_row_M, is_output_N = row_M < num_rows, output_N < num_outputs
    a_row_M = a_ptr + (matrix * num_rows + row_M)[:, None] * depth
    b_row_N = b_ptr + (matrix * num_outputs + output_N)[:, None] * depth
    num_blocks = tl.cdiv(depth, edge)
    a_stride = 1 if A_IS_ONE else num_blocks
    b_stride = 1 if B_IS_ONE else num_blocks
    a_factor_M = a_factor_ptr + (matrix * a_down + row_M // A_ROWS) * a_stride
    b_factor_N = b_factor_ptr + (matrix * b_down + output_N // B_ROWS) * b_stride
    if HAS_BIAS:
        bias_N = tl.load(bias_ptr + output_N, mask=is_output_N, other=0.0)
    if IS_SHIFT:
        largest_MN = tl.full((BM, BN), -64, tl.int32)
        for k in range(0, num_blocks):
            a_e_M = _factors(a_factor_M, is_row_M, k, A_IS_ONE).to(tl.int32)
            b_e_N = _factors(b_factor_N, is_output_N, k, B_IS_ONE).to(tl.int32)
            largest_MN = tl.maximum(largest_MN, a_e_M[:, None] + b_e_N[None, :])
        if HAS_BIAS:
            least_N = ((bias_N.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126 + GUARD_BITS - 30
            largest_MN = tl.maximum(largest_MN, least_N[None, :])
        sum_MN = tl.zeros((BM, BN), tl.int64 if IS_WIDE else tl.int32)
    else:
        sum_MN = tl.zeros((BM, BN), tl.float32)
    for k in range(0, num_blocks):
        first = k * edge
        last = tl.minimum(first + edge, depth)
        product_MN = tl.zeros((BM, BN), tl.int32)
        if IS_ONE_STEP:
            product_MN = _add_products(
                product_MN, a_row_M, b_row_N, is_row_M, is_output_N, first, last, IS_UNSIGNED, BK
            )
        else:
            for at in range(first, last, BK):
                product_MN = _add_products(
                    product_MN, a_row_M, b_row_N, is_row_M, is_output_N, at, last, IS_UNSIGNED, BK
                )
        a_M = _factors(a_factor_M, is_row_M, k, A_IS_ONE)
        b_N = _factors(b_factor_N, is_output_N, k, B_IS_ONE)
        if IS_SHIFT:
            shift_MN = largest_MN - (a_M.to(tl.int32)[:, None] + b_N.to(tl.int32)[None, :])
            sum_MN += _shift_right(product_MN.to(sum_MN.dtype) << GUARD_BITS, shift_MN, 62 if IS_WIDE else 30)
        else:
            sum_MN += product_MN.to(tl.float32) * (a_M[:, None] * b_N[None, :])
    if IS_SHIFT:
        if HAS_BIAS:
            sum_MN += _aligned_bias(bias_N, largest_MN - GUARD_BITS).to(sum_MN.dtype)
        out_MN = sum_MN.to(tl.float32) * power_of_two(largest_MN - GUARD_BITS)
    elif HAS_BIAS:
        out_MN = sum_MN + bias_N[None, :]
    else:
        out_MN = sum_MN
    out_at_MN = (matrix * num_rows + row_M)[:, None] * num_outputs + output_N[None, :]
    tl.store(out_ptr + out_at_MN, out_MN, mask=is_row_M[:, None] & is_output_N[None, :])


@triton.jit
def _factors(row_ptr, is_row, k, IS_ONE: tl.constexpr):
    """Factors of the k-th block over K; one for all of K if there is but one."""
    return tl.load(row_ptr + (0 if IS_ONE else k), mask=is_row, other=0)


@triton.jit
def _add_products(
    product_MN,
    a_row_M,
    b_row_N,
    is_row_M,
    is_output_N,
    first,
    last,
    IS_UNSIGNED: tl.constexpr,
    BK: tl.constexpr,
):
    """Add the integer products over some columns; uint8 goes through int8, moved by 128."""
    column_K = first + tl.arange(0, BK)
    is_column_K = (column_K < last)[None, :]
    a_MK = tl.load(a_row_M + column_K[None, :], mask=is_row_M[:, None] & is_column_K, other=0)
    b_NK = tl.load(b_row_N + column_K[None, :], mask=is_output_N[:, None] & is_column_K, other=0)
    if IS_UNSIGNED:
        a_MK = (a_MK ^ 128).to(tl.int8, bitcast=True)
        product_MN += tl.sum(b_NK.to(tl.int32), axis=1)[None, :] * 128
    return tl.dot(a_MK, tl.trans(b_NK), acc=product_MN, out_dtype=tl.int32)


@triton.jit
def _shift_right(value, shift, LARGEST: tl.constexpr):
    """Divide whole numbers by 2^shift, halves to even; beyond LARGEST they are too small to leave anything."""
    places = tl.minimum(shift, LARGEST).to(value.dtype)
    below = value >> places
    twice = (value - (below << places)) * 2
    one = tl.full(value.shape, 1, value.dtype) << places
    is_up = (twice > one) | ((twice == one) & ((below & 1) == 1))
    return tl.where(shift > LARGEST, 0, below + is_up.to(value.dtype))


@triton.jit
def _aligned_bias(bias_N, exponent_MN):
    """Whole numbers nearest to ``bias / 2^exponent``, below 2^30."""
    pattern_N = bias_N.to(tl.int32, bitcast=True)
    own_N = (pattern_N >> 23) & 0xFF
    magnitude_N = tl.where(own_N > 0, (pattern_N & 0x7FFFFF) | 0x800000, 0)  # times 2^(own - 150)
    signed_N = tl.where(pattern_N < 0, -magnitude_N, magnitude_N)
    shift_MN = exponent_MN + 150 - own_N[None, :]  # at least -7, and 24 + 7 bits fit
    return _shift_right(signed_N[None, :] << tl.maximum(-shift_MN, 0), tl.maximum(shift_MN, 0), 30)
