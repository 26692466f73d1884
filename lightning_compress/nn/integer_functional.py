"""Softmax, activations and norms of floats, computed in integers: what a float model calls.

Every row is written as integers with one exponent, goes through the integer operator, and comes back as the floats
that hold its integers exactly (fp32). Gradients are those of the exact float function. The integers are in
:mod:`lightning_compress.ops.integer_softmax` and its neighbours.

Shape legend: ... any leading sizes, R their product, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.ops.fixed_point import align_rows, held_in_floats
from lightning_compress.ops.integer_gelu import integer_gelu
from lightning_compress.ops.integer_layernorm import FixedPointAffine, fixed_point_affine, integer_layernorm
from lightning_compress.ops.integer_softmax import integer_softmax_by_row, softmax_factor

__all__ = [
    "LOGIT_BITS",
    "ROW_BITS",
    "activation_of_integers",
    "layernorm_of_integers",
    "rmsnorm_of_integers",
    "softmax_of_integers",
]

ROW_BITS = 16
"""Of what goes into norms and activations."""

LOGIT_BITS = 31
"""Of logits."""


def softmax_of_integers(logits_C: Tensor, seen_C: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Return the softmax over the last dimension, as :func:`integer_softmax_by_row` computes it.

    Args:
        logits_C: ``[..., C]``, finite wherever seen.
        seen_C: False for columns that are masked, broadcast over the logits; None sees all.
        scale: By which logits are multiplied before: ``1 / sqrt(head size)``.

    Returns:
        Probabilities ``[..., C]`` in the dtype of the logits, multiples of a power of two of their row. A row of which
        nothing is seen is zeros, and gets no gradient.

    Raises:
        ValueError: If the scale is out of range, or a logit that is seen is infinite or NaN (on CPU).

    Example:
        >>> softmax_of_integers(torch.tensor([2.0, 1.0, -5.0])).tolist()
        [0.73046875, 0.26953125, 0.0]
    """
    if seen_C is not None:
        seen_C = seen_C.expand_as(logits_C)
        logits_C = torch.where(seen_C, logits_C, 0.0)
    value_RC, exponent_R = align_rows(_rows(logits_C), LOGIT_BITS)
    seen_RC = None if seen_C is None else _rows(seen_C)
    rows = integer_softmax_by_row(value_RC, exponent_R, softmax_factor(scale), seen_RC)
    held_C = _restored(*rows, logits_C)
    if not _wants_gradient(logits_C):
        return held_C
    masked_C = logits_C if seen_C is None else logits_C.masked_fill(~seen_C, torch.finfo(logits_C.dtype).min)
    exact_C = (masked_C * scale).softmax(-1)
    if seen_C is not None:
        exact_C = exact_C.masked_fill(~seen_C, 0.0)
    return _StraightThrough.apply(exact_C, held_C)


def activation_of_integers(x_C: Tensor, function: str = "gelu") -> Tensor:
    """Return an activation function of each number, as :func:`integer_gelu` computes it.

    Args:
        x_C: ``[..., C]``, finite; numbers of a row (the last dimension) share an exponent and 16 bits.
        function: "gelu", "gelu_tanh", "silu" or "relu".

    Raises:
        ValueError: If the function is none of these, or a number is infinite or NaN (on CPU).

    Example:
        >>> activation_of_integers(torch.tensor([-1.0, 0.0, 1.0, 5.0]))
        tensor([-0.1587,  0.0000,  0.8413,  5.0000])
    """
    value_RC, exponent_R = integer_gelu(*align_rows(_rows(x_C), ROW_BITS), function)
    held_C = _restored(value_RC, exponent_R, x_C)
    return _StraightThrough.apply(_EXACT[function](x_C), held_C) if _wants_gradient(x_C) else held_C


def layernorm_of_integers(
    x_C: Tensor,
    weight_C: Tensor,
    bias_C: Tensor | None = None,
    eps: float = 1e-12,
    affine: FixedPointAffine | None = None,
) -> Tensor:
    """Return the layer norm over the last dimension, as :func:`integer_layernorm` computes it.

    Args:
        x_C: ``[..., C]``, finite; numbers of a row share an exponent and 16 bits.
        weight_C: What normalised numbers are multiplied by.
        bias_C: What is then added; None adds nothing.
        eps: Added to the variance.
        affine: ``fixed_point_affine(weight, bias)`` if it is at hand; by default it is made anew.

    Raises:
        ValueError: If sizes differ, or a number is infinite or NaN (on CPU).

    Example:
        >>> layernorm_of_integers(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3))
        tensor([-1.2247,  0.0000,  1.2247])
    """
    affine = affine or fixed_point_affine(weight_C, bias_C)
    value_RC, exponent_R = integer_layernorm(*align_rows(_rows(x_C), ROW_BITS), affine, eps)
    held_C = _restored(value_RC, exponent_R, x_C)
    if not _wants_gradient(x_C, weight_C, bias_C):
        return held_C
    return _StraightThrough.apply(F.layer_norm(x_C, weight_C.shape, weight_C, bias_C, eps), held_C)


def rmsnorm_of_integers(
    x_C: Tensor, weight_C: Tensor, eps: float = 1e-6, affine: FixedPointAffine | None = None
) -> Tensor:
    """Return the root-mean-square norm over the last dimension, as :func:`integer_layernorm` computes it.

    Args:
        x_C: ``[..., C]``, finite; numbers of a row share an exponent and 16 bits.
        weight_C: What normalised numbers are multiplied by.
        eps: Added to the mean of squares.
        affine: ``fixed_point_affine(weight)`` if it is at hand; by default it is made anew.

    Raises:
        ValueError: If sizes differ, or a number is infinite or NaN (on CPU).

    Example:
        >>> rmsnorm_of_integers(torch.tensor([3.0, 4.0]), torch.ones(2))
        tensor([0.8485, 1.1314])
    """
    affine = affine or fixed_point_affine(weight_C)
    value_RC, exponent_R = integer_layernorm(*align_rows(_rows(x_C), ROW_BITS), affine, eps, is_centred=False)
    held_C = _restored(value_RC, exponent_R, x_C)
    if not _wants_gradient(x_C, weight_C):
        return held_C
    return _StraightThrough.apply(F.rms_norm(x_C, weight_C.shape, weight_C, eps), held_C)


_EXACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x_C: F.gelu(x_C, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


class _StraightThrough(torch.autograd.Function):
    """The second argument forward, the gradient to the first one."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, held: Tensor) -> Tensor:
        return held

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _rows(x_C: Tensor) -> Tensor:
    return x_C.reshape(-1, x_C.shape[-1])


def _restored(value_RC: Tensor, exponent_R: Tensor, x_C: Tensor) -> Tensor:
    return held_in_floats(value_RC, exponent_R).to(x_C.dtype).view(x_C.shape)
