"""``lightning_compress::integer_softmax``: attention weights out of integer logits, without a float.

Schema and shapes are here; the next chapter is :mod:`lightning_compress.ops.integer_softmax.reference`, which is
the meaning.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_compress.ops.fixed_point import check_rows
from lightning_compress.ops.integer_softmax import reference

__all__ = ["MAX_COLUMNS", "integer_softmax", "integer_softmax_by_row", "softmax_factor"]

MAX_COLUMNS = 2**16
"""The sum of a row is under 2^31."""


def softmax_factor(scale: float) -> int:
    """Return ``log2(e) * scale`` with 15 digits after the point, which :func:`integer_softmax` multiplies by.

    Args:
        scale: By which logits are multiplied before the softmax: ``1 / sqrt(head size)``, in (2e-5, 2].

    Raises:
        ValueError: If the scale is out of range.

    Example:
        >>> softmax_factor(1 / 8)
        5909
    """
    if not (scale <= 2 and (factor := round(math.log2(math.e) * scale * 2**15)) >= 1):
        raise ValueError(f"scale={scale} is not in (2e-5, 2]: multiply the logits by a power of two before")
    return factor


def integer_softmax(
    value_RC: Tensor, exponent_R: Tensor, factor: int, seen_RC: Tensor | None = None
) -> Tensor:
    """Return the softmax of each row in steps of 1/256, computed in integers.

    A probability differs from the exact one by about half a step. Rows need not sum to 256; a row that spreads
    evenly over more than 510 columns is all zeros: :func:`integer_softmax_by_row` is for long rows.

    Paper: BCT-style; the papers cover softmax, its formula could not be read: our design [inferred].

    Args:
        value_RC: Logits, int32 of magnitudes under 2^30, to be multiplied by ``2 ** exponent``. Not checked.
        exponent_R: One for each row, int32.
        factor: From :func:`softmax_factor`.
        seen_RC: False for columns that are masked: they get 0, and a row without any other is all zeros; bool.

    Returns:
        uint8 ``[R, C]``: probabilities times 256, at most 255.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If shapes or devices do not fit together, there are more than 65,536 columns, or the factor is
            not in [1, 2^17].

    Example:
        >>> logits = torch.tensor([[3, 2, 9], [0, 0, 0]], dtype=torch.int32)
        >>> seen = torch.tensor([[True, True, False], [False, False, False]])
        >>> integer_softmax(logits, torch.tensor([0, 0], dtype=torch.int32), softmax_factor(1.0), seen).tolist()
        [[187, 69, 0], [0, 0, 0]]
    """
    _check(value_RC, exponent_R, factor, seen_RC)
    operator = torch.ops.lightning_compress.integer_softmax.default
    return operator(value_RC, exponent_R, seen_RC, factor, False)[0]


def integer_softmax_by_row(
    value_RC: Tensor, exponent_R: Tensor, factor: int, seen_RC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the softmax of each row in steps of a power of two of its own, computed in integers.

    The largest probability of a row takes all 8 bits: rows that spread over many columns keep as many digits as
    others, and the exponents are factors of ``[R, 1]`` blocks in a product with values.

    Args:
        value_RC: As in :func:`integer_softmax`.
        exponent_R: As in :func:`integer_softmax`.
        factor: As in :func:`integer_softmax`.
        seen_RC: As in :func:`integer_softmax`.

    Returns:
        uint8 ``[R, C]``, and by which powers of two to multiply its rows, int32 ``[R]`` from -23 to -8.

    Raises:
        TypeError: As :func:`integer_softmax`.
        ValueError: As :func:`integer_softmax`.

    Example:
        >>> value, exponent = torch.zeros(1, 5, dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
        >>> integer_softmax_by_row(value, exponent, softmax_factor(1.0))  # 205 / 1024 is 0.2002
        (tensor([[205, 205, 205, 205, 205]], dtype=torch.uint8), tensor([-10], dtype=torch.int32))
    """
    _check(value_RC, exponent_R, factor, seen_RC)
    return torch.ops.lightning_compress.integer_softmax.default(value_RC, exponent_R, seen_RC, factor, True)


def _check(value_RC: Tensor, exponent_R: Tensor, factor: int, seen_RC: Tensor | None) -> None:
    check_rows(value_RC, exponent_R)
    if seen_RC is not None:
        if seen_RC.dtype != torch.bool:
            raise TypeError(f"seen_RC is {seen_RC.dtype}: give bool, such as mask > 0")
        if seen_RC.shape != value_RC.shape or seen_RC.device != value_RC.device:
            raise ValueError(
                f"the mask is {tuple(seen_RC.shape)} on {seen_RC.device}, the logits are "
                f"{tuple(value_RC.shape)} on {value_RC.device}: give them one shape on one device"
            )
    if value_RC.shape[1] > MAX_COLUMNS:
        raise ValueError(f"rows of {value_RC.shape[1]} columns: their sum fits for at most {MAX_COLUMNS}")
    if not 1 <= factor <= 2**17:
        raise ValueError(f"factor={factor} is not in [1, 2^17]: take it from softmax_factor(scale)")


torch.library.define(
    "lightning_compress::integer_softmax",
    "(Tensor value, Tensor exponent, Tensor? seen, int factor, bool by_row) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(
    "lightning_compress::integer_softmax", "CompositeExplicitAutograd", reference.integer_softmax
)


@cache
def _cuda_implementation() -> Callable[[Tensor, Tensor, Tensor | None, int, bool], tuple[Tensor, Tensor]]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.integer_softmax
    from lightning_compress.ops.integer_softmax import triton_kernel

    return triton_kernel.integer_softmax


@torch.library.impl("lightning_compress::integer_softmax", "CUDA")
def _on_cuda(
    value_RC: Tensor, exponent_R: Tensor, seen_RC: Tensor | None, factor: int, by_row: bool
) -> tuple[Tensor, Tensor]:
    return _cuda_implementation()(value_RC, exponent_R, seen_RC, factor, by_row)


@torch.library.register_fake("lightning_compress::integer_softmax")
def _fake(
    value_RC: Tensor, exponent_R: Tensor, seen_RC: Tensor | None, factor: int, by_row: bool
) -> tuple[Tensor, Tensor]:
    return value_RC.new_empty(value_RC.shape, dtype=torch.uint8), exponent_R.new_empty(exponent_R.shape)
