"""``lightning_compress::block_matmul``: the product of two matrices held as integers in blocks.

Schema, checks, shapes and the bias's gradient are here; the next chapter is
:mod:`lightning_compress.ops.block_matmul.reference`, which is the meaning. The integers come from
:mod:`lightning_compress.ops.block_quantize`.

Shape legend: M rows of a, N rows of b, K columns of both, which the product sums over; P, Q blocks over rows and
columns; any dimensions may come before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lightning_compress.ops.block_dequantize import check_payload
from lightning_compress.ops.block_matmul import reference

__all__ = ["MAX_DEPTH", "MAX_GUARD_BITS", "block_matmul"]

MAX_DEPTH = 65_536
"""Most columns: up to there int32 holds the sum of one block's products, even of uint8 by int8."""

MAX_GUARD_BITS = 16

_DTYPES = {"scale": torch.float32, "shift": torch.int8}


def block_matmul(
    a_MK: Tensor,
    a_factor_PQ: Tensor,
    b_NK: Tensor,
    b_factor_PQ: Tensor,
    bias_N: Tensor | None,
    a_block: tuple[int, int],
    b_block: tuple[int, int],
    factor: str,
    guard_bits: int = 6,
) -> Tensor:
    """Multiply two matrices held as integers in blocks: ``a @ b.T + bias``.

    Within a block over K integers are summed in int32. Across blocks ``"scale"`` sums real numbers in float32, and
    ``"shift"`` integers that are aligned to the largest exponent of an output, with ``guard_bits`` bits more behind the
    point: see :func:`lightning_compress.ops.block_matmul.reference.block_matmul`. The result of ``"shift"`` does not
    depend on the order of summation and is the same on every device; it is exact in float32 where the sum of an
    output has at most 24 significant bits, and rounded once, halves to even, where it has more.

    Only ``bias_N`` has a gradient; :func:`lightning_compress.nn.fake_quantize.fake_block_matmul` has those of both
    operands.

    Args:
        a_MK: Integers ``[..., M, K]``, int8, or uint8.
        a_factor_PQ: Their factors: float32 scales or int8 exponents of two.
        b_NK: Integers ``[..., N, K]``, int8, with the same dimensions before.
        b_factor_PQ: Their factors, of the same kind.
        bias_N: Float32 ``[N]``, finite, or None.
        a_block: Rows and columns of a block of ``a``; 0 means all there are.
        b_block: The same of ``b``. The columns of both have to be as many, unless one of them is all of K.
        factor: ``"scale"`` or ``"shift"``: what the factors are.
        guard_bits: 0 to 16; for ``"shift"`` only. With none every block but those of the largest exponent loses bits.

    Returns:
        ``[..., M, N]``, float32, contiguous.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If shapes, blocks or devices do not fit together, K is above 65 536, or a number is out of its
            range.

    Paper: BBCT (arXiv 2303.09184), BCT (arXiv 2304.01483). Their bodies were not readable: accumulation with aligned
    exponents and guard bits is [inferred], BCT-style and our own design.

    Example:
        >>> a, b = torch.tensor([[3, 1]], dtype=torch.int8), torch.tensor([[2, 5]], dtype=torch.int8)
        >>> exponents = torch.tensor([[-1, -3]], dtype=torch.int8), torch.tensor([[0]], dtype=torch.int8)
        >>> block_matmul(a, exponents[0], b, exponents[1], None, (1, 1), (1, 0), "shift").item()  # 6 / 2 + 5 / 8
        3.625
    """
    _check_values(bias_N, factor, guard_bits)
    sides = _check_operands(a_MK, a_factor_PQ, b_NK, b_factor_PQ, a_block, b_block, factor)
    if bias_N is not None and (bias_N.shape != b_NK.shape[-2:-1] or bias_N.device != a_MK.device):
        raise ValueError(
            f"bias_N is shaped {tuple(bias_N.shape)}, on {bias_N.device}: give [{b_NK.shape[-2]}], on {a_MK.device}"
        )
    return torch.ops.lightning_compress.block_matmul.default(
        a_MK, a_factor_PQ, b_NK, b_factor_PQ, bias_N, *sides, guard_bits
    )


def _check_values(bias_N: Tensor | None, factor: str, guard_bits: int) -> None:
    if factor not in _DTYPES:
        raise ValueError(f"factor={factor!r} is not one of {list(_DTYPES)}")
    if not 0 <= guard_bits <= MAX_GUARD_BITS:
        raise ValueError(f"guard_bits={guard_bits} is not from 0 to {MAX_GUARD_BITS}")
    if bias_N is not None and bias_N.dtype != torch.float32:
        raise TypeError(f"bias_N is {bias_N.dtype}: give float32")


def _check_operands(
    a_MK: Tensor,
    a_factor_PQ: Tensor,
    b_NK: Tensor,
    b_factor_PQ: Tensor,
    a_block: tuple[int, int],
    b_block: tuple[int, int],
    factor: str,
) -> tuple[int, int, int, int]:
    sides = (
        *check_payload("a_MK", a_MK, a_factor_PQ, a_block),
        *check_payload("b_NK", b_NK, b_factor_PQ, b_block),
    )
    if b_NK.dtype != torch.int8:
        raise TypeError(f"b_NK is {b_NK.dtype}: give int8; only a_MK may be uint8")
    if not a_factor_PQ.dtype == b_factor_PQ.dtype == _DTYPES[factor]:
        raise TypeError(
            f"factors are {a_factor_PQ.dtype} and {b_factor_PQ.dtype}: {factor!r} wants {_DTYPES[factor]}"
        )
    depth = a_MK.shape[-1]
    if a_MK.shape[:-2] != b_NK.shape[:-2] or depth != b_NK.shape[-1] or a_MK.device != b_NK.device:
        raise ValueError(
            f"a_MK is shaped {tuple(a_MK.shape)}, on {a_MK.device}, and b_NK {tuple(b_NK.shape)}, on {b_NK.device}: "
            "all but the last but one dimension have to be the same, and the device"
        )
    edges = [side or depth for side in (sides[1], sides[3])]
    if edges[0] != edges[1] and max(edges) < depth:
        raise ValueError(
            f"blocks of a_MK have {edges[0]} columns and those of b_NK {edges[1]}, of {depth}: give both as many, or "
            "one of them all"
        )
    if depth > MAX_DEPTH:
        raise ValueError(f"there are {depth} columns: at most {MAX_DEPTH} are summed without overflow")
    return sides


torch.library.define(
    "lightning_compress::block_matmul",
    "(Tensor a, Tensor a_factors, Tensor b, Tensor b_factors, Tensor? bias, "
    "int a_rows, int a_columns, int b_rows, int b_columns, int guard_bits) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("lightning_compress::block_matmul", "CompositeExplicitAutograd", reference.block_matmul)


@cache
def _cuda_implementation() -> Callable[..., Tensor]:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return reference.block_matmul
    from lightning_compress.ops.block_matmul import triton_kernel

    return triton_kernel.block_matmul


@torch.library.impl("lightning_compress::block_matmul", "CUDA")
def _block_matmul_on_cuda(*arguments: Any) -> Tensor:
    return _cuda_implementation()(*arguments)


@torch.library.register_fake("lightning_compress::block_matmul")
def _fake(a_MK: Tensor, a_factor_PQ: Tensor, b_NK: Tensor, *_: Any) -> Tensor:
    return a_MK.new_empty(*a_MK.shape[:-1], b_NK.shape[-2], dtype=torch.float32)


def _sum_over_rows(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[4]
    grad_N = grad_MN.sum(dim=tuple(range(grad_MN.dim() - 1))) if wanted else None
    return None, None, None, None, grad_N, None, None, None, None, None


torch.library.register_autograd("lightning_compress::block_matmul", _sum_over_rows)
