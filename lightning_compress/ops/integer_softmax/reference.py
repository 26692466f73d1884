"""What ``integer_softmax`` means, in integers; also how it runs wherever there is no kernel.

Whole numbers of more than 31 bits are in fp64, which holds them exactly up to 2^53: products and shifts of such
numbers are exact, and faster than in int64. The next chapter is
:mod:`lightning_compress.ops.integer_softmax.triton_kernel`.

Shape legend: R rows, C columns; T steps of 2^-8 down from the largest logit.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_compress.ops.fixed_point import bit_length, power_of_two, row_pieces, shift_right

__all__ = ["FAR", "FIXED_EXPONENT", "MASKED", "integer_softmax", "powers"]

CELLS = 256
"""Entries of the table of ``2 ** -f`` for f in [0, 1): half a cell is 0.14 % of a weight."""

FAR = 17 * CELLS
"""Steps at which nothing is left of a weight that has 15 digits after the point."""

FIXED_EXPONENT = -8
"""Of probabilities, unless rows have their own, which are smaller."""

MASKED = 2**30
"""Of which the negative is under every logit."""


def integer_softmax(
    value_RC: Tensor, exponent_R: Tensor, seen_RC: Tensor | None, factor: int, by_row: bool
) -> tuple[Tensor, Tensor]:
    """Turn rows of logits into probabilities of 8 bits. Arguments are not checked.

    With ``d`` the distance to the largest logit of the row, ``d * factor * 2 ** (exponent - 15)`` is by which power
    of two a logit is smaller. Rounded to 2^-8, its fraction is looked up and its integer part is a shift; the sum
    of the row is inverted once.

    Args:
        value_RC: int32 of magnitudes under 2^30.
        exponent_R: int32.
        seen_RC: False for what gets no probability; None sees all.
        factor: ``log2(e)`` times the scale of the logits, times 2^15.
        by_row: Whether each row has an exponent of its own, so that its largest probability takes all 8 bits; otherwise
            it is -8, and the inverse is ``floor(2 ** 31 / sum)``.

    Returns:
        uint8 ``[R, C]`` and their exponents int32 ``[R]``; 1 is 255 times 2^-8.

    Example:
        >>> logits, exponent = torch.tensor([[0, -1, -1]]).int(), torch.tensor([0]).int()
        >>> integer_softmax(logits, exponent, None, 2**15, False)[0].tolist()  # powers of two: 1/2, 1/4, 1/4
        [[128, 64, 64]]
    """
    probability_RC = torch.empty(value_RC.shape, dtype=torch.uint8, device=value_RC.device)
    digits_R = torch.full_like(exponent_R, FIXED_EXPONENT)
    if value_RC.shape[1]:
        for piece in row_pieces(value_RC):
            seen = None if seen_RC is None else seen_RC[piece].int()
            weight = _weights(value_RC[piece], exponent_R[piece, None], seen, factor)
            probability_RC[piece], digits_R[piece] = _shares(weight, by_row)
    return probability_RC, digits_R


def _weights(value_RC: Tensor, exponent_R1: Tensor, seen_RC: Tensor | None, factor: int) -> Tensor:
    """Powers of two with 15 digits after the point; the largest of a row is 1, if any is seen."""
    if seen_RC is not None:  # a 0 or 1: choosing by bool takes far longer
        value_RC = value_RC * seen_RC + (seen_RC - 1) * MASKED
    distance_RC = value_RC.amax(1, keepdim=True) - value_RC  # [0, 2^31)
    unit_R1 = factor * power_of_two(exponent_R1 - 7, torch.float64)  # products are under 2^48 such units
    step_RC = (distance_RC.double() * unit_R1).round_().clamp_(max=FAR).int()
    weight_RC = powers(value_RC.device).index_select(0, step_RC.reshape(-1)).view(value_RC.shape)
    return weight_RC if seen_RC is None else weight_RC * seen_RC.double()


def _shares(weight_RC: Tensor, by_row: bool) -> tuple[Tensor, Tensor | int]:
    """Weights over their sum, and the exponents."""
    sum_R1 = weight_RC.sum(1, keepdim=True).long().clamp(min=2**15)  # less is nothing: multiplied by zeros
    if by_row:
        inverse_R1 = 2**46 // sum_R1  # [2^15, 2^31], of a largest weight of 2^15
        digits_R1 = (bit_length(inverse_R1) - 39).clamp(max=FIXED_EXPONENT)
        unit_R1, exponent_R = power_of_two(-46 - digits_R1, torch.float64), digits_R1[:, 0].int()
    else:
        inverse_R1, unit_R1, exponent_R = 2**31 // sum_R1, 2.0 ** (-31 - FIXED_EXPONENT), FIXED_EXPONENT
    share_RC = (weight_RC * (inverse_R1 * unit_R1)).round_().clamp_(max=255)  # products are under 2^47 units
    return share_RC.to(torch.uint8), exponent_R


@lru_cache
def powers(device: torch.device) -> Tensor:
    """Return ``2 ** (-t / 256)`` with 15 digits after the point, for t from 0 to FAR: whole numbers in fp64.

    One table of 256 entries, shifted: what a look-up and a shift give for every t is itself looked up here.
    """
    step_T = torch.arange(FAR + 1)
    cell_C = (torch.exp2(-torch.arange(CELLS, dtype=torch.float64) / CELLS) * 2**15).round().long()
    return shift_right(cell_C[step_T % CELLS], step_T // CELLS).double().to(device)
