"""What operators on blocks mean: dequantise, write rows as integers, compute, quantise again.

The next chapter is :mod:`lightning_compress.ops.integer_blocks.triton_kernel`, which does it in one pass.

Shape legend: R rows, C columns, Q blocks of c columns each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.ops.block_dequantize.reference import block_dequantize
from lightning_compress.ops.block_quantize.reference import block_quantize, num_blocks
from lightning_compress.ops.fixed_point import align_rows, held_in_floats
from lightning_compress.ops.integer_gelu.reference import integer_gelu
from lightning_compress.ops.integer_layernorm.reference import integer_layernorm
from lightning_compress.ops.integer_softmax.reference import integer_softmax

__all__ = [
    "LOGIT_BITS",
    "ROW_BITS",
    "gelu_of_blocks",
    "layernorm_of_blocks",
    "num_blocks",
    "softmax_of_blocks",
]

ROW_BITS = 16
"""Of what goes into norms and activations."""

LOGIT_BITS = 31
"""Of logits."""

_Blocks = tuple[Tensor, Tensor]


def softmax_of_blocks(
    payload_RC: Tensor, factor_RQ: Tensor, seen_RC: Tensor | None, columns: int, factor: int
) -> Tensor:
    """Return probabilities in steps of 2^-8, uint8; see :func:`integer_softmax`. Arguments are not checked."""
    x_RC = block_dequantize(payload_RC, factor_RQ, 1, columns)
    if seen_RC is not None:
        x_RC = x_RC.masked_fill(~seen_RC, 0.0)
    return integer_softmax(*align_rows(x_RC, LOGIT_BITS), seen_RC, factor, by_row=False)[0]


def gelu_of_blocks(payload_RC: Tensor, factor_RQ: Tensor, columns: int, function: str, bits: int) -> _Blocks:
    """Return integers and factors; see :func:`integer_gelu`. Arguments are not checked."""
    x_RC = block_dequantize(payload_RC, factor_RQ, 1, columns)
    y_RC = held_in_floats(*integer_gelu(*align_rows(x_RC, ROW_BITS), function))
    return block_quantize(y_RC, bits, 1, columns, _kind(factor_RQ))


def layernorm_of_blocks(
    payload_RC: Tensor,
    factor_RQ: Tensor,
    gamma_C: Tensor,
    beta_C: Tensor | None,
    shift: int,
    exponent: int,
    eps: float,
    is_centred: bool,
    columns: int,
    bits: int,
) -> _Blocks:
    """Return integers and factors; see :func:`integer_layernorm`. Arguments are not checked."""
    rows = align_rows(block_dequantize(payload_RC, factor_RQ, 1, columns), ROW_BITS)
    y_RC = held_in_floats(*integer_layernorm(*rows, gamma_C, beta_C, shift, exponent, eps, is_centred))
    return block_quantize(y_RC, bits, 1, columns, _kind(factor_RQ))


def _kind(factor_RQ: Tensor) -> str:
    return "shift" if factor_RQ.dtype == torch.int8 else "scale"
