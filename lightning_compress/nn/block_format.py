"""In how many bits a matrix is held, in which blocks, and how its integers lie in memory.

The next chapters: :mod:`lightning_compress.ops.block_quantize` makes the integers,
:mod:`lightning_compress.nn.fake_quantize` trains with them.

Shape legend: R rows, C columns, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import ceil, prod
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["BlockFormat", "Factor", "pack_payload", "unpack_payload"]

Factor = Literal["scale", "shift"]

_FACTOR_BITS = {"scale": 32, "shift": 8}
"""A float32, or an exponent in one byte."""


@dataclass(frozen=True)
class BlockFormat:
    """Signed integers of few bits, and one factor for each block of a matrix.

    Symmetric: an element is an integer from -(2^(bits-1) - 1) to 2^(bits-1) - 1, times the factor of its block.

    Args:
        bits: Bits of an integer, 2 to 8.
        block: Rows and columns of a block; 0 means all there are. ``(1, 0)`` is a factor per row, ``(0, 0)`` one for
            the whole matrix, ``(1, 128)`` one for each 128 elements of a row. Blocks at the edges may be smaller.
        factor: ``"scale"``, any real number, or ``"shift"``, a power of two.

    Raises:
        TypeError: If ``bits`` or a side of the block is no integer.
        ValueError: If one of them is out of its range.

    Paper: BBCT (arXiv 2303.09184) and BCT (arXiv 2304.01483) compress in blocks; their bodies were not readable, so
    this format is BCT-style and our own design.

    Example:
        >>> BlockFormat(bits=4, block=(32, 32), factor="shift").factor_shape((64, 100))
        (2, 4)
    """

    bits: int = 8
    block: tuple[int, int] = (1, 0)
    factor: Factor = "scale"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))
        if any(type(number) is not int for number in (self.bits, *self.block)):
            raise TypeError(f"bits={self.bits!r} and block={self.block!r} have to be integers")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is not from 2 to 8")
        if len(self.block) != 2 or min(self.block) < 0:
            raise ValueError(
                f"block={self.block} is not two numbers of at least 0: give rows and columns, 0 for all there are"
            )
        if self.factor not in _FACTOR_BITS:
            raise ValueError(f"factor={self.factor!r} is not one of {list(_FACTOR_BITS)}")

    @property
    def largest(self) -> int:
        """Largest integer, 2^(bits-1) - 1."""
        return 2 ** (self.bits - 1) - 1

    @property
    def payload_bits(self) -> int:
        """Bits in which an integer is stored: 4 or 8."""
        return 4 if self.bits <= 4 else 8

    @property
    def block_in_words(self) -> str:
        """What shares a factor: ``"row"``, or the sides, such as ``"32 × 32"`` or ``"all × all"``."""
        sides = ["all" if side == 0 else str(side) for side in self.block]
        return "row" if self.block == (1, 0) else " × ".join(sides)

    def factor_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Number of blocks over the rows and over the columns of a matrix of this shape."""
        down, across = (
            ceil(size / (side or max(size, 1))) for size, side in zip(shape, self.block, strict=True)
        )
        return down, across

    def storage_bits(self, shape: tuple[int, int]) -> int:
        """Bits that a matrix of this shape takes: whole bytes of packed integers for each row, and the factors.

        Example:
            >>> BlockFormat(bits=4, block=(32, 32), factor="shift").storage_bits((1024, 1024)) / 1024**2
            4.0078125
        """
        rows, columns = shape
        payload = rows * 8 * ceil(columns * self.payload_bits / 8)
        return payload + prod(self.factor_shape(shape)) * _FACTOR_BITS[self.factor]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self) | {"block": list(self.block)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockFormat:
        """Rebuild a format from plain values.

        Raises:
            ValueError: If a field is unknown to this release, or a value is out of its range.
        """
        unknown = sorted(set(data) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"BlockFormat has no fields {unknown}; it knows bits, block and factor")
        return cls(**data)


def pack_payload(payload_RC: Tensor, bits: int) -> Tensor:
    """Put integers of up to 4 bits two in a byte, and others one in a byte.

    Args:
        payload_RC: Integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1, int8. Their range is not checked.
        bits: Bits of an integer, 2 to 8.

    Returns:
        ``[R, ceil(C / 2)]`` for up to 4 bits, else ``[R, C]``, uint8. The first of two is in the lower half; a last
        one alone has zeros above it.

    Raises:
        TypeError: If the integers are not int8.
        ValueError: If they are no matrix, or ``bits`` is out of its range.

    Example:
        >>> pack_payload(torch.tensor([[1, -1, 3]], dtype=torch.int8), bits=4).tolist()
        [[241, 3]]
    """
    _check(payload_RC, torch.int8, bits)
    if bits > 4:
        return payload_RC.contiguous().view(torch.uint8).clone()
    if payload_RC.shape[1] % 2:
        payload_RC = torch.nn.functional.pad(payload_RC, (0, 1))
    nibbles_RC = payload_RC.contiguous().view(torch.uint8) & 15
    return nibbles_RC[:, 0::2] | (nibbles_RC[:, 1::2] << 4)


def unpack_payload(packed_RB: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`pack_payload`.

    Args:
        packed_RB: What it returned.
        bits: As it was given.
        columns: Number of columns C, which a packed row does not tell.

    Returns:
        ``[R, C]``, int8.

    Raises:
        TypeError: If the bytes are not uint8.
        ValueError: If they are no matrix, rows are not as long as ``columns`` asks, or ``bits`` is out of its range.

    Example:
        >>> unpack_payload(torch.tensor([[241, 3]], dtype=torch.uint8), bits=4, columns=3).tolist()
        [[1, -1, 3]]
    """
    _check(packed_RB, torch.uint8, bits)
    expected = ceil(columns / 2) if bits <= 4 else columns
    if packed_RB.shape[1] != expected:
        raise ValueError(
            f"a row has {packed_RB.shape[1]} bytes: {columns} columns of {bits} bits have {expected}"
        )
    if bits > 4:
        return packed_RB.contiguous().view(torch.int8).clone()
    halves_RB2 = torch.stack([packed_RB << 4, packed_RB & 0xF0], dim=2)
    return (halves_RB2.view(torch.int8) >> 4).flatten(1)[:, :columns].contiguous()


def _check(matrix: Tensor, dtype: torch.dtype, bits: int) -> None:
    if matrix.dtype != dtype:
        raise TypeError(f"the integers are {matrix.dtype}: give {dtype}")
    if matrix.dim() != 2:
        raise ValueError(f"the integers are shaped {tuple(matrix.shape)}: give a matrix")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} is not from 2 to 8")
