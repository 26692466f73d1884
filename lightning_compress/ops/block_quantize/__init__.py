"""``lightning_compress::block_quantize``: a matrix becomes small integers and one factor per block.

Schema, checks and shapes are here; the next chapter is :mod:`lightning_compress.ops.block_quantize.reference`, which is
the meaning. The way back is :mod:`lightning_compress.ops.block_dequantize`.

Shape legend: R rows, C columns, P blocks over the rows, Q blocks over the columns; any dimensions may come before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_compress.ops.block_quantize import reference

__all__ = ["block_quantize", "check_block", "check_blocks"]

_FACTORS = {"scale": torch.float32, "shift": torch.int8}


def block_quantize(x_RC: Tensor, bits: int, block: tuple[int, int], factor: str) -> tuple[Tensor, Tensor]:
    """Round a matrix to signed integers, block by block, so that the largest magnitude of a block just fits.

    No gradient: :func:`lightning_compress.nn.fake_quantize.fake_quantize` has a straight-through one. With
    ``"shift"`` magnitudes above (2^(bits-1) - 1) * 2^31 are cut to it, and those below 2^-33 become zero.

    Args:
        x_RC: Real numbers ``[..., R, C]`` of any floating dtype and strides; they are rounded to float32 first. Each
            matrix has blocks of its own: none crosses the dimensions before.
        bits: 2 to 8.
        block: Rows and columns of a block; 0 means all there are. Blocks at the edges may be smaller.
        factor: ``"scale"``, a real factor, or ``"shift"``, a power of two.

    Returns:
        The integers ``[..., R, C]``, int8, from -(2^(bits-1) - 1) to 2^(bits-1) - 1; and the factors ``[..., P, Q]``:
        float32 for ``"scale"`` (0 for a block of zeros), for ``"shift"`` int8 exponents of two from -32 to 31.
        Both are contiguous.

    Raises:
        TypeError: If ``x_RC`` is not floating.
        ValueError: If an argument is out of its range, or an element is not finite. On CUDA elements are not looked at,
            so as not to wait for the device: the integers of a block with NaN or infinity are unspecified there.

    Paper: BBCT (arXiv 2303.09184), BCT (arXiv 2304.01483). Their bodies were not readable: the quantiser is [inferred],
    BCT-style and our own design.

    Example:
        >>> payload, exponents = block_quantize(torch.tensor([[1.0, -0.25], [6.0, 14.0]]), 4, (1, 0), "shift")
        >>> payload.tolist(), exponents.tolist()
        ([[4, -1], [3, 7]], [[-2], [1]])
    """
    rows, columns = check_blocks(x_RC, bits, block, factor)
    return torch.ops.lightning_compress.block_quantize.default(x_RC, bits, rows, columns, factor)


def check_blocks(x_RC: Tensor, bits: int, block: tuple[int, int], factor: str) -> tuple[int, int]:
    """Return the sides of a block, a matrix having been found to go into such blocks.

    Raises:
        TypeError: If ``x_RC`` is not floating.
        ValueError: If it is no matrix, or another argument is out of its range.
    """
    if not x_RC.is_floating_point():
        raise TypeError(f"x_RC is {x_RC.dtype}: give real numbers, such as float32")
    if x_RC.dim() < 2:
        raise ValueError(f"x_RC is shaped {tuple(x_RC.shape)}: give [..., R, C]")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is not from 2 to 8")
    if factor not in _FACTORS:
        raise ValueError(f"factor={factor!r} is not one of {list(_FACTORS)}")
    return check_block("block", block)


def check_block(name: str, block: tuple[int, int]) -> tuple[int, int]:
    """Return the sides of a block.

    Raises:
        ValueError: If they are not two numbers of at least 0.
    """
    if len(block) != 2 or min(block) < 0:
        raise ValueError(
            f"{name}={block} is not two numbers of at least 0: give rows and columns, 0 for all there are"
        )
    return block[0], block[1]


torch.library.define(
    "lightning_compress::block_quantize",
    "(Tensor x, int bits, int rows, int columns, str factor) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(
    "lightning_compress::block_quantize", "CompositeExplicitAutograd", reference.block_quantize
)


@cache
def _cuda_implementation() -> Callable[[Tensor, int, int, int, str], tuple[Tensor, Tensor]]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.block_quantize
    from lightning_compress.ops.block_quantize import triton_kernel

    return triton_kernel.block_quantize


@torch.library.impl("lightning_compress::block_quantize", "CUDA")
def _block_quantize_on_cuda(
    x_RC: Tensor, bits: int, rows: int, columns: int, factor: str
) -> tuple[Tensor, Tensor]:
    return _cuda_implementation()(x_RC, bits, rows, columns, factor)


@torch.library.register_fake("lightning_compress::block_quantize")
def _fake(x_RC: Tensor, bits: int, rows: int, columns: int, factor: str) -> tuple[Tensor, Tensor]:
    *leading, num_rows, num_columns = x_RC.shape
    shape = [*leading, reference.num_blocks(num_rows, rows), reference.num_blocks(num_columns, columns)]
    payload_RC = x_RC.new_empty(x_RC.shape, dtype=torch.int8)
    return payload_RC, x_RC.new_empty(shape, dtype=_FACTORS[factor])
