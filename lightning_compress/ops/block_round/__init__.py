"""``lightning_compress::block_round``: a matrix becomes what blocks of few bits can hold of it, still as real numbers.

The same as quantising and dequantising, without the integers in between: what training sees. Schema and shapes are
here, the meaning is in :mod:`lightning_compress.ops.block_quantize.reference`.

Shape legend: R rows, C columns; any dimensions may come before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize import block_quantize, check_blocks, reference

__all__ = ["block_round"]


def block_round(x_RC: Tensor, bits: int, block: tuple[int, int], factor: str) -> Tensor:
    """Round a matrix, block by block, to the integers of :func:`block_quantize` times their factors.

    No gradient: :func:`lightning_compress.nn.fake_quantize.fake_quantize` has a straight-through one.

    Args:
        x_RC: As of :func:`~lightning_compress.ops.block_quantize.block_quantize`.
        bits: 2 to 8.
        block: Rows and columns of a block; 0 means all there are.
        factor: ``"scale"`` or ``"shift"``.

    Returns:
        ``[..., R, C]``, float32, contiguous: what ``block_dequantize`` makes of ``block_quantize``; the sign of
        zeros is unspecified.

    Raises:
        TypeError: If ``x_RC`` is not floating.
        ValueError: If an argument is out of its range, or, on CPU, an element is not finite.

    Paper: BBCT (arXiv 2303.09184), BCT (arXiv 2304.01483), whose bodies were not readable: BCT-style, our own design.

    Example:
        >>> block_round(torch.tensor([[1.0, -0.3], [6.0, 13.6]]), 4, (1, 0), "shift").tolist()
        [[1.0, -0.25], [6.0, 14.0]]
    """
    rows, columns = check_blocks(x_RC, bits, block, factor)
    return torch.ops.lightning_compress.block_round.default(x_RC, bits, rows, columns, factor)


torch.library.define(
    "lightning_compress::block_round",
    "(Tensor x, int bits, int rows, int columns, str factor) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("lightning_compress::block_round", "CompositeExplicitAutograd", reference.block_round)


@torch.library.impl("lightning_compress::block_round", "CUDA")
def _block_round_on_cuda(x_RC: Tensor, bits: int, rows: int, columns: int, factor: str) -> Tensor:
    """Round by the kernels of the two halves."""
    return block_dequantize(*block_quantize(x_RC, bits, (rows, columns), factor), (rows, columns))


@torch.library.register_fake("lightning_compress::block_round")
def _fake(x_RC: Tensor, bits: int, rows: int, columns: int, factor: str) -> Tensor:
    return x_RC.new_empty(x_RC.shape, dtype=torch.float32)
