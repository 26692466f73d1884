"""Arithmetic on integers that stand for reals: rows that share a power of two, rounding shifts, square roots.

A row is ``value * 2 ** exponent`` with one exponent. The integer operators say what they mean with these functions;
:mod:`lightning_compress.ops.fixed_point.triton_functions` has the same for kernels, bit for bit.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "align_rows",
    "bit_length",
    "check_rows",
    "held_in_floats",
    "integer_sqrt",
    "power_of_two",
    "row_pieces",
    "shift_right",
]

MIN_EXPONENT = -126
"""Of rows made from floats: the power of two and its inverse are normal numbers in fp32."""

ZERO_EXPONENT = -32
"""Of rows that hold nothing but zeros, as in blocks."""

NEWTON_STEPS = 6
"""From less than three times the root, the relative errors are 1.9, 0.6, 0.1, 6e-3, 2e-5, 2e-10 and 2e-20."""


def align_rows(x_RC: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Write every row as integers that share one exponent, the smallest with which the row fits.

    Rounds half to even. The exponent is found in the bits of the largest magnitude, not by a float logarithm.

    Paper: BCT-style "shift" factors; the formula is our design, the paper's could not be read [inferred].

    Args:
        x_RC: Finite numbers of any float type; what has more digits than fp32 is rounded to it first.
        bits: Of the integers with their sign, 8 to 31: magnitudes are at most ``2 ** (bits - 1) - 1``.

    Returns:
        ``value_RC`` int32 and ``exponent_R`` int32; rows of zeros have exponent -32.

    Raises:
        ValueError: If ``bits`` is out of range, or a number is infinite or NaN. The numbers are looked at on CPU
            only, and not in compiled programs: looking would wait for the device.

    Example:
        >>> value, exponent = align_rows(torch.tensor([[1.0, -0.75], [0.0, 0.0]]), bits=8)
        >>> value.tolist(), exponent.tolist()
        ([[64, -48], [0, 0]], [-6, -32])
    """
    if not 8 <= bits <= 31:
        raise ValueError(f"bits={bits} is not in [8, 31]: give 16 for norms and activations, 31 for logits")
    x_RC = x_RC.float()
    largest_R = x_RC.abs().amax(1) if x_RC.shape[1] else x_RC.new_zeros(x_RC.shape[0])
    looks = x_RC.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not bool(torch.isfinite(largest_R).all()):
        raise ValueError("a row holds inf or NaN, which no integers hold: look for what overflowed before it")
    exponent_R = _smallest_exponent(largest_R, bits)
    value_RC = (x_RC * power_of_two(-exponent_R)[:, None]).round().to(torch.int32)
    return value_RC, exponent_R


def _smallest_exponent(largest_R: Tensor, bits: int) -> Tensor:
    """``ceil(log2(largest / (2 ** (bits - 1) - 1)))``, from the fields of the float."""
    field_R = largest_R.view(torch.int32)
    exponent_R = (field_R >> 23) - 127 - (bits - 2)
    if bits <= 25:  # with more of them, no fp32 mantissa exceeds the largest integer
        exponent_R = exponent_R + ((field_R & 0x7FFFFF) > 2**23 - 2 ** (25 - bits)).to(torch.int32)
    return torch.where(largest_R == 0, ZERO_EXPONENT, exponent_R.clamp(min=MIN_EXPONENT)).to(torch.int32)


def held_in_floats(value_RC: Tensor, exponent_R: Tensor) -> Tensor:
    """Return ``value * 2 ** exponent`` in fp32: exact where the integers have at most 24 digits between their ends.

    Example:
        >>> held_in_floats(torch.tensor([[3], [-5]]), torch.tensor([-1, 2])).tolist()
        [[1.5], [-20.0]]
    """
    return value_RC.float() * power_of_two(exponent_R)[:, None]


def power_of_two(exponent_R: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``2 ** exponent``, written into the bits: exact on every device.

    Args:
        exponent_R: Integers in [-126, 127], or [-1022, 1023] for fp64.
        dtype: fp32 or fp64.

    Example:
        >>> power_of_two(torch.tensor([-2, 0, 5])).tolist()
        [0.25, 1.0, 32.0]
    """
    if dtype == torch.float64:
        return ((exponent_R.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent_R.to(torch.int32) + 127) << 23).view(torch.float32)


def shift_right(value_RC: Tensor, count: Tensor | int) -> Tensor:
    """Return ``value / 2 ** count``, rounded half to even, in the integer type given.

    Args:
        value_RC: int32 of magnitudes under 2^30, or int64 under 2^61.
        count: At least 0, in shapes that broadcast; beyond 31 (62 for int64) nothing is left in any case.

    Example:
        >>> shift_right(torch.tensor([5, 6, 7, -6]), 2).tolist()
        [1, 2, 2, -2]
    """
    most = 31 if value_RC.dtype == torch.int32 else 62
    if isinstance(count, int):
        count = min(count, most)
        if count == 0:
            return value_RC
        return (value_RC + (2 ** (count - 1) - 1) + ((value_RC >> count) & 1)) >> count
    if not torch.compiler.is_compiling() and not bool((count > 0).any()):
        return value_RC
    count = count.to(value_RC.dtype).clamp(max=most)
    is_shifted = (count > 0).to(value_RC.dtype)
    below_half = (1 << (count - is_shifted)) - 1
    return (value_RC + below_half + ((value_RC >> count) & is_shifted)) >> count


def bit_length(value_R: Tensor) -> Tensor:
    """Return how many binary digits each number has; 0 has none.

    Args:
        value_R: int64, not negative.

    Example:
        >>> bit_length(torch.tensor([0, 1, 255, 256])).tolist()
        [0, 1, 8, 9]
    """
    length_R = torch.zeros_like(value_R)
    for step in (32, 16, 8, 4, 2, 1):
        is_long_R = value_R >> step > 0
        length_R = torch.where(is_long_R, length_R + step, length_R)
        value_R = torch.where(is_long_R, value_R >> step, value_R)
    return length_R + value_R


def integer_sqrt(value_R: Tensor) -> Tensor:
    """Return ``floor(sqrt(value))`` by Newton's method on integers.

    Args:
        value_R: int64 in [2^59, 2^62): scale by powers of four to get there.

    Example:
        >>> integer_sqrt(torch.tensor([2**60 - 1, 2**60])).tolist()
        [1073741823, 1073741824]
    """
    root_R = torch.full_like(value_R, 2**31)  # above every root, so that the steps descend
    for _ in range(NEWTON_STEPS):
        root_R = (root_R + value_R // root_R) >> 1
    return root_R - (root_R * root_R > value_R).to(root_R.dtype)


def row_pieces(value_RC: Tensor) -> list[slice]:
    """Cut rows into pieces of 2^17 elements or so: what is made of one on the way stays in the cache of a core.

    Example:
        >>> row_pieces(torch.empty(300, 600))
        [slice(0, 218, None), slice(218, 436, None)]
    """
    num_rows, width = value_RC.shape
    step = max(2**17 // max(width, 1), 1)
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def check_rows(value_RC: Tensor, exponent_R: Tensor) -> None:
    """Refuse what is no rows of integers with one exponent each.

    Raises:
        TypeError: If one of them is not int32.
        ValueError: If they are not shaped ``[R, C]`` and ``[R]``, or on different devices.
    """
    for name, tensor in (("value_RC", value_RC), ("exponent_R", exponent_R)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} is {tensor.dtype}: give int32, such as align_rows returns")
    shapes = f"{tuple(value_RC.shape)} and {tuple(exponent_R.shape)}"
    if (value_RC.dim(), exponent_R.dim()) != (2, 1):
        raise ValueError(f"values and exponents are shaped {shapes}: give [R, C] and [R]")
    if torch.compiler.is_compiling():  # sizes may be unknown as yet
        torch._check(value_RC.shape[0] == exponent_R.shape[0])
    elif value_RC.shape[0] != exponent_R.shape[0]:
        raise ValueError(f"values and exponents are shaped {shapes}: give one exponent for each row")
    if value_RC.device != exponent_R.device:
        raise ValueError(
            f"values are on {value_RC.device}, exponents on {exponent_R.device}: move one of them"
        )
