"""``lightning_compress::{softmax,gelu,layernorm}_of_blocks``: small integers in, small integers out.

Each one reads int8 with a factor for every 1 x c block, computes as the integer operator of its name does, and rounds
to blocks again: on CUDA one kernel, which reads and writes a byte for each number. Schemas and shapes are here; the
next chapter is :mod:`lightning_compress.ops.integer_blocks.reference`, which is the meaning.

Shape legend: R rows, C columns, Q blocks of c columns each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from lightning_compress.ops.integer_blocks import reference
from lightning_compress.ops.integer_gelu import FUNCTIONS
from lightning_compress.ops.integer_layernorm import FixedPointAffine
from lightning_compress.ops.integer_softmax import softmax_factor

__all__ = ["gelu_of_blocks", "layernorm_of_blocks", "softmax_of_blocks"]

_Blocks = tuple[Tensor, Tensor]


def softmax_of_blocks(
    payload_RC: Tensor, factor_RQ: Tensor, columns: int, scale: float = 1.0, seen_RC: Tensor | None = None
) -> Tensor:
    """Return the softmax of rows of blocks in steps of 1/256.

    Args:
        payload_RC: Logits, int8.
        factor_RQ: One for each block: float32 scales, or int8 exponents of two.
        columns: Of a block; 0 for whole rows.
        scale: By which logits are multiplied before, as in
            :func:`lightning_compress.ops.integer_softmax.softmax_factor`.
        seen_RC: False for columns that are masked; None sees all.

    Returns:
        uint8 ``[R, C]``: probabilities times 256, at most 255.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If shapes do not fit together, or the scale is out of range.

    Example:
        >>> softmax_of_blocks(torch.tensor([[1, 0]], dtype=torch.int8), torch.ones(1, 1), columns=0).tolist()
        [[187, 69]]
    """
    _check(payload_RC, factor_RQ, columns)
    if seen_RC is not None and (seen_RC.dtype, seen_RC.shape) != (torch.bool, payload_RC.shape):
        raise ValueError(
            f"the mask is {seen_RC.dtype}, {tuple(seen_RC.shape)}: give bool, {tuple(payload_RC.shape)} as the logits"
        )
    operator = torch.ops.lightning_compress.softmax_of_blocks.default
    return operator(payload_RC, factor_RQ, seen_RC, columns, softmax_factor(scale))


def gelu_of_blocks(
    payload_RC: Tensor, factor_RQ: Tensor, columns: int, function: str = "gelu", bits: int = 8
) -> _Blocks:
    """Apply an activation function to rows of blocks.

    Args:
        payload_RC: int8.
        factor_RQ: One for each block: float32 scales, or int8 exponents of two.
        columns: Of a block, before and after; 0 for whole rows.
        function: As in :func:`lightning_compress.ops.integer_gelu.integer_gelu`.
        bits: Of the result, 2 to 8.

    Returns:
        int8 ``[R, C]``, and factors ``[R, Q]`` of the kind given.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If shapes do not fit together, or a setting is out of range.

    Example:
        >>> payload = torch.tensor([[-127, 127]], dtype=torch.int8)
        >>> gelu_of_blocks(payload, torch.tensor([[-5]], dtype=torch.int8), columns=0)
        (tensor([[  0, 127]], dtype=torch.int8), tensor([[-5]], dtype=torch.int8))
    """
    _check(payload_RC, factor_RQ, columns, bits)
    if function not in FUNCTIONS:
        raise ValueError(f"function={function!r} is not one of {', '.join(FUNCTIONS)}")
    operator = torch.ops.lightning_compress.gelu_of_blocks.default
    return operator(payload_RC, factor_RQ, columns, function, bits)


def layernorm_of_blocks(
    payload_RC: Tensor,
    factor_RQ: Tensor,
    columns: int,
    affine: FixedPointAffine,
    eps: float = 1e-12,
    is_centred: bool = True,
    bits: int = 8,
) -> _Blocks:
    """Normalise rows of blocks.

    Args:
        payload_RC: int8.
        factor_RQ: One for each block: float32 scales, or int8 exponents of two.
        columns: Of a block, before and after; 0 for whole rows.
        affine: As in :func:`lightning_compress.ops.integer_layernorm.integer_layernorm`, from
            :func:`lightning_compress.ops.integer_layernorm.fixed_point_affine`.
        eps: Added to the variance.
        is_centred: True for LayerNorm; False for RMSNorm, which leaves the mean in.
        bits: Of the result, 2 to 8.

    Returns:
        int8 ``[R, C]``, and factors ``[R, Q]`` of the kind given.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If shapes do not fit together, or a setting is out of range.

    Example:
        >>> from lightning_compress.ops.integer_layernorm import fixed_point_affine
        >>> payload, affine = torch.tensor([[1, 3]], dtype=torch.int8), fixed_point_affine(torch.ones(2))
        >>> layernorm_of_blocks(payload, torch.ones(1, 1), columns=0, affine=affine)[0].tolist()
        [[-127, 127]]
    """
    _check(payload_RC, factor_RQ, columns, bits)
    if affine.gamma_C.shape[0] != payload_RC.shape[1]:
        raise ValueError(
            f"the rows have {payload_RC.shape[1]} columns, gamma has {affine.gamma_C.shape[0]}: give one for each"
        )
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps} is not in [0, inf): give the eps of the norm, such as 1e-12")
    operator = torch.ops.lightning_compress.layernorm_of_blocks.default
    return operator(payload_RC, factor_RQ, *affine, eps, is_centred, columns, bits)


def _check(payload_RC: Tensor, factor_RQ: Tensor, columns: int, bits: int = 8) -> None:
    if payload_RC.dtype != torch.int8 or factor_RQ.dtype not in (torch.float32, torch.int8):
        raise TypeError(
            f"integers are {payload_RC.dtype}, factors {factor_RQ.dtype}: give int8, and float32 or int8 factors"
        )
    if columns < 0 or not 2 <= bits <= 8:
        raise ValueError(f"columns={columns}, bits={bits}: give columns of at least 0, and 2 to 8 bits")
    if payload_RC.dim() != 2:
        raise ValueError(f"the integers are shaped {tuple(payload_RC.shape)}: give [R, C]")
    expected = (payload_RC.shape[0], reference.num_blocks(payload_RC.shape[1], columns))
    if tuple(factor_RQ.shape) != expected:
        raise ValueError(
            f"factors are shaped {tuple(factor_RQ.shape)}, not {expected}: give one for each block"
        )


_SCHEMAS = {
    "softmax_of_blocks": "(Tensor payload, Tensor factors, Tensor? seen, int columns, int factor) -> Tensor",
    "gelu_of_blocks": "(Tensor payload, Tensor factors, int columns, str function, int bits) -> (Tensor, Tensor)",
    "layernorm_of_blocks": "(Tensor payload, Tensor factors, Tensor gamma, Tensor? beta, int shift, int exponent,"
    " float eps, bool is_centred, int columns, int bits) -> (Tensor, Tensor)",
}


@cache
def _cuda_implementation(name: str) -> Callable:
    if find_spec("triton") is None:  # an extra: `pip install lightning-compress[triton]`
        return getattr(reference, name)
    from lightning_compress.ops.integer_blocks import triton_kernel

    return getattr(triton_kernel, name)


def _register(name: str) -> None:
    operator = f"lightning_compress::{name}"
    torch.library.define(operator, _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(operator, "CompositeExplicitAutograd", getattr(reference, name))
    torch.library.impl(operator, "CUDA", lambda *arguments: _cuda_implementation(name)(*arguments))
    is_softmax = name == "softmax_of_blocks"
    torch.library.register_fake(operator, _fake_probabilities if is_softmax else _fake_blocks)


def _fake_probabilities(payload_RC: Tensor, factor_RQ: Tensor, *rest: object) -> Tensor:
    return payload_RC.new_empty(payload_RC.shape, dtype=torch.uint8)


def _fake_blocks(payload_RC: Tensor, factor_RQ: Tensor, *rest: object) -> _Blocks:
    return payload_RC.new_empty(payload_RC.shape), factor_RQ.new_empty(factor_RQ.shape)


for _name in _SCHEMAS:
    _register(_name)
