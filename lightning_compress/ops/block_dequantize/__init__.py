"""``lightning_compress::block_dequantize``: integers times the factors of their blocks.

Schema, checks and shapes are here; the next chapter is :mod:`lightning_compress.ops.block_dequantize.reference`, which
is the meaning. The integers come from :mod:`lightning_compress.ops.block_quantize`.

Shape legend: R rows, C columns, P blocks over the rows, Q blocks over the columns; any dimensions may come before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_compress.ops.block_dequantize import reference
from lightning_compress.ops.block_quantize import check_block
from lightning_compress.ops.block_quantize.reference import num_blocks

__all__ = ["block_dequantize", "check_payload"]


def block_dequantize(payload_RC: Tensor, factor_PQ: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the real numbers that integers and factors stand for; no gradient.

    Args:
        payload_RC: Integers ``[..., R, C]``, int8, or uint8.
        factor_PQ: Factors ``[..., P, Q]``: float32 scales, or int8 exponents of two.
        block: Rows and columns of a block; 0 means all there are.

    Returns:
        ``[..., R, C]``, float32, contiguous: exact for exponents, rounded once for scales.

    Raises:
        TypeError: If the integers or the factors have another dtype.
        ValueError: If shapes do not fit together, or the tensors are on different devices.

    Example:
        >>> payload = torch.tensor([[4, -1], [3, 7]], dtype=torch.int8)
        >>> block_dequantize(payload, torch.tensor([[-2], [1]], dtype=torch.int8), (1, 0)).tolist()
        [[1.0, -0.25], [6.0, 14.0]]
    """
    rows, columns = check_payload("payload_RC", payload_RC, factor_PQ, block)
    return torch.ops.lightning_compress.block_dequantize.default(payload_RC, factor_PQ, rows, columns)


def check_payload(
    name: str, payload_RC: Tensor, factor_PQ: Tensor, block: tuple[int, int]
) -> tuple[int, int]:
    """Return the sides of a block of integers, their factors and blocks having been found to fit together.

    Raises:
        TypeError: If the integers are neither int8 nor uint8, or the factors neither float32 nor int8.
        ValueError: If shapes do not fit together, or the tensors are on different devices.
    """
    if payload_RC.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{name} is {payload_RC.dtype}: give int8, as block_quantize returns, or uint8")
    if factor_PQ.dtype not in (torch.float32, torch.int8):
        raise TypeError(f"the factors of {name} are {factor_PQ.dtype}: give float32 scales or int8 exponents")
    rows, columns = check_block(f"the block of {name}", block)
    if payload_RC.dim() < 2:
        raise ValueError(f"{name} is shaped {tuple(payload_RC.shape)}: give [..., R, C]")
    *leading, num_rows, num_columns = payload_RC.shape
    expected = (*leading, num_blocks(num_rows, rows), num_blocks(num_columns, columns))
    if tuple(factor_PQ.shape) != expected:
        raise ValueError(
            f"{name} is shaped {tuple(payload_RC.shape)}, in blocks of {block}: its factors are shaped "
            f"{tuple(factor_PQ.shape)}, but have to be {expected}"
        )
    if payload_RC.device != factor_PQ.device:
        raise ValueError(
            f"{name} and its factors are on {payload_RC.device} and {factor_PQ.device}: move them to one device"
        )
    return rows, columns


torch.library.define(
    "lightning_compress::block_dequantize",
    "(Tensor payload, Tensor factors, int rows, int columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(
    "lightning_compress::block_dequantize", "CompositeExplicitAutograd", reference.block_dequantize
)


@cache
def _cuda_implementation() -> Callable[[Tensor, Tensor, int, int], Tensor]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.block_dequantize
    from lightning_compress.ops.block_dequantize import triton_kernel

    return triton_kernel.block_dequantize


@torch.library.impl("lightning_compress::block_dequantize", "CUDA")
def _block_dequantize_on_cuda(payload_RC: Tensor, factor_PQ: Tensor, rows: int, columns: int) -> Tensor:
    return _cuda_implementation()(payload_RC, factor_PQ, rows, columns)


@torch.library.register_fake("lightning_compress::block_dequantize")
def _fake(payload_RC: Tensor, factor_PQ: Tensor, rows: int, columns: int) -> Tensor:
    return payload_RC.new_empty(payload_RC.shape, dtype=torch.float32)
