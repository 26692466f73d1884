"""PyTorch's own dynamically quantised product: one factor and one zero point for all rows of a call.

It finds both, rounds and multiplies in one operator, which no engine with a factor per row can. The next chapter is
:mod:`lightning_compress.runtime.linear_backends`.

Shape legend: M rows of the input, N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.runtime.fast_linear import RowEngine, filled_up, first
from lightning_compress.runtime.fbgemm_linear import FEW_ROWS, can_prepack, prepack
from lightning_compress.runtime.live_bias import LiveBias

__all__ = ["DynamicEngine", "has_dynamic_kernels"]


class DynamicEngine(RowEngine):
    """Integers times integers on CPU, inputs rounded between the least and the largest of all rows.

    These are other integers than those of a :class:`~lightning_compress.nn.block_format.BlockFormat`: 8 bits without a
    sign, and a zero point. By oneDNN, and up to 8 rows by fbgemm; the weight is held twice. An infinity spoils all
    outputs of the call. NaN may be taken for an ordinary number: to look for it would take a pass over the input,
    which this product is to spare.

    Args:
        weight_NK: Integers, int8.
        scales_N: What an integer of each output is worth, float32.
        bias_N: Bias, or None.

    Raises:
        RuntimeError: If this build of torch has no such kernels.
    """

    def __init__(self, weight_NK: Tensor, scales_N: Tensor, bias_N: Tensor | LiveBias | None) -> None:
        if not has_dynamic_kernels():
            raise RuntimeError("this build of torch has no dynamically quantised product")
        self._weight_NK, self._scales_N = weight_NK, scales_N
        self._bias, self.num_outputs = LiveBias.of(bias_N), weight_NK.shape[0]
        self._packed = self._pack(self._bias(torch.float32))

    def rows(self, x_MK: Tensor) -> Tensor:
        """Map at least one row, to float32 ``[M, N]``."""
        rows, packed, bias_N = x_MK.shape[0], self._packed, self._bias(torch.float32)
        if not _are_equal(packed[0], bias_N):
            self._packed = packed = self._pack(bias_N)  # in one assignment: other threads may be here too
        if rows <= FEW_ROWS:
            return torch.ops.quantized.linear_dynamic.default(x_MK.float(), packed[1])
        # spare rows are zeros, which lie within the range anyway
        return first(torch.ops.quantized.linear_dynamic.default(filled_up(x_MK.float()), packed[2]), rows)

    def _pack(self, bias_N: Tensor | None) -> tuple[Tensor | None, Any, Any]:
        """Return the bias, and weight and bias as either engine wants them."""
        own_N = None if bias_N is None else bias_N.clone()
        few, many = (
            prepack(engine, self._weight_NK, self._scales_N, own_N) for engine in ("fbgemm", "onednn")
        )
        return own_N, few, many


def _are_equal(packed_N: Tensor | None, bias_N: Tensor | None) -> bool:
    """Compare numbers, which takes far less time than to add them to all rows of an output."""
    return packed_N is bias_N if packed_N is None or bias_N is None else torch.equal(packed_N, bias_N)


def has_dynamic_kernels() -> bool:
    """Whether this build of torch has both engines, and the processor multiplies 8-bit integers without overflow."""
    return can_prepack("fbgemm") and can_prepack("onednn") and torch.cpu._is_vnni_supported()
