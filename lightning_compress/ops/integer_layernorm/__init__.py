"""``lightning_compress::integer_layernorm``: LayerNorm and RMSNorm of integers, without a float.

Schema and shapes are here; the next chapter is :mod:`lightning_compress.ops.integer_layernorm.reference`, which is
the meaning.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_compress.ops.fixed_point import align_rows, check_rows
from lightning_compress.ops.integer_layernorm import reference

__all__ = ["FixedPointAffine", "fixed_point_affine", "integer_layernorm"]

MAX_COLUMNS = 2**16
RESULT_BITS = 24
"""Of the result with its sign, so that fp32 holds it."""

_Rows = tuple[Tensor, Tensor]


class FixedPointAffine(NamedTuple):
    """What a norm multiplies by and adds, in integers."""

    gamma_C: Tensor
    """int16."""
    beta_C: Tensor | None
    """int32, at ``exponent``; None adds nothing."""
    shift: int
    """Digits that go from a normalised number (16 after the point) times gamma to the result."""
    exponent: int
    """Of the result, chosen so that no row can exceed 24 bits."""


def fixed_point_affine(weight_C: Tensor, bias_C: Tensor | None = None) -> FixedPointAffine:
    """Turn the weight and bias of a norm into integers, once.

    No normalised number is larger than the root of the width: the exponent of the result follows from that.

    Args:
        weight_C: The norm's weight, finite.
        bias_C: Its bias; None for norms without.

    Raises:
        ValueError: If one of them is infinite or NaN, or their sizes differ.

    Example:
        >>> affine = fixed_point_affine(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]))
        >>> affine.gamma_C.tolist(), affine.beta_C.tolist(), affine.shift, affine.exponent
        ([16384, 8192], [0, 2097152], 9, -21)
    """
    if weight_C.dim() != 1 or (bias_C is not None and bias_C.shape != weight_C.shape):
        shape = None if bias_C is None else tuple(bias_C.shape)
        raise ValueError(f"weight and bias are shaped {tuple(weight_C.shape)} and {shape}: give [C] and [C]")
    weight_C = weight_C.detach().float()
    gamma_1C, gamma_exponent_1 = align_rows(weight_C[None], bits=16)
    largest = math.sqrt(len(weight_C)) * float(weight_C.abs().max())
    if bias_C is not None:
        bias_C = bias_C.detach().float()
        largest += float(bias_C.abs().max())
    exponent = int(align_rows(torch.tensor([[largest]]), bits=RESULT_BITS)[1])
    beta_C = None if bias_C is None else (bias_C.double() * 2.0**-exponent).round().int()
    shift = max(exponent - int(gamma_exponent_1) + reference.FRACTION, 0)
    return FixedPointAffine(gamma_1C[0].short(), beta_C, shift, exponent)


def integer_layernorm(
    value_RC: Tensor,
    exponent_R: Tensor,
    affine: FixedPointAffine,
    eps: float = 1e-12,
    is_centred: bool = True,
) -> _Rows:
    """Normalise rows of integers, in integers.

    A normalised number differs from the exact one of these integers by about 2^-17 and 2^-20 of itself; gamma's
    rounding to 16 bits adds up to 2^-16 of its largest entry.

    Paper: BCT-style; the papers cover layer normalisation, its formula could not be read: our design [inferred].

    Args:
        value_RC: int32 of magnitudes under 2^15, to be multiplied by ``2 ** exponent``. Not checked.
        exponent_R: One for each row, int32.
        affine: From :func:`fixed_point_affine`.
        eps: Added to the variance, at least 0.
        is_centred: True for LayerNorm; False for RMSNorm, which leaves the mean in.

    Returns:
        int32 ``[R, C]`` and the exponents of its rows, int32 ``[R]``, all the same. fp32 holds these numbers
        exactly. A row without variance is the bias.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If shapes or devices do not fit together, there are more than 65,536 columns, or eps is negative
            or not finite.

    Example:
        >>> affine = fixed_point_affine(torch.ones(3))
        >>> value, exponent = integer_layernorm(torch.tensor([[1, 2, 3]]).int(), torch.tensor([5]).int(), affine)
        >>> value * 2.0 ** exponent[:, None]
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    check_rows(value_RC, exponent_R)
    width = value_RC.shape[1]
    if width > MAX_COLUMNS:
        raise ValueError(f"rows of {width} columns: their sums fit for at most {MAX_COLUMNS}")
    if affine.gamma_C.shape[0] != width:
        raise ValueError(
            f"the rows have {width} columns, gamma has {affine.gamma_C.shape[0]}: give one for each"
        )
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} is not in [0, inf): give the eps of the norm, such as 1e-12")
    return torch.ops.lightning_compress.integer_layernorm.default(
        value_RC, exponent_R, *affine, eps, is_centred
    )


torch.library.define(
    "lightning_compress::integer_layernorm",
    "(Tensor value, Tensor exponent, Tensor gamma, Tensor? beta, int shift, int result_exponent, float eps,"
    " bool is_centred) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl(
    "lightning_compress::integer_layernorm", "CompositeExplicitAutograd", reference.integer_layernorm
)


@cache
def _cuda_implementation() -> Callable[..., _Rows]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.integer_layernorm
    from lightning_compress.ops.integer_layernorm import triton_kernel

    return triton_kernel.integer_layernorm


@torch.library.impl("lightning_compress::integer_layernorm", "CUDA")
def _on_cuda(value_RC: Tensor, exponent_R: Tensor, *rest: Tensor | float | None) -> _Rows:
    return _cuda_implementation()(value_RC, exponent_R, *rest)


@torch.library.register_fake("lightning_compress::integer_layernorm")
def _fake(value_RC: Tensor, exponent_R: Tensor, *rest: Tensor | float | None) -> _Rows:
    return torch.empty_like(value_RC, memory_format=torch.contiguous_format), torch.empty_like(exponent_R)
