"""Products of few rows of integers, by fbgemm: one operator that rounds and multiplies, with little around it.

For many rows oneDNN is faster, see :mod:`lightning_compress.runtime.int8_linear`, the next chapter.

Shape legend: M rows of the input, N outputs, K inputs.
"""

from __future__ import annotations

import warnings
from threading import Lock
from typing import Any

import torch
from torch import Tensor

__all__ = ["FEW_ROWS", "FbgemmProduct", "can_prepack", "has_fbgemm", "prepack"]

FEW_ROWS = 8
"""Up to so many rows fbgemm is faster than oneDNN."""

_quantized_tensor: Any = getattr(torch, "_make_per_channel_quantized_tensor", None)
_ZERO_POINT = 128
"""Inputs are unsigned here: 1 to 255 stand for -127 to 127."""
_turn = Lock()


class FbgemmProduct:
    """Rounds inputs to integers and multiplies them by those of a weight.

    Args:
        weight_NK: Integers, int8.
        scales_N: What an integer of each output is worth, float32.

    Raises:
        RuntimeError: If this build of torch has no fbgemm.

    Example:
        >>> weight_NK, scales_N = torch.tensor([[100, -3]], dtype=torch.int8), torch.tensor([0.5])
        >>> if has_fbgemm():
        ...     product = FbgemmProduct(weight_NK, scales_N)
        ...     assert product(torch.tensor([[1.0, 4.0]]), scale=2.0).item() == -6.0  # 1/2 is rounded to even: 0
    """

    def __init__(self, weight_NK: Tensor, scales_N: Tensor) -> None:
        if not has_fbgemm():
            raise RuntimeError("this build of torch has no fbgemm")
        self._weight = prepack("fbgemm", weight_NK, scales_N, None)

    def __call__(self, x_MK: Tensor, scale: float = 1.0) -> Tensor:
        """Round ``x / scale`` to integers, halves to even, and multiply; ``[M, N]`` with the scale put back.

        Args:
            x_MK: Numbers, float32, at most 127 times the scale.
            scale: Not 0.
        """
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
            x_MK, scale, _ZERO_POINT, self._weight
        )


def prepack(engine: str, weight_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> Any:
    """Return a weight and a bias in the layout of one of PyTorch's own engines, ``"fbgemm"`` or ``"onednn"``.

    Threads take turns: which engine lays weights out, and what is warned of, is set for the whole process.
    """
    zeros_N = torch.zeros_like(scales_N, dtype=torch.int64)
    with _turn:
        before = torch.backends.quantized.engine
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
            held = _quantized_tensor(weight_NK, scales_N.double(), zeros_N, 0)
        try:
            torch.backends.quantized.engine = engine
            return torch.ops.quantized.linear_prepack(held, bias_N)
        finally:
            torch.backends.quantized.engine = before


def can_prepack(engine: str) -> bool:
    """Whether this build of torch has the engine, and the quantised dtypes by which it is given weights."""
    return _quantized_tensor is not None and engine in torch.backends.quantized.supported_engines


def has_fbgemm() -> bool:
    """Whether this build of torch has what :class:`FbgemmProduct` needs."""
    name = "linear_with_input_q_dq_qweight_dq_output_fp32"
    return can_prepack("fbgemm") and hasattr(torch.ops.quantized, name)
