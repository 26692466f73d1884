"""What tests of matrices in blocks share: the rounding, done slowly."""

import torch
from torch import Tensor

from lightning_compress.nn.block_format import BlockFormat

__all__ = ["rounded_slowly"]


def rounded_slowly(matrix_RC: Tensor, held: BlockFormat) -> Tensor:
    """Block by block, in float64: the nearest multiples of the block's factor."""
    result = torch.empty_like(matrix_RC, dtype=torch.float64)
    heights, widths = (side or size for side, size in zip(held.block, matrix_RC.shape, strict=True))
    for top in range(0, matrix_RC.shape[0], heights):
        for left in range(0, matrix_RC.shape[1], widths):
            tile = matrix_RC[top : top + heights, left : left + widths].double()
            factor = tile.abs().max() / held.largest
            if held.factor == "shift":
                factor = 2.0 ** torch.ceil(torch.log2(factor))
            result[top : top + heights, left : left + widths] = torch.round(tile / factor) * factor
    return result
