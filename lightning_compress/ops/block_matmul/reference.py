"""What ``block_matmul`` means, in plain torch; also how it runs wherever there is no kernel.

Two plain matrices of int8 with scales, in blocks that are not too narrow, are multiplied as integers where the
processor can. Others are multiplied as float32, which is exact while a sum stays below 2^24: no integer is lost, and
products are as fast as those of float32. The next chapter is :mod:`lightning_compress.ops.block_matmul.triton_kernel`.

Shape legend: M rows of a, N rows of b, K columns of both, D of them in a block; P, Q blocks over rows and columns;
any dimensions may come before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_compress.ops.block_dequantize.reference import block_dequantize
from lightning_compress.ops.block_quantize.reference import power_of_two

__all__ = ["bias_exponents", "block_matmul", "largest_exponents"]

TILE = 2**17
"""Outputs at once, so that they stay in the cache while blocks are added."""

MIN_ROWS = 32
"""Rows at once of each matrix, however many matrices there are: products of fewer are slow."""

MIN_DEPTH = 64
"""Columns of a block below which integers are multiplied as floats."""

_int_mm: Any = getattr(torch, "_int_mm", None)  # it is not exported

_LARGEST = {torch.int8: 127, torch.uint8: 255}


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
    """Multiply integers in blocks. Arguments are not checked, except for a finite bias on CPU.

    With p_k the int32 product of the k-th blocks over K, and g guard bits::

        scale:  y = sum_k (sa_k sb_k) p_k + bias                      float32, k ascending
        shift:  E = max_k(ea_k + eb_k)                                for each output
                y = (sum_k rshift(p_k 2^g, E - ea_k - eb_k) + rshift(bias, E - g)) 2^(E - g)

    where ``rshift`` divides by a power of two and rounds halves to even. So that the bias fits into int32, E is raised
    to where it is below 2^30; with the exponents of usual weights and biases it stays where it is.

    Args:
        a_MK: Integers ``[..., M, K]``.
        a_factor_PQ: Float32 scales, or int8 exponents.
        b_NK: Integers ``[..., N, K]``.
        b_factor_PQ: As those of ``a_MK``.
        bias_N: Float32, or None.
        a_rows: Rows of a block of ``a_MK``, 0 for all.
        a_columns: Columns of a block of ``a_MK``, 0 for all.
        b_rows: Rows of a block of ``b_NK``, 0 for all.
        b_columns: Columns of a block of ``b_NK``, 0 for all.
        guard_bits: Bits behind the point of a sum, for exponents.

    Returns:
        ``[..., M, N]``, float32.

    Raises:
        ValueError: If the bias is not finite, on CPU.
    """
    depth = a_MK.shape[-1]
    edge = min(a_columns or depth, b_columns or depth)
    is_shift = a_factor_PQ.dtype == torch.int8
    if is_shift and bias_N is not None and bias_N.device.type == "cpu" and not bool(bias_N.isfinite().all()):
        raise ValueError("bias_N has an element that is NaN or infinite: give finite numbers")
    largest = _LARGEST[a_MK.dtype] * 127
    exact = (2**24 - 1) // largest
    if is_shift:  # powers of two lose nothing: integers and exponents are multiplied at once
        a_MK = block_dequantize(a_MK, a_factor_PQ, a_rows, a_columns)
        b_NK = block_dequantize(b_NK, b_factor_PQ, b_rows, b_columns)
    if edge >= MIN_DEPTH and _has_integer_product(a_MK, b_NK):
        # rows that share memory would be multiplied wrongly
        a_MK, b_NK = a_MK.contiguous(), b_NK.contiguous()
    else:
        a_MK, b_NK = a_MK.float(), b_NK.float()
    a_blocks, b_blocks = _over_depth(a_MK, edge), _over_depth(b_NK, edge)
    a_factor_MQ = _over_rows(a_factor_PQ, a_rows, a_MK.shape[-2], len(a_blocks))
    b_factor_NQ = _over_rows(b_factor_PQ, b_rows, b_NK.shape[-2], len(b_blocks))
    fits = depth * largest * 2**guard_bits < 2**30  # with the bias, below 2^31
    out_MN = a_factor_PQ.new_zeros(*a_MK.shape[:-1], b_NK.shape[-2], dtype=torch.float32)
    with torch.autocast(a_MK.device.type, enabled=False):
        for rows in _tiles(out_MN):
            partial_MN = (
                _product(a_MD[..., rows, :], b_ND, exact)
                for a_MD, b_ND in zip(a_blocks, b_blocks, strict=True)
            )
            factor_MQ = a_factor_MQ[..., rows, :]
            if not is_shift:
                tile_MN = _scaled_sum(partial_MN, factor_MQ, b_factor_NQ, bias_N)
            else:
                tile_MN = _shifted_sum(partial_MN, factor_MQ, b_factor_NQ, bias_N, guard_bits, fits)
            out_MN[..., rows, :] = tile_MN
    return out_MN


def bias_exponents(bias_N: Tensor, guard_bits: int) -> Tensor:
    """Smallest exponents E at which a bias, divided by ``2^(E - guard_bits)``, is below 2^30; int32.

    Example:
        >>> bias_exponents(torch.tensor([1.0, -0.75, 2.0**40]), guard_bits=6).tolist()
        [-23, -24, 17]
    """
    _, exponent_N = torch.frexp(bias_N)
    return torch.where(bias_N == 0, -126, exponent_N).clamp(min=-126) + (guard_bits - 30)


def _scaled_sum(
    partial_MN: Iterator[Tensor], a_factor_MQ: Tensor, b_factor_NQ: Tensor, bias_N: Tensor | None
) -> Tensor:
    sum_MN: Tensor | float = 0.0
    for k, product_MN in enumerate(partial_MN):
        scale_MN = a_factor_MQ[..., :, None, k] * b_factor_NQ[..., None, :, k]
        # not `addcmul`, which may or may not round in between
        sum_MN = product_MN.float().mul_(scale_MN).add_(sum_MN)
    return sum_MN + (0.0 if bias_N is None else bias_N)  # type: ignore[return-value]


def _shifted_sum(
    partial_MN: Iterator[Tensor],
    a_factor_MQ: Tensor,
    b_factor_NQ: Tensor,
    bias_N: Tensor | None,
    guard_bits: int,
    fits: bool,
) -> Tensor:
    """Sum aligned integers, in int32 where they fit, else in float64, which holds them just as exactly."""
    exponent_MN = largest_exponents(a_factor_MQ, b_factor_NQ)
    if bias_N is not None:
        exponent_MN = torch.maximum(exponent_MN, bias_exponents(bias_N, guard_bits))
    unit_MN = power_of_two(guard_bits - exponent_MN)
    sum_MN = torch.zeros_like(exponent_MN, dtype=torch.int32 if fits else torch.float64)
    for product_MN in partial_MN:
        sum_MN += product_MN.mul_(unit_MN).round_().to(sum_MN.dtype)
    if bias_N is not None:
        sum_MN += (bias_N * unit_MN).round_().to(sum_MN.dtype)
    return sum_MN.float() * power_of_two(exponent_MN - guard_bits)


def largest_exponents(a_factor_MQ: Tensor, b_factor_NQ: Tensor) -> Tensor:
    """Return the largest sum of two exponents that a product of blocks has, int32 ``[..., M, N]``.

    Args:
        a_factor_MQ: Exponents of each row's blocks, int8.
        b_factor_NQ: As many for each row of the other matrix.

    Example:
        >>> a_factor_MQ, b_factor_NQ = torch.tensor([[-3, 2]]).char(), torch.tensor([[4, -2], [0, 1]]).char()
        >>> largest_exponents(a_factor_MQ, b_factor_NQ)
        tensor([[1, 3]], dtype=torch.int32)
    """
    shape = (*a_factor_MQ.shape[:-1], b_factor_NQ.shape[-2])
    largest_MN = a_factor_MQ.new_full(shape, -64)  # of all sums of two exponents the smallest
    for k in range(a_factor_MQ.shape[-1]):
        sum_MN = a_factor_MQ[..., :, None, k] + b_factor_NQ[..., None, :, k]
        torch.maximum(largest_MN, sum_MN, out=largest_MN)
    return largest_MN.int()


def _product(a_MD: Tensor, b_ND: Tensor, exact: int) -> Tensor:
    """Product of integers, or of integers times powers of two, without rounding."""
    if a_MD.dtype == torch.int8:
        return _int_mm(a_MD, b_ND.mT)
    if a_MD.shape[-1] <= exact:
        return a_MD @ b_ND.mT
    pieces = zip(_over_depth(a_MD, exact), _over_depth(b_ND, exact), strict=True)
    return sum((a @ b.mT).double() for a, b in pieces)  # type: ignore[return-value]


def _has_integer_product(a_MK: Tensor, b_NK: Tensor) -> bool:
    is_plain = a_MK.dim() == 2 and a_MK.dtype == b_NK.dtype == torch.int8
    return is_plain and a_MK.device.type == "cpu" and min(a_MK.shape + b_NK.shape) > 0 and _is_exact_here()


@cache
def _is_exact_here() -> bool:
    """Whether this processor multiplies 8-bit integers, and saturates nowhere on the way: those before VNNI do."""
    if _int_mm is None or not torch.cpu._is_vnni_supported():
        return False
    extreme_MK = torch.full((32, 256), 127, dtype=torch.int8)
    signed_MK = extreme_MK * torch.tensor([1, -1], dtype=torch.int8).repeat(128)
    products = (_int_mm(extreme_MK, other_MK.mT) for other_MK in (extreme_MK, -extreme_MK, signed_MK))
    sums = (256 * 127**2, -256 * 127**2, 0)
    return all(bool((product == total).all()) for product, total in zip(products, sums, strict=True))


def _over_depth(a_MK: Tensor, edge: int) -> list[Tensor]:
    return [a_MK[..., start : start + edge] for start in range(0, a_MK.shape[-1], max(edge, 1))]


def _over_rows(factor_PQ: Tensor, rows: int, num_rows: int, num_columns: int) -> Tensor:
    """Factors of each row of a matrix, of each block over its columns."""
    if rows != 1:
        block = torch.arange(num_rows, device=factor_PQ.device) // (rows or max(num_rows, 1))
        factor_PQ = factor_PQ[..., block, :]
    return factor_PQ.expand(*factor_PQ.shape[:-1], num_columns)


def _tiles(out_MN: Tensor) -> Iterator[slice]:
    num_rows = out_MN.shape[-2]
    step = max(MIN_ROWS, TILE * num_rows // max(out_MN.numel(), 1))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
