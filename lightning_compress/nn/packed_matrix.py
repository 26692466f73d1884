"""A matrix that a module holds in few bits: packed integers and one factor for each block, both plain buffers.

Nothing of it is trained, and neither casts nor loads change its dtypes. The next chapters are
:mod:`lightning_compress.nn.quantized_linear` and :mod:`lightning_compress.nn.quantized_parts`.

Shape legend: R rows, C columns, B bytes of a packed row, F and G blocks over the rows and over the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.nn.block_format import BlockFormat, pack_payload, unpack_payload
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_quantize import block_quantize

__all__ = ["PackedMatrix"]

_FACTOR_DTYPES = {"scale": torch.float32, "shift": torch.int8}


class PackedMatrix(nn.Module):
    """Base of modules whose weight is a matrix in blocks of few bits.

    Args:
        rows: Rows R of the matrix.
        columns: Columns C.
        weight_format: In which blocks of how many bits it is held.
        device: Where the buffers are, uninitialised; the meta device for a structure that is loaded next.

    Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483), BCT-style; our design.
    """

    weight_payload: Tensor
    """Packed integers, uint8 ``[R, B]``."""
    weight_factors: Tensor
    """Scales (float32) or exponents of two (int8), ``[F, G]``."""

    def __init__(
        self, rows: int, columns: int, weight_format: BlockFormat, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.weight_format, self._columns = weight_format, columns
        row_bytes = ceil(columns * weight_format.payload_bits / 8)
        payload_RB = torch.empty(rows, row_bytes, dtype=torch.uint8, device=device)
        shape, dtype = weight_format.factor_shape((rows, columns)), _FACTOR_DTYPES[weight_format.factor]
        self.register_buffer("weight_payload", payload_RB)
        self.register_buffer("weight_factors", torch.empty(shape, dtype=dtype, device=device))

    @torch.no_grad()
    def store(self, weight_RC: Tensor) -> None:
        """Take over a matrix, to the nearest integers of each block.

        Raises:
            ValueError: If it holds infinities or NaN, or has another shape.
        """
        if tuple(weight_RC.shape) != (self.weight_payload.shape[0], self._columns):
            raise ValueError(
                f"the weight is shaped {tuple(weight_RC.shape)}, the layer holds "
                f"{(self.weight_payload.shape[0], self._columns)}"
            )
        held = self.weight_format
        payload_RC, factors_FG = block_quantize(weight_RC, held.bits, held.block, held.factor)
        self.weight_payload.copy_(pack_payload(payload_RC, held.bits))
        self.weight_factors.copy_(factors_FG)

    def weight_int8(self) -> Tensor:
        """Return the integers, int8 ``[R, C]``; those of more than 4 bits share the buffer's memory."""
        if self.weight_format.bits > 4:
            return self.weight_payload.view(torch.int8)
        return unpack_payload(self.weight_payload, self.weight_format.bits, self._columns)

    def row_scales(self) -> Tensor | None:
        """Return the factor of each row as a number, float32 ``[R]``; None where a row has several or shares one."""
        if self.weight_format.block != (1, 0):
            return None
        factors_R = self.weight_factors[:, 0]
        return factors_R if factors_R.dtype == torch.float32 else torch.exp2(factors_R.float())

    def dequantized_weight(self) -> Tensor:
        """Return the matrix as it counts, float32 ``[R, C]``."""
        held = self.weight_format
        return block_dequantize(self.weight_int8(), self.weight_factors, held.block)

    @property
    def kept_parameters(self) -> int:
        """Elements of the matrix, whatever their bits."""
        return self.weight_payload.shape[0] * self._columns

    @property
    def storage_bytes(self) -> int:
        """Bytes that integers and factors take, in memory and in a file."""
        return sum(held.numel() * held.element_size() for held in (self.weight_payload, self.weight_factors))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrix:
        """Move or cast the module, but keep the factors as exact as they are."""
        factors_FG = self.weight_factors
        super()._apply(fn, recurse)
        if self.weight_factors.dtype != factors_FG.dtype:
            self.weight_factors = factors_FG.to(self.weight_factors.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Take over what was saved; factors of another dtype, assigned instead of copied, get their own again."""
        super()._load_from_state_dict(*args, **kwargs)
        self.weight_factors = self.weight_factors.to(_FACTOR_DTYPES[self.weight_format.factor])
