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

__all__ = ["MAX_COLUMNS", "integer_softmax", "softmax_factor"]

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
    evenly over more than 510 columns is all zeros.

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
    return torch.ops.lightning_compress.integer_softmax.default(value_RC, exponent_R, seen_RC, factor)


torch.library.define(
    "lightning_compress::integer_softmax",
    "(Tensor value, Tensor exponent, Tensor? seen, int factor) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(
    "lightning_compress::integer_softmax", "CompositeExplicitAutograd", reference.integer_softmax
)


@cache
def _cuda_implementation() -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.integer_softmax
    from lightning_compress.ops.integer_softmax import triton_kernel

    return triton_kernel.integer_softmax


@torch.library.impl("lightning_compress::integer_softmax", "CUDA")
def _on_cuda(value_RC: Tensor, exponent_R: Tensor, seen_RC: Tensor | None, factor: int) -> Tensor:
    return _cuda_implementation()(value_RC, exponent_R, seen_RC, factor)


@torch.library.register_fake("lightning_compress::integer_softmax")
def _fake(value_RC: Tensor, exponent_R: Tensor, seen_RC: Tensor | None, factor: int) -> Tensor:
    return value_RC.new_empty(value_RC.shape, dtype=torch.uint8)
