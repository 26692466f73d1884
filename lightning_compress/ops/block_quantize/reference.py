"""What ``block_quantize`` means, in plain torch; also how it runs wherever there is no kernel.

The next chapter is :mod:`lightning_compress.ops.block_quantize.triton_kernel`.

Shape legend: R rows, C columns, P blocks over the rows, Q blocks over the columns, r and c the sides of a block;
any dimensions may come before.
"""

from __future__ import annotations

from math import frexp

import torch
from torch import Tensor

__all__ = [
    "MAX_EXPONENT",
    "MIN_EXPONENT",
    "block_exponents",
    "block_quantize",
    "block_round",
    "block_scales",
    "num_blocks",
    "power_of_two",
    "split_blocks",
]

MIN_EXPONENT, MAX_EXPONENT = -32, 31
"""Exponents that a shift may have: 6 bits."""


def block_quantize(x_RC: Tensor, bits: int, rows: int, columns: int, factor: str) -> tuple[Tensor, Tensor]:
    """Round a matrix to integers, block by block. Arguments are not checked, except for finite elements on CPU.

    With ``amax`` the largest magnitude of a block and ``qmax = 2^(bits-1) - 1``::

        shift:  e = ceil(log2(amax / qmax)), from -32 to 31      q = clip(round(x 2^-e), -qmax, qmax)
        scale:  s = amax / qmax                                  q = clip(round(x / s), -qmax, qmax)

    Halves are rounded to even. A block of zeros has e = -32 or s = 0.

    Args:
        x_RC: Real numbers ``[..., R, C]``.
        bits: 2 to 8.
        rows: Rows of a block, 0 for all.
        columns: Columns of a block, 0 for all.
        factor: ``"scale"`` or ``"shift"``.

    Returns:
        Integers ``[..., R, C]``, int8, and factors ``[..., P, Q]``: float32 scales or int8 exponents.

    Raises:
        ValueError: If an element is not finite, on CPU.

    Example:
        >>> block_quantize(torch.tensor([[3.0, -1.5]]), bits=3, rows=1, columns=0, factor="scale")
        (tensor([[ 3, -2]], dtype=torch.int8), tensor([[1.]]))
    """
    integer_PrQc, factor_PQ, _ = _quantized(x_RC, bits, rows, columns, factor)
    return _joined(integer_PrQc.to(torch.int8), x_RC), factor_PQ


def block_round(x_RC: Tensor, bits: int, rows: int, columns: int, factor: str) -> Tensor:
    """Round a matrix to what its blocks can hold: the integers of :func:`block_quantize` times their factors, float32.

    Example:
        >>> block_round(torch.tensor([[3.0, -1.4]]), bits=3, rows=1, columns=0, factor="scale")
        tensor([[ 3., -1.]])
    """
    integer_PrQc, _, divisor_PQ = _quantized(x_RC, bits, rows, columns, factor)
    return _joined(integer_PrQc.mul_(divisor_PQ[..., :, None, :, None]), x_RC)


def split_blocks(x_RC: Tensor, rows: int, columns: int) -> Tensor:
    """View a matrix as blocks ``[..., P, r, Q, c]``, zeros behind its edges.

    Example:
        >>> split_blocks(torch.ones(3, 4), rows=2, columns=0).shape
        torch.Size([2, 2, 1, 4])
    """
    num_rows, num_columns = x_RC.shape[-2:]
    down, across = num_blocks(num_rows, rows), num_blocks(num_columns, columns)
    high, wide = rows or num_rows, columns or num_columns
    below, right = down * high - num_rows, across * wide - num_columns
    if below or right:
        x_RC = torch.nn.functional.pad(x_RC, (0, right, 0, below))
    return x_RC.reshape(*x_RC.shape[:-2], down, high, across, wide)


def num_blocks(size: int, side: int) -> int:
    """Number of blocks with this side over this size; side 0 is one block over all, which is none over nothing."""
    return (size + side - 1) // side if side else min(size, 1)


def block_scales(amax_PQ: Tensor, qmax: int) -> Tensor:
    """Scales ``amax / qmax``, float32."""
    return amax_PQ / qmax


def block_exponents(amax_PQ: Tensor, qmax: int) -> Tensor:
    """Smallest exponents e with ``amax <= qmax * 2^e``, from -32 to 31, int8; exact, without a logarithm.

    Example:
        >>> block_exponents(torch.tensor([127.0, 127.5, 0.0]), 127).tolist()
        [0, 1, -32]
    """
    mantissa_PQ, exponent_PQ = torch.frexp(amax_PQ)
    own_mantissa, own_exponent = frexp(qmax)
    e_PQ = exponent_PQ - own_exponent + (mantissa_PQ > own_mantissa)
    return torch.where(amax_PQ > 0, e_PQ, MIN_EXPONENT).clamp(MIN_EXPONENT, MAX_EXPONENT).to(torch.int8)


def power_of_two(exponent: Tensor) -> Tensor:
    """Exact powers of two, float32, of integer exponents from -126 to 127.

    Example:
        >>> power_of_two(torch.tensor([-2, 0, 3])).tolist()
        [0.25, 1.0, 8.0]
    """
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _quantized(
    x_RC: Tensor, bits: int, rows: int, columns: int, factor: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return integers ``[..., P, r, Q, c]`` as float32, factors, and what the integers are to be multiplied by."""
    blocks_PrQc = split_blocks(x_RC.float(), rows, columns)
    amax_PQ = _largest(blocks_PrQc)
    if x_RC.device.type == "cpu" and not bool(amax_PQ.isfinite().all()):
        raise ValueError("an element is NaN or infinite: quantise finite numbers only")
    qmax = 2 ** (bits - 1) - 1
    if factor == "scale":
        factor_PQ = block_scales(amax_PQ, qmax)
        divisor_PQ = torch.where(factor_PQ > 0, factor_PQ, 1)  # where the scale is 0, so are the integers
    else:
        factor_PQ = block_exponents(amax_PQ, qmax)
        divisor_PQ = power_of_two(factor_PQ)
    quotient_PrQc = blocks_PrQc / divisor_PQ[..., :, None, :, None]
    return quotient_PrQc.round_().clamp_(-qmax, qmax), factor_PQ, divisor_PQ


def _joined(blocks_PrQc: Tensor, x_RC: Tensor) -> Tensor:
    """Undo :func:`split_blocks`, to the shape of the matrix."""
    return blocks_PrQc.flatten(-2).flatten(-3, -2)[..., : x_RC.shape[-2], : x_RC.shape[-1]].contiguous()


def _largest(blocks_PrQc: Tensor) -> Tensor:
    """Largest magnitude of each block; NaN where it has one."""
    if blocks_PrQc.numel() == 0:
        return blocks_PrQc.new_zeros(*blocks_PrQc.shape[:-3], blocks_PrQc.shape[-2])
    smallest_PQ, largest_PQ = blocks_PrQc.amin(dim=(-3, -1)), blocks_PrQc.amax(dim=(-3, -1))
    return torch.maximum(largest_PQ, -smallest_PQ).abs()  # of zeros, none is negative
