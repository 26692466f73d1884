"""What ``block_dequantize`` means, in plain torch; also how it runs wherever there is no kernel.

The next chapter is :mod:`lightning_compress.ops.block_dequantize.triton_kernel`.

Shape legend: R rows, C columns, P blocks over the rows, Q blocks over the columns, r and c the sides of a block;
any dimensions may come before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.ops.block_quantize.reference import power_of_two, split_blocks

__all__ = ["block_dequantize", "real_factors"]


def block_dequantize(payload_RC: Tensor, factor_PQ: Tensor, rows: int, columns: int) -> Tensor:
    """Multiply integers by the factors of their blocks. Arguments are not checked.

    Args:
        payload_RC: Integers ``[..., R, C]``.
        factor_PQ: Float32 scales or int8 exponents of two ``[..., P, Q]``.
        rows: Rows of a block, 0 for all.
        columns: Columns of a block, 0 for all.

    Returns:
        ``[..., R, C]``, float32.

    Example:
        >>> block_dequantize(torch.tensor([[2, -3]], dtype=torch.int8), torch.tensor([[0.5]]), rows=0, columns=0)
        tensor([[ 1.0000, -1.5000]])
    """
    blocks_PrQc = split_blocks(payload_RC.float(), rows, columns)
    product_PrQc = blocks_PrQc * real_factors(factor_PQ)[..., :, None, :, None]
    product_RC = product_PrQc.flatten(-2).flatten(-3, -2)
    return product_RC[..., : payload_RC.shape[-2], : payload_RC.shape[-1]].contiguous()


def real_factors(factor_PQ: Tensor) -> Tensor:
    """Factors as float32: scales as they are, exponents as powers of two."""
    return factor_PQ if factor_PQ.dtype == torch.float32 else power_of_two(factor_PQ)
