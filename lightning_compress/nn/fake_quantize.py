"""Numbers that float tensors hold as if they were integers in blocks, with straight-through gradients: for training.

The integers themselves: :mod:`lightning_compress.ops.block_quantize` and :mod:`lightning_compress.ops.block_matmul`,
to which the results here are equal, bit for bit where factors are powers of two. In which blocks:
:mod:`lightning_compress.nn.block_format`.

Shape legend: R rows, C columns; M rows of a, N rows of b, K columns of both, D of them in a block; Q blocks over K; any
dimensions may come before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.nn.block_format import BlockFormat
from lightning_compress.ops.block_dequantize import block_dequantize
from lightning_compress.ops.block_matmul import MAX_GUARD_BITS
from lightning_compress.ops.block_matmul.reference import bias_exponents, largest_exponents
from lightning_compress.ops.block_quantize import block_quantize
from lightning_compress.ops.block_quantize.reference import power_of_two
from lightning_compress.ops.block_round import block_round

__all__ = ["fake_block_matmul", "fake_quantize"]


def fake_quantize(x_RC: Tensor, form: BlockFormat) -> Tensor:
    """Round a matrix to what its format can hold, in its own dtype; the gradient passes as if nothing had happened.

    No element is cut off, so no gradient is: the largest of a block always fits (the one exception, magnitudes that no
    exponent reaches, is told of at :func:`~lightning_compress.ops.block_quantize.block_quantize`).

    Args:
        x_RC: Real numbers ``[..., R, C]``; each matrix has blocks of its own.
        form: Bits, blocks and kind of factors.

    Returns:
        ``[..., R, C]``, integers times factors. In bfloat16 they are exact if factors are powers of two.

    Raises:
        TypeError: If ``x_RC`` is not floating.
        ValueError: If it has less than two dimensions or, on CPU, an element that is not finite.

    Example:
        >>> x = torch.tensor([[1.0, 0.3, 6.4]], requires_grad=True)
        >>> held = fake_quantize(x, BlockFormat(bits=4, factor="shift"))
        >>> held.tolist(), torch.autograd.grad(held.sum(), x)[0].tolist()
        ([[1.0, 0.0, 6.0]], [[1.0, 1.0, 1.0]])
    """
    if torch.is_grad_enabled() and x_RC.requires_grad:
        return _Rounding.apply(x_RC, form)  # type: ignore[return-value]
    return _rounded(x_RC, form)


def fake_block_matmul(
    a_MK: Tensor,
    b_NK: Tensor,
    a_form: BlockFormat,
    b_form: BlockFormat,
    bias_N: Tensor | None = None,
    guard_bits: int = 6,
) -> Tensor:
    """Quantise two matrices and multiply them as ``block_matmul`` does, in floats: ``a @ b.T + bias``.

    Equal to it bit for bit if factors are powers of two, and up to the rounding of float32 sums if they are scales.
    Gradients are those of the product of the quantised matrices; what rounds lets them pass.

    Args:
        a_MK: Real numbers ``[..., M, K]``.
        b_NK: Real numbers ``[..., N, K]``, with the same dimensions before.
        a_form: Format of ``a_MK``.
        b_form: Format of ``b_NK``; its factors are of the same kind, its blocks have as many columns, unless those of
            one of the two have all.
        bias_N: ``[N]``, or None.
        guard_bits: 0 to 16; as of :func:`~lightning_compress.ops.block_matmul.block_matmul`.

    Returns:
        ``[..., M, N]``, float32.

    Raises:
        ValueError: If the formats do not fit together, or a number is out of its range.

    Example:
        >>> a, b = torch.tensor([[0.9, 4.0]]), torch.tensor([[2.0, 1.0]], requires_grad=True)
        >>> form = BlockFormat(bits=3, factor="shift")
        >>> fake_block_matmul(a, b, form, form).item()  # 0 * 2 + 4 * 1
        4.0
    """
    if a_form.factor != b_form.factor:
        raise ValueError(f"factors are {a_form.factor!r} and {b_form.factor!r}: give both formats the same")
    depth = a_MK.shape[-1]
    edges = [form.block[1] or depth for form in (a_form, b_form)]
    if edges[0] != edges[1] and max(edges) < depth:
        raise ValueError(
            f"blocks have {edges[0]} and {edges[1]} columns, of {depth}: give both as many, or one all"
        )
    if not 0 <= guard_bits <= MAX_GUARD_BITS:
        raise ValueError(f"guard_bits={guard_bits} is not from 0 to {MAX_GUARD_BITS}")
    return _Product.apply(a_MK, b_NK, bias_N, a_form, b_form, guard_bits)  # type: ignore[return-value]


def _rounded(x_RC: Tensor, form: BlockFormat) -> Tensor:
    return block_round(x_RC, form.bits, form.block, form.factor).to(x_RC.dtype)


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, form: BlockFormat) -> Tensor:
        return _rounded(x_RC, form)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a_MK: Tensor,
        b_NK: Tensor,
        bias_N: Tensor | None,
        a_form: BlockFormat,
        b_form: BlockFormat,
        guard_bits: int,
    ) -> Tensor:
        a_payload_MK, a_factor = block_quantize(a_MK, a_form.bits, a_form.block, a_form.factor)
        b_payload_NK, b_factor = block_quantize(b_NK, b_form.bits, b_form.block, b_form.factor)
        a_held_MK = block_dequantize(a_payload_MK, a_factor, a_form.block)
        b_held_NK = block_dequantize(b_payload_NK, b_factor, b_form.block)
        ctx.save_for_backward(a_held_MK, b_held_NK)
        ctx.dtypes = a_MK.dtype, b_NK.dtype, None if bias_N is None else bias_N.dtype
        bias_N = None if bias_N is None else bias_N.float()
        with torch.autocast(a_MK.device.type, enabled=False):
            if a_form.factor == "scale":
                return a_held_MK @ b_held_NK.mT + (0.0 if bias_N is None else bias_N)
            a_exponent_MQ = _of_rows(a_factor, a_form, a_held_MK)
            b_exponent_NQ = _of_rows(b_factor, b_form, b_held_NK)
            edge = min(form.block[1] or a_MK.shape[-1] for form in (a_form, b_form))
            return _aligned_product(
                a_held_MK, b_held_NK, a_exponent_MQ, b_exponent_NQ, bias_N, edge, guard_bits
            )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_MN,), (a_held_MK, b_held_NK) = grads, ctx.saved_tensors
        a_dtype, b_dtype, bias_dtype = ctx.dtypes
        wants_a, wants_b, wants_bias, *_ = ctx.needs_input_grad
        grad_a = (grad_MN @ b_held_NK).to(a_dtype) if wants_a else None
        grad_b = (grad_MN.mT @ a_held_MK).to(b_dtype) if wants_b else None
        grad_bias = grad_MN.flatten(0, -2).sum(0).to(bias_dtype) if wants_bias else None
        return grad_a, grad_b, grad_bias, None, None, None


def _aligned_product(
    a_held_MK: Tensor,
    b_held_NK: Tensor,
    a_exponent_MQ: Tensor,
    b_exponent_NQ: Tensor,
    bias_N: Tensor | None,
    edge: int,
    guard_bits: int,
) -> Tensor:
    """Sum the products of blocks as integers aligned to the largest exponent, which float64 holds."""
    num_blocks = max(a_exponent_MQ.shape[-1], b_exponent_NQ.shape[-1])
    exponent_MN = largest_exponents(
        *(factor.expand(*factor.shape[:-1], num_blocks) for factor in (a_exponent_MQ, b_exponent_NQ))
    )
    if bias_N is not None:
        exponent_MN = torch.maximum(exponent_MN, bias_exponents(bias_N, guard_bits))
    unit_MN = power_of_two(guard_bits - exponent_MN).double()
    sum_MN = torch.zeros_like(unit_MN) if bias_N is None else (bias_N * unit_MN).round()
    for a_MD, b_ND in zip(a_held_MK.split(edge, -1), b_held_NK.split(edge, -1), strict=True):
        if edge * 127**2 >= 2**24:  # more than float32 holds
            a_MD, b_ND = a_MD.double(), b_ND.double()
        sum_MN += ((a_MD @ b_ND.mT) * unit_MN).round()
    return sum_MN.float() * power_of_two(exponent_MN - guard_bits)


def _of_rows(factor_PQ: Tensor, form: BlockFormat, matrix_RC: Tensor) -> Tensor:
    """Factors of each row instead of each block of rows."""
    num_rows = matrix_RC.shape[-2]
    return factor_PQ.repeat_interleave(form.block[0] or num_rows, dim=-2)[..., :num_rows, :]
