"""What :mod:`lightning_compress.ops.fixed_point` does, for kernels: the same integers. Needs the extra ``triton``.

Shape legend: R rows and C columns of a tile; unless said otherwise C is the whole width, padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

__all__ = [
    "MAX_COLUMNS",
    "NUM_ELEMENTS",
    "align_rows",
    "bit_length",
    "integer_sqrt",
    "places",
    "power_of_two",
    "row_tiles",
    "shift_right",
    "shift_right_by",
]

MAX_COLUMNS = 8192
"""Of a row that a program holds."""

NUM_ELEMENTS = 2048
"""Of a program that holds several rows."""


def row_tiles(width: int) -> dict[str, Any]:
    """Return the sizes of a tile of whole rows, and with how many warps it is run.

    Example:
        >>> row_tiles(384)
        {'R': 4, 'C': 512, 'num_warps': 4}
    """
    columns = triton.next_power_of_2(max(width, 1))
    return {
        "R": max(NUM_ELEMENTS // columns, 1),
        "C": columns,
        "num_warps": min(max(columns // 512, 4), 16),
    }


@triton.jit
def places(num_rows, width, R: tl.constexpr, C: tl.constexpr, across=0):
    """Rows and columns of this program's tile, the one at ``across`` in its rows; what is inside, and where that is."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_C = across * C + tl.arange(0, C)
    inside_RC = (row_R < num_rows)[:, None] & (column_C < width)[None, :]
    return row_R, column_C, inside_RC, row_R.to(tl.int64)[:, None] * width + column_C[None, :]


@triton.jit
def shift_right(value, count):
    """``value / 2 ** count``, halves to even. The count is a tensor, not negative; it may be too large."""
    most = 31 if value.dtype.primitive_bitwidth == 32 else 62
    count = tl.minimum(count, most).to(value.dtype)
    is_shifted = (count > 0).to(value.dtype)
    below_half = (1 << (count - is_shifted)) - 1
    return (value + below_half + ((value >> count) & is_shifted)) >> count


@triton.jit
def shift_right_by(value, COUNT: tl.constexpr):
    """``value / 2 ** COUNT``, halves to even, for a count of 1 or more."""
    below_half = 2 ** (COUNT - 1) - 1
    return (value + below_half + ((value >> COUNT) & 1)) >> COUNT


@triton.jit
def power_of_two(exponent):
    """``2 ** exponent`` in fp32, for exponents from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def align_rows(x_RC, BITS: tl.constexpr):
    """Integers and the exponent of each row. What is behind the edge has to be 0."""
    largest_R = tl.max(tl.abs(x_RC), axis=1)
    field_R = largest_R.to(tl.int32, bitcast=True)
    exponent_R = (field_R >> 23) - 127 - (BITS - 2)
    if BITS <= 25:
        most = 2**23 - 2 ** (25 - BITS)
        exponent_R += ((field_R & 0x7FFFFF) > most).to(tl.int32)
    exponent_R = tl.where(largest_R == 0.0, -32, tl.maximum(exponent_R, -126))
    return _round_to_even(x_RC * power_of_two(-exponent_R)[:, None]), exponent_R


@triton.jit
def _round_to_even(x):
    """Nearest whole number as int32: what is 2^22 or more has few digits after the point, and 2^23 has none."""
    small = (x + 12582912.0) - 12582912.0
    # between 2^22 and 2^23 there are halves: 2^23 pushes them out, on the side of the sign
    signed = tl.where(x < 0, -8388608.0, 8388608.0)
    middle = (x + signed) - signed
    magnitude = tl.abs(x)
    rounded = tl.where(magnitude < 4194304.0, small, tl.where(magnitude < 8388608.0, middle, x))
    return rounded.to(tl.int32)


@triton.jit
def bit_length(value):
    """How many binary digits each number has, int64 and not negative."""
    length = tl.zeros_like(value)
    for step in tl.static_range(6):
        rest = value >> (2 ** (5 - step))
        length = tl.where(rest > 0, length + 2 ** (5 - step), length)
        value = tl.where(rest > 0, rest, value)
    return length + value


@triton.jit
def integer_sqrt(value):
    """``floor(sqrt(value))``, int64 in [2^59, 2^62): a real root, put right by whole numbers; divisions take longer."""
    root = tl.sqrt(value.to(tl.float64)).to(tl.int64)
    root -= (root * root > value).to(tl.int64)
    return root + ((root + 1) * (root + 1) <= value).to(tl.int64)
