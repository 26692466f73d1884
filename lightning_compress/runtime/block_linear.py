"""An engine for blocks of any shape: the library's own operators, which on CUDA are Triton kernels.

The next chapter is :mod:`lightning_compress.runtime.linear_backends`, where engines have names.

Shape legend: M rows of the input, N outputs, K inputs, G blocks over the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.ops.block_matmul import block_matmul
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.runtime.fast_linear import RowEngine
from lightning_compress.runtime.live_bias import LiveBias

__all__ = ["BlockEngine"]


class BlockEngine(RowEngine):
    """Integers times integers in blocks: inputs are rounded anew at every call, as their format says.

    What comes out is what the reference gives, bit for bit; it is spared unpacking the weight at every call.

    Args:
        weight_NK: Integers, int8.
        factors_NG: Scales or exponents of each output's blocks.
        bias_N: Bias, or None.
        columns: Inputs in a block of the weight; 0 means all there are.
        input_format: Blocks of the input.

    Example:
        >>> weight_NK, scales_NG = torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([[0.5, 0.25]])
        >>> engine = BlockEngine(weight_NK, scales_NG, torch.tensor([1.0]), 1, BlockFormat(block=(1, 1)))
        >>> engine(torch.tensor([[2.0, 1.0]])).tolist()  # 63.5 * 2 - 31.75 * 1 + 1
        [[96.25]]
    """

    def __init__(
        self,
        weight_NK: Tensor,
        factors_NG: Tensor,
        bias_N: Tensor | LiveBias | None,
        columns: int,
        input_format: BlockFormat,
    ) -> None:
        self._weight_NK, self._factors_NG, self._block = weight_NK, factors_NG, (1, columns)
        self._format, self._bias, self.num_outputs = input_format, LiveBias.of(bias_N), weight_NK.shape[0]

    def rows(self, x_MK: Tensor) -> Tensor:
        """Map at least one row, to float32 ``[M, N]``."""
        held = self._format
        operands = (
            *block_quantize(x_MK, held.bits, held.block, held.factor),
            self._weight_NK,
            self._factors_NG,
        )
        bias_N = self._bias(torch.float32)
        return block_matmul(*operands, bias_N, held.block, self._block, held.factor)
