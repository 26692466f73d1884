"""What ``integer_layernorm`` means, in integers; also how it runs wherever there is no kernel.

The exponent of a row cancels, except against ``eps``. Whole numbers of columns are in fp64 where they have more than
31 bits: it holds them exactly up to 2^53, and products and shifts of such numbers are exact, and faster than in int64.
The next chapter is :mod:`lightning_compress.ops.integer_layernorm.triton_kernel`.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.ops.fixed_point import (
    bit_length,
    integer_sqrt,
    power_of_two,
    row_pieces,
    shift_right,
)

__all__ = ["FRACTION", "Numbers", "integer_layernorm", "numbers"]

GUARD = 7
"""Digits after the point of the mean, and so of what is left when it is taken away."""

FRACTION = 16
"""Digits after the point of a normalised number."""


NO_EPS = -(2**10)
"""Exponent of an eps that is 0: it claims no place beside the squares."""


class Numbers(NamedTuple):
    """Constants of one width and one ``eps``: the divisions by the width, done once."""

    mean: int
    """``2 ** 46 / C``, by which the sum of a row is multiplied."""
    root: int
    """``sqrt(C)``, times 2^16."""
    eps: int
    """``C * eps`` as 24 digits..."""
    eps_exponent: int
    """...times this power of two."""


def numbers(width: int, eps: float) -> Numbers:
    """Return the constants for rows of this width.

    Example:
        >>> numbers(4, 0.5)
        Numbers(mean=17592186044416, root=131072, eps=8388608, eps_exponent=-22)
    """
    digits, exponent = math.frexp(width * eps) if eps else (0.0, NO_EPS)
    return Numbers(
        round(2**46 / width), round(math.sqrt(width) * 2**16), round(digits * 2**24), exponent - 24
    )


def integer_layernorm(
    value_RC: Tensor,
    exponent_R: Tensor,
    gamma_C: Tensor,
    beta_C: Tensor | None,
    shift: int,
    exponent: int,
    eps: float,
    is_centred: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise each row, then scale and move its columns. Arguments are not checked.

    Args:
        value_RC: int32 of magnitudes under 2^15.
        exponent_R: int32.
        gamma_C: Scales, int16.
        beta_C: What is added at the end, int32, at the exponent of the result; None adds nothing.
        shift: Digits that go from a normalised number times gamma to the result.
        exponent: Of the result, the same for all rows.
        eps: Added to the variance.
        is_centred: Whether the mean is taken away first; without it this is RMSNorm.

    Returns:
        int32 ``[R, C]`` and their exponents int32 ``[R]``.

    Example:
        >>> value, zero = torch.tensor([[1, 3]]).int(), torch.tensor([0]).int()
        >>> ones = torch.tensor([1, 1]).short()  # 16 digits of the normalised -1 and 1
        >>> integer_layernorm(value, zero, ones, None, 0, -16, 0.0, True)[0].tolist()
        [[-65536, 65536]]
    """
    constants = numbers(max(value_RC.shape[1], 1), eps)
    result_RC = torch.empty_like(value_RC, memory_format=torch.contiguous_format)
    gamma_C = gamma_C.double() * 2.0**-shift
    for piece in row_pieces(value_RC):
        normal_RC = _normalise(value_RC[piece], exponent_R[piece], constants, is_centred)
        scaled_RC = (normal_RC * gamma_C).round_().int()  # products are under 2^40 units
        result_RC[piece] = scaled_RC if beta_C is None else scaled_RC + beta_C
    return result_RC, torch.full_like(exponent_R, exponent)


def _normalise(value_RC: Tensor, exponent_R: Tensor, constants: Numbers, is_centred: bool) -> Tensor:
    """Return normalised numbers with FRACTION digits after the point."""
    rest_RC = value_RC << GUARD
    if is_centred:
        mean_R1 = shift_right(value_RC.sum(1, keepdim=True) * constants.mean, 46 - GUARD)
        rest_RC = rest_RC - mean_R1.int()
    long_RC = rest_RC.long()
    inverse_R, places_R = _inverse_deviation((long_RC * long_RC).sum(1), exponent_R, constants)
    unit_R1 = (inverse_R * power_of_two(-places_R, torch.float64))[:, None]
    return (rest_RC.double() * unit_R1).round_()  # under 2^23 times at most 2^30, in units


def _inverse_deviation(squares_R: Tensor, exponent_R: Tensor, constants: Numbers) -> tuple[Tensor, Tensor]:
    """Return ``1 / sqrt(squares / C + eps)`` as up to 30 digits, and how many places of a product with it are to go."""
    left_R = constants.eps_exponent + 2 * GUARD - 2 * exponent_R.long()  # eps in units of the squares
    halves_R = (left_R - 35).clamp(min=0) >> 1  # eps would not fit: drop pairs of digits everywhere
    left_R = left_R - 2 * halves_R
    eps_R = shift_right(constants.eps << left_R.clamp(min=0), (-left_R).clamp(min=0))
    sum_R = (shift_right(squares_R, 2 * halves_R) + eps_R).clamp(min=1)
    doubled_R = (62 - bit_length(sum_R)) >> 1
    root_R = integer_sqrt(sum_R << 2 * doubled_R)  # of 31 digits
    inverse_R = (constants.root << 36) // root_R
    return inverse_R, 52 - FRACTION - doubled_R + halves_R
