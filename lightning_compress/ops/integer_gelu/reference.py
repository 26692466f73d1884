"""What ``integer_gelu`` means, in integers; also how it runs wherever there is no kernel.

GELU, its tanh form and SiLU are all ``relu(x) - g(|x|)`` with a small ``g`` that ends soon; ``g`` is in a table. The
next chapter is :mod:`lightning_compress.ops.integer_gelu.triton_kernel`.

Shape legend: R rows, C columns; T entries of the table, P positions of 2^-15 each.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_compress.ops.fixed_point import row_pieces, shift_right

__all__ = ["CELL_BITS", "FRACTION", "LIMITS", "integer_gelu", "table"]

FRACTION = 15
"""Digits after the point of the table, and of the result of all rows but those of very large numbers."""

CELL_BITS = 9
"""The table has an entry every 2^-6; 9 more digits say where between two of them."""

LIMITS = {"gelu": 4, "gelu_tanh": 4, "silu": 16, "relu": 0}
"""From where on g is 0: 256 cells for GELU, and 1024 for SiLU, which ends later."""


def integer_gelu(value_RC: Tensor, exponent_R: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """Apply an activation function to rows of integers. Arguments are not checked.

    Args:
        value_RC: int32 of magnitudes under 2^15.
        exponent_R: int32.
        function: One of LIMITS.

    Returns:
        int32 ``[R, C]`` and their exponents int32 ``[R]``: -15, or 15 less than the exponent where that is positive.

    Example:
        >>> value, exponent = integer_gelu(torch.tensor([[-1, 0, 1, 4]]).int(), torch.tensor([0]).int(), "gelu")
        >>> value * 2.0**exponent[:, None]
        tensor([[-0.1587,  0.0000,  0.8413,  4.0000]])
    """
    if function == "relu":
        return value_RC.clamp(min=0), exponent_R.clone()
    result_RC = torch.empty_like(value_RC, memory_format=torch.contiguous_format)
    for piece in row_pieces(value_RC):
        result_RC[piece] = _activate(value_RC[piece], exponent_R[piece, None], function)
    return result_RC, (exponent_R - FRACTION).clamp(min=-FRACTION)


def _activate(value_RC: Tensor, exponent_R1: Tensor, function: str) -> Tensor:
    coarser_R1, finer_R1 = (-FRACTION - exponent_R1).clamp(min=0), (exponent_R1 + FRACTION).clamp(min=0)
    fixed_RC = shift_right(value_RC, coarser_R1)
    limit = LIMITS[function] << FRACTION
    finer_R1 = finer_R1.clamp(max=limit.bit_length())  # 1 is then already at the limit
    least_R1 = (limit >> finer_R1) + 1
    position_RC = (fixed_RC.abs().clamp(max=least_R1) << finer_R1).clamp(max=limit)
    correction_RC = interpolated(function, value_RC.device).index_select(0, position_RC.reshape(-1))
    correction_RC = shift_right(correction_RC.view(value_RC.shape), exponent_R1.clamp(min=0))
    return (fixed_RC.clamp(min=0) << finer_R1.clamp(max=FRACTION)) - correction_RC


@lru_cache
def table(function: str, device: torch.device) -> Tensor:
    """Return ``g`` every 2^-6, with 15 digits after the point; int32, all within int16, 0 from the limit on."""
    limit = LIMITS[function]
    x_T = torch.arange(limit * 64 + 2, dtype=torch.float64) / 64
    share_T = {  # of x that g takes: GELU(x) is x times the normal distribution function, and so on
        "gelu": torch.special.erfc(x_T / math.sqrt(2)) / 2,
        "gelu_tanh": torch.sigmoid(-math.sqrt(8 / math.pi) * (x_T + 0.044715 * x_T**3)),
        "silu": torch.sigmoid(-x_T),
    }[function]
    entry_T = (x_T * share_T * 2**FRACTION).round()
    return torch.where(x_T < limit, entry_T, 0).to(torch.int32).to(device)


@lru_cache
def interpolated(function: str, device: torch.device) -> Tensor:
    """Return ``g`` every 2^-15, on the straight lines between entries of :func:`table`; int32.

    What two look-ups and a product give for every position is itself looked up here.
    """
    table_T = table(function, torch.device("cpu"))
    position_P = torch.arange((len(table_T) - 2 << CELL_BITS) + 1)
    cell_P, inside_P = position_P >> CELL_BITS, (position_P & (2**CELL_BITS - 1)).int()
    rise_P = (table_T[cell_P + 1] - table_T[cell_P]) * inside_P
    return (table_T[cell_P] + shift_right(rise_P, CELL_BITS)).to(device)
