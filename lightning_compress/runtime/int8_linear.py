"""Engines that multiply integers by integers: inputs are rounded anew at every call.

Built from integers ``[N, K]`` and a scale for each output. The next chapter is
:mod:`lightning_compress.runtime.block_linear`, for blocks of other shapes.

Shape legend: M rows of the input, N outputs, K inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.ops.block_quantize.reference import block_exponents, block_scales, power_of_two
from lightning_compress.runtime.fast_linear import RowEngine, filled_up, first, has_operator
from lightning_compress.runtime.fbgemm_linear import FEW_ROWS, FbgemmProduct, has_fbgemm
from lightning_compress.runtime.live_bias import LiveBias

__all__ = ["CudaInt8Engine", "Int8Engine", "has_int8_kernels", "quantize_rows"]

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_INT_MM_ROWS = 17
"""``torch._int_mm`` on CUDA wants more than 16 rows."""
_int_mm: Any = getattr(torch, "_int_mm")  # noqa: B009 - it is not exported


class _IntegerEngine(RowEngine):
    """What engines of integers have in common; each lays the weight out as its kernels want it."""

    def __init__(
        self,
        weight_NK: Tensor,
        scales_N: Tensor,
        bias_N: Tensor | LiveBias | None,
        input_format: BlockFormat | None = None,
    ) -> None:
        self._format = _rows_or_tensor(input_format or BlockFormat())
        self._scales_N, self._bias = scales_N.float(), LiveBias.of(bias_N)
        self.num_outputs = weight_NK.shape[0]
        self._lay_out(weight_NK)

    @abstractmethod
    def _lay_out(self, weight_NK: Tensor) -> None: ...


class Int8Engine(_IntegerEngine):
    """Integers times integers on CPU: inputs are rounded anew at every call, as their format says.

    By oneDNN, and up to 8 rows by fbgemm where torch has it and factors are scales; the weight is then held twice.
    What comes out is what the reference gives, up to the rounding of floats: integers are the same, except that halves
    in a single row may go to either side. (With shifts the reference also rounds the bias, to the exponent of its
    accumulator; here it is added as it is.) Rows are independent of each other where the format has a factor per row.
    For inputs in bfloat16 outputs are rounded to it once; but where oneDNN multiplies rows with a factor each, product,
    factors, bias and their results are all rounded to it on the way: over many rows passes in float32 take longer.
    An infinity or NaN spoils all outputs that share its factor, its row's or the call's, where the reference raises.

    Args:
        weight_NK: Integers, int8.
        scales_N: What an integer of each output is worth, float32.
        bias_N: Bias, or None.
        input_format: Blocks ``(1, 0)`` or, one factor for all rows of a call, ``(0, 0)``.

    Raises:
        ValueError: If the format has other blocks.
        RuntimeError: If the processor or this build of torch has no such kernels.

    Example:
        >>> weight_NK, scales_N = torch.tensor([[127, -127]], dtype=torch.int8), torch.tensor([0.5])
        >>> if has_int8_kernels():
        ...     engine = Int8Engine(weight_NK, scales_N, bias_N=torch.tensor([1.0]))
        ...     assert engine(torch.tensor([[2.0, 1.0]])).round(decimals=1).tolist() == [[64.0]]
    """

    def _lay_out(self, weight_NK: Tensor) -> None:
        if not has_int8_kernels():
            raise RuntimeError(
                "this processor or this build of torch multiplies no 8-bit integers (oneDNN with VNNI does): use the "
                'backend "bf16" or "fp32"'
            )
        self._weight = torch.ops.onednn.qlinear_prepack(weight_NK.contiguous(), None)
        self._zeros_N = torch.zeros_like(self._scales_N, dtype=torch.int32)
        is_few = self._format.factor == "scale" and has_fbgemm()
        self._few = FbgemmProduct(weight_NK, self._scales_N) if is_few else None

    def rows(self, x_MK: Tensor) -> Tensor:
        """Map at least one row, to ``[M, N]``, in bfloat16 or float32."""
        rows = x_MK.shape[0]
        is_one = rows == 1 or self._format.block[0] == 0
        if self._few is not None and rows <= FEW_ROWS:
            return self._few_rows(self._few, x_MK.float(), is_one)
        dtype = torch.bfloat16 if x_MK.dtype == torch.bfloat16 else torch.float32
        q_MK, scale = quantize_rows(x_MK, self._format, one_factor=is_one)
        q_MK, bias_N = filled_up(q_MK), self._bias(torch.float32 if is_one else dtype)
        if is_one:
            return first(self._product(q_MK, float(scale), bias_N, dtype), rows)
        y_MN = first(self._product(q_MK, 1.0, None, dtype), rows).mul_(scale.to(dtype))
        return y_MN if bias_N is None else y_MN.add_(bias_N)

    def _few_rows(self, product: FbgemmProduct, x_MK: Tensor, is_one: bool) -> Tensor:
        magnitude_MK, bias_N = x_MK.abs(), self._bias(torch.float32)
        if is_one:
            y_MN = product(x_MK, float(_factor(magnitude_MK.amax(), self._format)))
        else:
            scale_M1 = _factor(magnitude_MK.amax(1, keepdim=True), self._format)
            y_MN = product(x_MK / scale_M1).mul_(scale_M1)
        return y_MN if bias_N is None else y_MN.add_(bias_N)

    def _product(
        self, q_MK: Tensor, scale: float, bias_N: Tensor | LiveBias | None, dtype: torch.dtype
    ) -> Tensor:
        return torch.ops.onednn.qlinear_pointwise.default(
            q_MK, scale, 0, self._weight, self._scales_N, self._zeros_N, bias_N, 1.0, 0, dtype, "none", [], ""
        )  # fmt: skip


class CudaInt8Engine(_IntegerEngine):
    """The same on CUDA, by the integer tensor cores.

    Args:
        weight_NK: Integers, int8; both sizes multiples of 8.
        scales_N: What an integer of each output is worth, float32.
        bias_N: Bias, or None.
        input_format: Blocks ``(1, 0)`` or ``(0, 0)``.

    Raises:
        ValueError: If the format has other blocks, or a size is no multiple of 8.
    """

    def _lay_out(self, weight_NK: Tensor) -> None:
        if any(size % 8 for size in weight_NK.shape):
            raise ValueError(
                f"the weight is shaped {tuple(weight_NK.shape)}, and integer tensor cores want multiples of 8: use the "
                'backend "bf16" for this layer'
            )
        self._weight_KN = weight_NK.contiguous().t()

    def rows(self, x_MK: Tensor) -> Tensor:
        """Map at least one row, to float32 ``[M, N]``."""
        rows = x_MK.shape[0]
        q_MK, scale = quantize_rows(x_MK, self._format, one_factor=self._format.block[0] == 0)
        if rows < _INT_MM_ROWS:
            q_MK = F.pad(q_MK, (0, 0, 0, _INT_MM_ROWS - rows))
        y_MN = _int_mm(q_MK, self._weight_KN)[:rows] * (scale * self._scales_N)
        bias_N = self._bias(torch.float32)
        return y_MN if bias_N is None else y_MN.add_(bias_N)


def quantize_rows(x_MK: Tensor, held: BlockFormat, *, one_factor: bool = False) -> tuple[Tensor, Tensor]:
    """Round rows to integers in few passes over memory; the integers of ``block_quantize``.

    Where the reference raises at infinities and NaN, factors are not finite here.

    Args:
        x_MK: Finite numbers.
        held: Bits and kind of factor; its block is not looked at.
        one_factor: One factor for all rows, not one for each.

    Returns:
        Integers, int8, and the factors as numbers, float32: ``[M, 1]``, or one.

    Example:
        >>> quantize_rows(torch.tensor([[3.0, -1.5]]), BlockFormat(bits=3))
        (tensor([[ 3, -2]], dtype=torch.int8), tensor([[1.]]))
    """
    x_MK = x_MK.float()
    magnitude_MK = x_MK.abs()
    amax = magnitude_MK.amax() if one_factor else magnitude_MK.amax(1, keepdim=True)
    scale = _factor(amax, held)
    integer_MK = (x_MK / scale).round_()
    if held.factor == "shift":
        integer_MK.clamp_(-held.largest, held.largest)  # beyond the largest exponent
    return integer_MK.to(torch.int8), scale


def _factor(amax: Tensor, held: BlockFormat) -> Tensor:
    """Return what an integer is worth for these largest magnitudes; not 0, and not finite where they are not."""
    if held.factor == "scale":
        return block_scales(amax, held.largest).clamp_min_(_SMALLEST_NORMAL)
    return power_of_two(block_exponents(amax, held.largest)) + (amax - amax)  # NaN where it is not finite


def has_int8_kernels() -> bool:
    """Whether the processor multiplies 8-bit integers without overflow, and torch knows how to ask it."""
    return has_operator("onednn", "qlinear_prepack") and torch.cpu._is_vnni_supported()


def _rows_or_tensor(held: BlockFormat) -> BlockFormat:
    if held.block not in ((1, 0), (0, 0)):
        raise ValueError(
            f"inputs in blocks {held.block} have no fast product of integers: quantise them with block (1, 0), a "
            'factor per row, or use the backend "bf16" or "fp32"'
        )
    return held
